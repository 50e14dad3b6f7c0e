//! Wires the rooms together: three threads, one ledger, and a way to stop.
//!
//! ```text
//! source (polls, checks) --jobs--> score (windows, batches, model, assemble) --ledger--> sink (publishes, commits)
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};
use sluice_schemas::record::ContextPolicy;

use crate::assemble::{Assembly, RecordPolicy, scatter};
use crate::batch::{Batch, Window, plan, windows};
use crate::config::{BatchSettings, Config};
use crate::health::{Health, Loop};
use crate::ledger::Ledger;
use crate::metrics::{MODEL_FAILED, Metrics};
use crate::notice::Notices;
use crate::score::model::Model;
use crate::score::{ModelIdentity, Score};
use crate::sink::{Outcome, Sink};
use crate::source::{self, Job};

/// Documents in a row that the model may fail on before the model itself is taken to be broken.
const FAILURES_MAX: usize = 3;
/// Longest wait before a loop looks whether it should stop.
const TURN: Duration = Duration::from_millis(100);

/// The windows that `config` asks for from `model`.
pub fn context_policy(config: &Config, model: &Model) -> anyhow::Result<ContextPolicy> {
    let window = match (config.score.window_tokens, model.context_max) {
        (0, Some(longest)) => longest.min(u32::try_from(config.batch.tokens_max).unwrap_or(u32::MAX)),
        (0, None) => bail!(
            "config.json does not say how long a sequence may be (max_position_embeddings); set score.window_tokens"
        ),
        (asked, Some(longest)) if asked > longest => {
            bail!("score.window_tokens is {asked}, and the model was made for at most {longest} tokens")
        }
        (asked, _) => asked,
    };
    if window < 2 {
        bail!(
            "a window of {window} tokens predicts nothing; check max_position_embeddings in config.json, \
             score.window_tokens and batch.tokens_max"
        );
    }
    let stride = match config.score.stride_tokens {
        0 => (window / 2).max(1),
        asked if asked >= window => {
            bail!("score.stride_tokens is {asked}; it must be less than the window of {window} tokens")
        }
        asked => asked,
    };
    Ok(ContextPolicy { window, stride })
}

/// Runs every size of batch once that scoring will meet at its largest, so that memory is had and kernels are chosen.
pub fn warm_up(scorer: &mut dyn Score, policy: ContextPolicy, batch: &BatchSettings) -> anyhow::Result<()> {
    for (rows, len) in [(1, 2), (batch.tokens_max / policy.window as usize, policy.window as usize)] {
        let tokens: Arc<[u32]> = vec![0; len].into();
        let rows: Vec<Window> = (0..rows.max(1)).flat_map(|row| windows(row, &tokens, policy)).collect();
        let scores = scorer
            .score(&Batch::new(rows, batch.padding_multiple))
            .context("the model fails on a batch of padding; see the message of ONNX Runtime above")?;
        if let Some(loss) = scores.losses.iter().find(|loss| !loss.is_finite()) {
            bail!("the model gives a loss of {loss}; its weights or its arithmetic are broken");
        }
    }
    Ok(())
}

/// Reads, scores and publishes until `health` is asked to stop; returns once everything read is committed.
pub fn run(
    config: &Config,
    model: ModelIdentity,
    scorer: Box<dyn Score>,
    policy: ContextPolicy,
    metrics: &Metrics,
    health: &Health,
) -> anyhow::Result<()> {
    let ledger = Arc::new(Ledger::<Outcome>::default());
    let consumer = Arc::new(source::subscribe(config, Arc::clone(&ledger), metrics.clone(), health.clone())?);
    let record = RecordPolicy {
        model,
        context: policy,
        loss_format: config.score.loss_format,
        entropies: config.score.entropies,
    };

    let (jobs_in, jobs_out) = unbounded::<Job>();
    std::thread::scope(|scope| {
        let source = scope.spawn(|| {
            let jobs = jobs_in;
            guarded(health, || source::run(&consumer, &jobs, &ledger, model, config, metrics, health))
        });
        let score = scope.spawn(|| {
            guarded(health, || {
                score_loop(scorer, &jobs_out, &ledger, &record, &config.batch, metrics, health)
            })
        });
        let sink =
            scope.spawn(|| guarded(health, || Sink::new(config, &consumer, &ledger, metrics, health)?.run()));
        for (what, thread) in [("scoring", score), ("publishing", sink), ("reading", source)] {
            match thread.join() {
                Ok(result) => result.context(format!("{what} failed"))?,
                Err(_) => bail!("{what} panicked; this is a defect of Sluice"),
            }
        }
        Ok(())
    })
}

