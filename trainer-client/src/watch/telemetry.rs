//! Every Prometheus metric of the trainer, in one place, and the clock that says what its time goes into.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    CounterVec, Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use sluice_feed::observer::Observer;
use sluice_feed::stream::StreamError;
use sluice_feed::supply::Buffered;

use crate::run::metrics::{EvalMetric, StepMetric};
use crate::run::record::RunRecord;
use crate::watch::stage::Stage;

/// Why a step was computed and not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Its loss or gradient is not a number.
    NotFinite,
    /// No token was to be learnt from.
    NothingKept,
}

impl Refused {
    const ALL: [Self; 2] = [Self::NotFinite, Self::NothingKept];

    fn name(self) -> &'static str {
        match self {
            Self::NotFinite => "not_finite",
            Self::NothingKept => "nothing_kept",
        }
    }
}

#[derive(Debug)]
struct Clock {
    stage: Stage,
    since: Instant,
}

/// The trainer's metrics. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Telemetry {
    registry: Registry,
    clock: Arc<Mutex<Clock>>,
    stage_seconds: CounterVec,
    steps: IntCounter,
    step: IntGauge,
    steps_planned: IntGauge,
    step_seconds: Histogram,
    steps_refused: IntCounterVec,
    tokens: IntCounter,
    tokens_eligible: IntCounter,
    tokens_kept: IntCounter,
    documents: IntCounter,
    loss: GaugeVec,
    eval_loss: GaugeVec,
    /// Without labels, so that there is none where no score decides.
    threshold: GaugeVec,
    /// Without labels, so that there is none where a threshold decides.
    keep_ratio: GaugeVec,
    learning_rate: Gauge,
    gradient_norm: Gauge,
    stream_lag: IntGauge,
    buffered: IntGaugeVec,
    rejected: IntCounterVec,
    skipped: IntCounterVec,
    checkpoint_seconds: Histogram,
    checkpoint_failures: IntCounter,
    checkpoint_step: IntGauge,
    checkpoint_timestamp: Gauge,
    run_info: IntGaugeVec,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::register().expect("names are constants, each registered once in a registry of its own")
    }
}

const NO_LABELS: [&str; 0] = [];
const FETCHED: &str = "fetched";
const QUEUE: &str = "queue";
const TOMBSTONE: &str = "tombstone";
const REMOVED: &str = "removed";

