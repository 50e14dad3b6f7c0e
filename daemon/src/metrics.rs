//! Every metric of the daemon, in one place.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{
    Counter, Encoder as _, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder, core::Collector, process_collector::ProcessCollector,
};
use sluice_schemas::record::RecordError;

use crate::device::Device;
use crate::device_memory::{DeviceMemory, Memory};
use crate::health::{Health, Wait};
use crate::last_answer::LastAnswer;
use crate::outcome::{MODEL_FAILED, RECORD_TOO_LARGE};

/// A fence: the group has given the partitions to another daemon.
pub const FENCED_BY_GROUP: &str = "group";
/// A fence: another daemon uses the same transactional id.
pub const FENCED_BY_PRODUCER: &str = "producer";
/// What became of a reload.
pub const RELOAD_APPLIED: &str = "applied";
/// The new configuration was not taken; the old one is in force.
pub const RELOAD_REFUSED: &str = "refused";

/// A device, and what its driver last said of its memory.
type NamedMemory = (String, LastAnswer<Memory>);

/// The daemon's metrics. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// Records read from the documents topic.
    pub documents_read: IntCounter,
    /// Tokens of the documents read.
    pub tokens_read: IntCounter,
    /// Documents published to the scored topic.
    pub documents_scored: IntCounter,
    /// Tokens of the documents published to the scored topic.
    pub tokens_scored: IntCounter,
    /// Records published to the dead-letter topic, by reason.
    pub dead_letters: IntCounterVec,
    /// Tokens computed by the model without padding; windows that overlap count twice.
    pub model_tokens: IntCounter,
    /// Tokens computed by the model with padding.
    pub padded_tokens: IntCounter,
    /// Time of one run of the model.
    pub batch_seconds: Histogram,
    /// Time in which the model had nothing to run, though documents were there.
    pub model_starved_seconds: Counter,
    /// Windows in one run of the model.
    pub batch_rows: Histogram,
    /// Length to which the windows of one run are padded.
    pub row_tokens: Histogram,
    /// Batches that failed and were split.
    pub batches_split: IntCounter,
    /// Those of them that exhausted the device's memory.
    pub splits_for_memory: IntCounter,
    /// Time from the first record of a group to its commit.
    pub publish_seconds: Histogram,
    /// Time from reading a document to knowing its losses.
    pub scored_seconds: Histogram,
    /// Time from reading a record to its commit.
    pub committed_seconds: Histogram,
    /// Groups of records whose offsets were committed.
    pub commits: IntCounter,
    /// Transactions that were aborted and tried again.
    pub aborts: IntCounter,
    /// Times that the broker, or a look at the group, kept this daemon from publishing what another has taken over.
    pub fences: IntCounterVec,
    /// Producers replaced because one of their requests may have been under way still, or a call did not return.
    pub producers_replaced: IntCounter,
    /// Offset commits that failed; the next one covers them.
    pub commit_failures: IntCounter,
    /// Times that partitions were assigned or revoked.
    pub rebalances: IntCounter,
    /// Errors of the Kafka clients that they recover from by themselves.
    pub kafka_errors: IntCounter,
    /// Records of the assigned partitions that are not published yet.
    pub consumer_lag: IntGauge,
    /// Partitions that this daemon reads.
    pub assigned_partitions: IntGauge,
    /// Partitions that are assigned to this daemon and not read yet.
    pub unplaced_partitions: IntGauge,
    /// Longest time that an assigned partition has stood still at a transaction that its producer left open.
    pub open_transaction_seconds: IntGauge,
    /// 1 while reading is paused because the budget is used up.
    pub paused: IntGauge,
    /// Tokens from reading to committing.
    pub in_flight_tokens: IntGauge,
    /// Age of the oldest record in flight.
    pub oldest_in_flight_seconds: IntGauge,
    /// Reloads of the configuration, by outcome.
    pub reloads: IntCounterVec,
    queued_tokens: IntGaugeVec,
    ready: IntGauge,
    broker_up: IntGauge,
    loop_idle_seconds: GaugeVec,
    build_info: IntGaugeVec,
    model_info: IntGaugeVec,
    device_memory: Arc<Mutex<Option<NamedMemory>>>,
    device_memory_age: GaugeVec,
    device_memory_used: IntGaugeVec,
    device_memory_total: IntGaugeVec,
}