/// Runs one of the loops; when it fails or panics, the others give up too.
fn guarded(health: &Health, run: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    struct AbortOnPanic<'a>(&'a Health);
    impl Drop for AbortOnPanic<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.abort();
            }
        }
    }
    let _guard = AbortOnPanic(health);
    run().inspect_err(|_| health.abort())
}

fn score_loop(
    mut scorer: Box<dyn Score>,
    jobs: &Receiver<Job>,
    ledger: &Ledger<Outcome>,
    record: &RecordPolicy,
    settings: &BatchSettings,
    metrics: &Metrics,
    health: &Health,
) -> anyhow::Result<()> {
    let notices = Notices::default();
    let mut failures = 0;
    while let Some(gathered) = gather(jobs, ledger, settings, health) {
        let mut pending = Vec::new();
        let mut assemblies = Vec::with_capacity(gathered.len());
        for (index, job) in gathered.into_iter().enumerate() {
            let tokens: Arc<[u32]> = job.document.tokens.iter().collect();
            pending.extend(windows(index, &tokens, record.context));
            assemblies.push(Some(Assembly::new(job)));
        }
        // Documents of one token are complete before the model has run.
        complete(0..assemblies.len(), &mut assemblies, record, ledger);

        let mut batches = plan(pending, settings.tokens_max, settings.padding_multiple);
        batches.reverse();
        while let Some(batch) = batches.pop() {
            health.beat(Loop::Score);
            if health.is_aborted() {
                return Ok(());
            }
            let timer = metrics.batch_seconds.start_timer();
            let scored = scorer.score(&batch);
            timer.observe_duration();
            match scored {
                Ok(scores) => {
                    failures = 0;
                    metrics.model_tokens.inc_by(batch.real_tokens() as u64);
                    metrics.padded_tokens.inc_by(batch.padded_tokens() as u64);
                    metrics.batch_rows.observe(batch.rows() as f64);
                    metrics.row_tokens.observe(batch.padded_len as f64);
                    scatter(&batch, &scores, &mut assemblies);
                }
                Err(error) if batch.rows() > 1 => {
                    if let Some(others) = notices.due("batch") {
                        tracing::warn!(
                            %error,
                            rows = batch.rows(),
                            others_since_last_warning = others,
                            "a batch failed; trying its halves"
                        );
                    }
                    metrics.batches_split.inc();
                    let mut first = batch.windows;
                    let second = first.split_off(first.len() / 2);
                    batches.extend([second, first].map(|half| Batch::new(half, settings.padding_multiple)));
                    continue;
                }
                Err(error) => {
                    failures += 1;
                    if failures >= FAILURES_MAX {
                        return Err(error)
                            .context(format!("the model failed on {failures} documents in a row"));
                    }
                    if let Some(assembly) = &mut assemblies[batch.windows[0].document] {
                        assembly.fail(MODEL_FAILED, format!("{error:#}"));
                    }
                }
            }
            complete(batch.windows.iter().map(|window| window.document), &mut assemblies, record, ledger);
        }
    }
    Ok(())
}

/// Enters into the ledger those of `documents` of which nothing is missing any more.
fn complete(
    documents: impl Iterator<Item = usize>,
    assemblies: &mut [Option<Assembly>],
    record: &RecordPolicy,
    ledger: &Ledger<Outcome>,
) {
    for document in documents {
        if let Some(assembly) = assemblies[document].take_if(|assembly| assembly.is_complete()) {
            let (ticket, outcome) = assembly.finish(record);
            ledger.complete(ticket, outcome);
        }
    }
}

/// Documents for the next look-ahead window: as many as fit it and have come, or come within the delay after the
/// first. Nothing once the source is gone.
fn gather(
    jobs: &Receiver<Job>,
    ledger: &Ledger<Outcome>,
    settings: &BatchSettings,
    health: &Health,
) -> Option<Vec<Job>> {
    let first = loop {
        health.beat(Loop::Score);
        match jobs.recv_timeout(TURN) {
            Ok(job) if ledger.begin(job.ticket) => break job,
            Err(RecvTimeoutError::Timeout) if health.is_aborted() => return None,
            // A record whose partition has been given up meanwhile, or none.
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    };
    let deadline = Instant::now() + Duration::from_millis(settings.delay_ms_max);
    let mut tokens = first.document.tokens.len();
    let mut gathered = vec![first];
    while tokens < settings.lookahead_tokens && !health.is_stopping() {
        match jobs.recv_deadline(deadline.min(Instant::now() + TURN)) {
            Ok(job) if ledger.begin(job.ticket) => {
                tokens += job.document.tokens.len();
                gathered.push(job);
            }
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => health.beat(Loop::Score),
            Err(_) => break,
        }
    }
    Some(gathered)
}
