//! Wires the rooms together: three threads and the model's, one ledger, and a way to stop.
//!
//! ```text
//! source (polls, checks) --jobs--> dispatch (windows, batches, assemble) --ledger--> sink (publishes, commits)
//!                                    |  batches ^
//!                                    v          | losses
//!                                   model (runs, and does nothing else; it outlives the others)
//! ```

use std::io;
use std::sync::Arc;
use std::thread::{Builder, Scope, ScopedJoinHandle};

use anyhow::{Context as _, bail};
use crossbeam_channel::unbounded;
use sluice_schemas::record::ContextPolicy;

use crate::assemble::RecordPolicy;
use crate::batch::{Ladder, TokenClass};
use crate::config::Config;
use crate::dispatch::Dispatcher;
use crate::health::{Health, Wait};
use crate::job::Job;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::outcome::Outcome;
use crate::score::ModelIdentity;
use crate::score::model_thread::ModelThread;
use crate::sink::Sink;
use crate::source;

/// Reads, scores and publishes until `health` is asked to stop; returns once everything read is committed.
pub fn run(
    config: &Config,
    (model, class): (ModelIdentity, Option<&TokenClass>),
    scorer: &ModelThread,
    (policy, ladder): (ContextPolicy, Ladder),
    metrics: &Metrics,
    health: &Health,
) -> anyhow::Result<()> {
    let ledger = Arc::new(Ledger::<Outcome>::default());
    // Until the source holds its own, so that nothing is ready in between.
    let joining = health.latch(Wait::Group);
    health.set_serving();
    let source = source::subscribe(config, Arc::clone(&ledger), metrics.clone(), health.clone())?;
    drop(joining);
    let record = RecordPolicy {
        model,
        context: policy,
        loss_format: config.score.loss_format,
        entropies: config.score.entropies,
        class: class.cloned(),
    };

    let (jobs_in, jobs_out) = unbounded::<Job>();
    std::thread::scope(|scope| {
        let reading = spawn(scope, health, "source", || {
            let jobs = jobs_in;
            guarded(health, || source.run(&jobs, model))
        })?;
        let dispatch = spawn(scope, health, "dispatch", || {
            let dispatcher = Dispatcher::new(record, ladder, &ledger, config.sizes(), metrics);
            guarded(health, || dispatcher.run(&jobs_out, scorer.asks()?, health))
        })?;
        let sink = spawn(scope, health, "sink", || {
            guarded(health, || Sink::new(config, source.consumer(), &ledger, metrics, health)?.run())
        })?;
        for (what, thread) in [("scoring", dispatch), ("publishing", sink), ("reading", reading)] {
            match thread.join() {
                Ok(result) => result.context(format!("{what} failed"))?,
                Err(_) => bail!("{what} panicked; this is a defect of Sluice"),
            }
        }
        Ok(())
    })
}

/// Starts one of the loops on a thread whose name shows in a profile.
fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    health: &Health,
    name: &str,
    run: impl FnOnce() -> anyhow::Result<()> + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, anyhow::Result<()>>> {
    let thread = Builder::new().name(name.to_owned()).spawn_scoped(scope, run);
    // Those that run already would wait for this one.
    thread.inspect_err(|_| health.abort())
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