impl Telemetry {
    /// Registers every metric, each at zero.
    #[allow(clippy::too_many_lines, reason = "a list, and nothing else")]
    fn register() -> prometheus::Result<Self> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let counter = |name: &str, help: &str| add(&registry, IntCounter::new(name, help)?);
        let gauge = |name: &str, help: &str| add(&registry, IntGauge::new(name, help)?);
        let number = |name: &str, help: &str| add(&registry, Gauge::new(name, help)?);
        let counters = |name: &str, help: &str, label: &str| {
            add(&registry, IntCounterVec::new(Opts::new(name, help), &[label])?)
        };
        let numbers = |name: &str, help: &str, labels: &[&str]| {
            add(&registry, GaugeVec::new(Opts::new(name, help), labels)?)
        };
        let seconds = |name: &str, help: &str| {
            let buckets = prometheus::exponential_buckets(0.005, 2.0, 18)?;
            add(&registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?)
        };
        let stage_seconds = CounterVec::new(
            Opts::new(
                "sluice_train_stage_seconds_total",
                "What the trainer's time went into; the stages add up to all of it.",
            ),
            &["stage"],
        )?;
        let telemetry = Self {
            clock: Arc::new(Mutex::new(Clock { stage: Stage::Setup, since: Instant::now() })),
            stage_seconds: add(&registry, stage_seconds)?,
            steps: counter("sluice_train_steps_total", "Optimizer steps taken by this process.")?,
            step: gauge("sluice_train_step", "Step that the run has reached.")?,
            steps_planned: gauge("sluice_train_steps_planned", "Steps that the run is to take.")?,
            step_seconds: seconds(
                "sluice_train_step_seconds",
                "Time of a step, with the wait for its data.",
            )?,
            steps_refused: counters(
                "sluice_train_steps_refused_total",
                "Steps that were computed and not taken, which ends the run.",
                "reason",
            )?,
            tokens: counter("sluice_train_tokens_total", "Predictions seen.")?,
            tokens_eligible: counter(
                "sluice_train_tokens_eligible_total",
                "Predictions that could be chosen.",
            )?,
            tokens_kept: counter("sluice_train_tokens_kept_total", "Predictions learnt from.")?,
            documents: counter("sluice_train_documents_total", "Documents taken from the stream.")?,
            loss: numbers(
                "sluice_train_loss_nats",
                "Mean loss of the last step, before it was taken: over the tokens kept, dropped, and all.",
                &["tokens"],
            )?,
            eval_loss: numbers("sluice_train_eval_loss_nats", "Mean loss on a held-out set.", &["set"])?,
            threshold: numbers(
                "sluice_train_selection_threshold",
                "Lowest score that the last step kept: with the default score, excess loss in nats.",
                &NO_LABELS,
            )?,
            keep_ratio: numbers(
                "sluice_train_keep_ratio",
                "Share of the tokens that the last step was to keep.",
                &NO_LABELS,
            )?,
            learning_rate: number("sluice_train_learning_rate", "Learning rate of the last step.")?,
            gradient_norm: number(
                "sluice_train_gradient_norm",
                "Global L2 norm of the last step's gradient, before clipping.",
            )?,
            stream_lag: gauge("sluice_train_stream_lag_records", "Records of the topic not read yet.")?,
            buffered: add(
                &registry,
                IntGaugeVec::new(
                    Opts::new(
                        "sluice_train_buffered_documents",
                        "Documents that were read and are not trained on yet.",
                    ),
                    &["place"],
                )?,
            )?,
            rejected: counters(
                "sluice_train_records_rejected_total",
                "Records that the run refused, which ends it.",
                "reason",
            )?,
            skipped: counters(
                "sluice_train_records_skipped_total",
                "Records that were passed over: tombstones, and what retention removed between two passes.",
                "reason",
            )?,
            checkpoint_seconds: seconds("sluice_train_checkpoint_seconds", "Time to write a checkpoint.")?,
            checkpoint_failures: counter(
                "sluice_train_checkpoint_failures_total",
                "Checkpoints that could not be written.",
            )?,
            checkpoint_step: gauge(
                "sluice_train_checkpoint_step",
                "Step of the last checkpoint; 0 before the first.",
            )?,
            checkpoint_timestamp: number(
                "sluice_train_checkpoint_timestamp_seconds",
                "When the last checkpoint was written; before that, when the process began.",
            )?,
            run_info: add(
                &registry,
                IntGaugeVec::new(
                    Opts::new("sluice_train_run_info", "Always 1; the run."),
                    &["run", "command", "objective", "backward", "tokenizer", "reference_model"],
                )?,
            )?,
            registry,
        };
        let build_info =
            IntGaugeVec::new(Opts::new("sluice_train_build_info", "Always 1; the build."), &["version"])?;
        add(&telemetry.registry, build_info)?.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        for stage in Stage::ALL {
            telemetry.stage_seconds.with_label_values(&[stage.name()]);
        }
        for reason in Refused::ALL {
            telemetry.steps_refused.with_label_values(&[reason.name()]);
        }
        for reason in StreamError::REJECTIONS {
            telemetry.rejected.with_label_values(&[reason]);
        }
        for reason in [TOMBSTONE, REMOVED] {
            telemetry.skipped.with_label_values(&[reason]);
        }
        for place in [FETCHED, QUEUE] {
            telemetry.buffered.with_label_values(&[place]);
        }
        telemetry.set_buffered(Buffered::default());
        telemetry.checkpoint_timestamp.set(now());
        Ok(telemetry)
    }

    /// Notes that from here on the time goes into `stage`.
    pub fn enter(&self, stage: Stage) {
        let mut clock = self.clock();
        self.settle(&mut clock);
        clock.stage = stage;
    }

    /// Enters the time since the last look at the clock, so that a stage that does not end shows too.
    fn settle(&self, clock: &mut Clock) {
        let now = Instant::now();
        let passed = now.duration_since(clock.since).as_secs_f64();
        self.stage_seconds.with_label_values(&[clock.stage.name()]).inc_by(passed);
        clock.since = now;
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says which run this is, in the folder `folder`, and how far it has come.
    pub fn begin(&self, record: &RunRecord, folder: &Path, step: u64) {
        let name = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy();
        let reference = record.reference_model.map(|it| it.to_string()).unwrap_or_default();
        let tokenizer = record.tokenizer.to_string();
        self.run_info.reset();
        self.run_info
            .with_label_values(&[
                name.as_ref(),
                record.command.as_str(),
                record.objective.name(),
                record.backward().name(),
                tokenizer.as_str(),
                reference.as_str(),
            ])
            .set(1);
        self.step.set(step as i64);
        self.checkpoint_step.set(step as i64);
        self.steps_planned.set(record.schedule.steps as i64);
    }

    /// Enters a step of `tokens` predictions that was taken, and the share it was to keep where there is one.
    pub fn step(&self, metric: &StepMetric, tokens: u64, keep_ratio: Option<f64>) {
        self.steps.inc();
        self.step.set(metric.step as i64);
        self.step_seconds.observe(metric.seconds);
        self.tokens.inc_by(tokens);
        self.tokens_eligible.inc_by(metric.scored);
        self.tokens_kept.inc_by(metric.kept);
        self.learning_rate.set(metric.learning_rate);
        self.gradient_norm.set(f64::from(metric.gradient_norm));
        for (part, loss) in [
            ("kept", metric.loss.map(f64::from)),
            ("dropped", metric.loss_unselected),
            ("all", Some(metric.loss_all)),
        ] {
            set_or_remove(&self.loss, &[part], loss);
        }
        set_or_remove(&self.threshold, &NO_LABELS, metric.threshold.map(f64::from));
        set_or_remove(&self.keep_ratio, &NO_LABELS, keep_ratio);
    }

    /// Enters a step that was not taken.
    pub fn refused(&self, reason: Refused) {
        self.steps_refused.with_label_values(&[reason.name()]).inc();
    }

    /// Enters the loss on a held-out set.
    pub fn evaluated(&self, metric: &EvalMetric) {
        self.eval_loss.with_label_values(&[&metric.set]).set(metric.loss);
    }

    /// Enters documents taken from the streams.
    pub fn documents(&self, count: u64) {
        self.documents.inc_by(count);
    }

    /// Says how many documents wait between the streams and the model.
    pub fn set_buffered(&self, buffered: Buffered) {
        self.buffered.with_label_values(&["shuffle"]).set(buffered.shuffle as i64);
        self.buffered.with_label_values(&["packing"]).set(buffered.packing as i64);
    }

    /// Enters an attempt to write a checkpoint of `step`.
    pub fn checkpoint(&self, step: u64, took: Duration, is_written: bool) {
        if is_written {
            self.checkpoint_seconds.observe(took.as_secs_f64());
            self.checkpoint_step.set(step as i64);
            self.checkpoint_timestamp.set(now());
        } else {
            self.checkpoint_failures.inc();
        }
    }

    /// The metrics in Prometheus' text format, as of this moment.
    pub fn render(&self) -> prometheus::Result<Vec<u8>> {
        self.settle(&mut self.clock());
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

impl Observer for Telemetry {
    fn fetched(&self, change: i64) {
        self.buffered.with_label_values(&[FETCHED]).add(change);
    }

    fn queued(&self, change: i64) {
        self.buffered.with_label_values(&[QUEUE]).add(change);
    }

    fn lag(&self, change: i64) {
        self.stream_lag.add(change);
    }

    fn tombstone(&self) {
        self.skipped.with_label_values(&[TOMBSTONE]).inc();
    }

    fn rejected(&self, reason: &'static str) {
        self.rejected.with_label_values(&[reason]).inc();
    }

    fn removed(&self, records: u64) {
        self.skipped.with_label_values(&[REMOVED]).inc_by(records);
    }
}

fn add<M: Collector + Clone + 'static>(registry: &Registry, metric: M) -> prometheus::Result<M> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn set_or_remove(gauges: &GaugeVec, labels: &[&str], value: Option<f64>) {
    if let Some(value) = value {
        gauges.with_label_values(labels).set(value);
    } else {
        // An error says that there is none, which is what is wanted.
        let _ = gauges.remove_label_values(labels);
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
#[path = "telemetry_tests.rs"]
mod tests;
