//! The daemon's pipeline in this process, on its own threads and settings, from a documents topic to a scored one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use serde::Serialize;
use sluice_daemon::batch::Ladder;
use sluice_daemon::config::Config;
use sluice_daemon::health::Health;
use sluice_daemon::metrics::Metrics;
use sluice_daemon::pipeline;
use sluice_daemon::score::ModelIdentity;
use sluice_daemon::score::model_thread::ModelThread;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{ContextPolicy, TokenIds, TokenizedDocument};
use sluice_tests::produce;

use crate::process::{cpu_seconds, forget_peak, peak_bytes, resident_bytes};

/// Documents that are encoded before they are sent, so that memory does not hold them all twice.
const ENCODED_TOGETHER: usize = 5000;

/// Publishes `documents` as records that `tokenizer` made, and waits until the broker has them.
pub fn publish(
    bootstrap_servers: &str,
    topic: &str,
    tokenizer: Fingerprint,
    documents: impl IntoIterator<Item = Vec<u32>>,
) {
    let mut documents = documents.into_iter().enumerate().peekable();
    while documents.peek().is_some() {
        let records: Vec<_> = documents
            .by_ref()
            .take(ENCODED_TOGETHER)
            .map(|(number, tokens)| {
                let document = TokenizedDocument {
                    id: format!("document-{number}"),
                    tokens: TokenIds::new(&tokens),
                    tokenizer,
                    source: String::new(),
                    attributes: BTreeMap::new(),
                };
                (document.id.clone(), document.encode())
            })
            .collect();
        let borrowed: Vec<_> =
            records.iter().map(|(id, payload)| (id.as_str(), Some(payload.clone()))).collect();
        produce(bootstrap_servers, topic, &borrowed);
    }
}

/// What is scored, and how.
#[derive(Debug)]
pub struct Setup<'a> {
    /// The daemon's settings.
    pub config: &'a Config,
    /// What records say of the model.
    pub model: ModelIdentity,
    /// The model.
    pub scorer: &'a ModelThread,
    /// How it sees a document.
    pub policy: ContextPolicy,
    /// The shapes of its batches.
    pub ladder: Ladder,
    /// Documents that are waited for.
    pub documents: usize,
    /// Longest time to wait for the first of them to be read, and from there on for all of them.
    pub time_max: Duration,
    /// Process of the broker, where its time counts.
    pub broker: Option<u32>,
}

/// What a run took, from the first record read to the last one published.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Tokens scored.
    pub tokens: f64,
    /// Seconds of wall time.
    pub seconds: f64,
    /// CPU time of this process, in seconds.
    pub cpu_seconds: f64,
    /// CPU time of the broker, in seconds; 0 where it does not count.
    pub broker_cpu_seconds: f64,
    /// Seconds in which the model ran.
    pub busy_seconds: f64,
    /// Seconds in which it had nothing to run, though documents were there.
    pub starved_seconds: f64,
    /// Resident memory of this process at its highest, less what it was before, in bytes.
    pub peak_memory_bytes: f64,
}

/// Runs the pipeline until all documents are scored or the time is over, and stops it.
pub fn run(setup: &Setup<'_>) -> anyhow::Result<Run> {
    let metrics = Metrics::new()?;
    let health = Health::default();
    std::thread::scope(|scope| {
        let Setup { config, model, scorer, policy, ladder, .. } = *setup;
        let (metrics, health) = (&metrics, &health);
        let daemon = scope
            .spawn(move || pipeline::run(config, (model, None), scorer, (policy, ladder), metrics, health));
        let measured = watch(setup, metrics, || daemon.is_finished());
        // Whatever became of it, the pipeline is not left to run.
        health.stop();
        daemon.join().map_err(|_| anyhow!("the pipeline panicked"))??;
        measured
    })
}

/// Waits for the documents, and says what that took.
fn watch(setup: &Setup<'_>, metrics: &Metrics, is_finished: impl Fn() -> bool) -> anyhow::Result<Run> {
    let this = std::process::id();
    let broker = || setup.broker.map_or(Ok(0.0), cpu_seconds);
    forget_peak()?;
    let memory = resident_bytes(this)?;
    let asked = Instant::now();
    while metrics.documents_read.get() == 0 && !is_finished() {
        if asked.elapsed() >= setup.time_max {
            bail!("the daemon has read nothing in {:?}", setup.time_max);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let (started, own, others) = (Instant::now(), cpu_seconds(this)?, broker()?);
    let (busy, starved) = (metrics.batch_seconds.get_sample_sum(), metrics.model_starved_seconds.get());
    while (metrics.documents_scored.get() as usize) < setup.documents
        && !is_finished()
        && started.elapsed() < setup.time_max
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Run {
        tokens: metrics.tokens_scored.get() as f64,
        seconds: started.elapsed().as_secs_f64(),
        cpu_seconds: cpu_seconds(this)? - own,
        broker_cpu_seconds: broker()? - others,
        busy_seconds: metrics.batch_seconds.get_sample_sum() - busy,
        starved_seconds: metrics.model_starved_seconds.get() - starved,
        peak_memory_bytes: peak_bytes(this)? as f64 - memory as f64,
    })
}