impl Metrics {
    /// Registers every metric, each at zero.
    #[allow(clippy::too_many_lines, reason = "a list, and nothing else")]
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| register(&registry, IntCounter::new(name, help)?);
        let gauge = |name: &str, help: &str| register(&registry, IntGauge::new(name, help)?);
        let seconds = |name: &str, help: &str| {
            let buckets = prometheus::exponential_buckets(0.001, 2.0, 16)?;
            register(&registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?)
        };
        let powers_of_two = |name: &str, help: &str| {
            let buckets = prometheus::exponential_buckets(1.0, 2.0, 16)?;
            register(&registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?)
        };
        let gauges = |name: &str, help: &str, label: &str| {
            register(&registry, IntGaugeVec::new(Opts::new(name, help), &[label])?)
        };
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let metrics = Self {
            documents_read: counter(
                "sluiced_documents_read_total",
                "Records read from the documents topic.",
            )?,
            tokens_read: counter("sluiced_tokens_read_total", "Tokens of the documents read.")?,
            documents_scored: counter(
                "sluiced_documents_scored_total",
                "Documents published with their losses.",
            )?,
            tokens_scored: counter("sluiced_tokens_scored_total", "Tokens of the documents published.")?,
            dead_letters: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("sluiced_dead_letters_total", "Records published to the dead-letter topic."),
                    &["reason"],
                )?,
            )?,
            model_tokens: counter(
                "sluiced_model_tokens_total",
                "Tokens the model computed, without padding.",
            )?,
            padded_tokens: counter(
                "sluiced_padded_tokens_total",
                "Tokens the model computed, with padding.",
            )?,
            batch_seconds: seconds("sluiced_batch_seconds", "Time of one run of the model.")?,
            model_starved_seconds: register(
                &registry,
                Counter::new(
                    "sluiced_model_starved_seconds_total",
                    "Time in which the model had nothing to run, though documents were there; waiting for a batch to fill included.",
                )?,
            )?,
            batch_rows: powers_of_two("sluiced_batch_rows", "Windows in one run of the model.")?,
            row_tokens: powers_of_two(
                "sluiced_batch_row_tokens",
                "Length to which the windows of one run of the model are padded.",
            )?,
            batches_split: counter("sluiced_batches_split_total", "Batches that failed and were split.")?,
            splits_for_memory: counter("sluiced_batches_out_of_memory_total", "Batches split for memory.")?,
            publish_seconds: seconds(
                "sluiced_publish_seconds",
                "Time to publish and commit a group of records.",
            )?,
            scored_seconds: seconds(
                "sluiced_read_to_scored_seconds",
                "Time from reading a document to knowing its losses.",
            )?,
            committed_seconds: seconds(
                "sluiced_read_to_committed_seconds",
                "Time from reading a record to committing its offset.",
            )?,
            commits: counter("sluiced_commits_total", "Groups of records whose offsets were committed.")?,
            aborts: counter("sluiced_aborts_total", "Transactions that were aborted and tried again.")?,
            fences: register(
                &registry,
                IntCounterVec::new(
                    Opts::new(
                        "sluiced_fences_total",
                        "Times that this daemon was kept from publishing what another has taken over: its partitions \
                         (group) or its transactional id (producer).",
                    ),
                    &["by"],
                )?,
            )?,
            producers_replaced: counter(
                "sluiced_producers_replaced_total",
                "Producers that were replaced: one of their requests may have been under way still, or a call did not return.",
            )?,
            commit_failures: counter("sluiced_commit_failures_total", "Offset commits that failed.")?,
            rebalances: counter(
                "sluiced_rebalances_total",
                "Times that partitions were assigned or revoked.",
            )?,
            kafka_errors: counter(
                "sluiced_kafka_errors_total",
                "Errors that the Kafka clients recover from.",
            )?,
            consumer_lag: gauge(
                "sluiced_consumer_lag_records",
                "Records of the assigned partitions that are not published yet.",
            )?,
            assigned_partitions: gauge("sluiced_assigned_partitions", "Partitions that this daemon reads.")?,
            unplaced_partitions: gauge(
                "sluiced_unplaced_partitions",
                "Partitions that are assigned and not read yet, because their committed offset is not to be had.",
            )?,
            open_transaction_seconds: gauge(
                "sluiced_open_transaction_seconds",
                "Longest time that a partition of the documents has stood still at a transaction that its producer left open.",
            )?,
            paused: gauge("sluiced_paused", "1 while reading is paused because the budget is used up.")?,
            in_flight_tokens: gauge("sluiced_in_flight_tokens", "Tokens from reading to committing.")?,
            oldest_in_flight_seconds: gauge(
                "sluiced_oldest_in_flight_seconds",
                "Age of the oldest record that is not yet published.",
            )?,
            reloads: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("sluiced_config_reloads_total", "Reloads of the configuration, by outcome."),
                    &["outcome"],
                )?,
            )?,
            queued_tokens: gauges(
                "sluiced_queued_tokens",
                "Tokens that wait to be scored, and those that wait to be published.",
                "queue",
            )?,
            ready: gauge("sluiced_ready", "1 while work can be taken, as /ready says.")?,
            broker_up: gauge("sluiced_broker_up", "1 while a broker answers.")?,
            loop_idle_seconds: register(
                &registry,
                GaugeVec::new(
                    Opts::new("sluiced_loop_idle_seconds", "Time since a loop has turned."),
                    &["loop"],
                )?,
            )?,
            build_info: gauges("sluiced_build_info", "Always 1; the build.", "version")?,
            model_info: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new("sluiced_model_info", "Always 1; the reference model being served."),
                    &["fingerprint", "tokenizer", "precision", "device"],
                )?,
            )?,
            device_memory: Arc::default(),
            device_memory_age: register(
                &registry,
                GaugeVec::new(
                    Opts::new(
                        "sluiced_device_memory_age_seconds",
                        "Time since the GPU's driver last told its memory; absent on the CPU.",
                    ),
                    &["device"],
                )?,
            )?,
            device_memory_used: gauges(
                "sluiced_device_memory_used_bytes",
                "Memory of the GPU that scores in use, by whomever; absent on the CPU.",
                "device",
            )?,
            device_memory_total: gauges(
                "sluiced_device_memory_total_bytes",
                "All memory of the GPU that scores; absent on the CPU.",
                "device",
            )?,
            registry,
        };
        for reason in RecordError::CODES.iter().chain(&[RECORD_TOO_LARGE, MODEL_FAILED]) {
            metrics.dead_letters.with_label_values(&[reason]);
        }
        for by in [FENCED_BY_GROUP, FENCED_BY_PRODUCER] {
            metrics.fences.with_label_values(&[by]);
        }
        for outcome in [RELOAD_APPLIED, RELOAD_REFUSED] {
            metrics.reloads.with_label_values(&[outcome]);
        }
        metrics.set_queued(0, 0);
        metrics.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(metrics)
    }

    /// Says which model is served.
    pub fn set_model(&self, fingerprint: &str, tokenizer: &str, precision: &str, device: &str) {
        self.model_info.reset();
        self.model_info.with_label_values(&[fingerprint, tokenizer, precision, device]).set(1);
    }

    /// Says where the model runs, whose memory is shown from here on.
    pub fn set_device(&self, device: Device) {
        let memory = DeviceMemory::of(device)
            .map(|memory| (device.to_string(), LastAnswer::start("device-memory", move || memory.read())));
        *self.device_memory.lock().unwrap_or_else(PoisonError::into_inner) = memory;
    }

    fn show_device_memory(&self) {
        // Of the device before, or where the driver does not tell any more.
        self.device_memory_used.reset();
        self.device_memory_total.reset();
        self.device_memory_age.reset();
        let device = self.device_memory.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((name, (memory, age))) = device.as_ref().and_then(|(name, last)| Some((name, last.seen()?)))
        else {
            return;
        };
        self.device_memory_age.with_label_values(&[name]).set(age.as_secs_f64());
        self.device_memory_used.with_label_values(&[name]).set(memory.used as i64);
        self.device_memory_total.with_label_values(&[name]).set(memory.total as i64);
    }

    /// Tokens that wait to be scored, and those that wait to be published.
    pub fn set_queued(&self, unscored: usize, unpublished: usize) {
        self.queued_tokens.with_label_values(&["score"]).set(unscored as i64);
        self.queued_tokens.with_label_values(&["publish"]).set(unpublished as i64);
    }

    /// The metrics in Prometheus' text format, with what `health` says at this moment.
    pub fn render(&self, health: &Health) -> prometheus::Result<Vec<u8>> {
        self.ready.set(i64::from(health.not_ready().is_none()));
        self.broker_up.set(i64::from(!health.waits_for(Wait::Broker)));
        for (name, age) in health.ages() {
            self.loop_idle_seconds.with_label_values(&[name]).set(age.as_secs_f64());
        }
        self.show_device_memory();
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

fn register<M: Collector + Clone + 'static>(registry: &Registry, metric: M) -> prometheus::Result<M> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
