//! Wires the rooms together: four threads, one ledger, and a way to stop.
//!
//! ```text
//! source (polls, checks) --jobs--> dispatch (windows, batches, assemble) --ledger--> sink (publishes, commits)
//!                                    |  batches ^
//!                                    v          | losses
//!                                   model (runs, and does nothing else)
//! ```

use std::io;
use std::sync::Arc;
use std::thread::{Builder, Scope, ScopedJoinHandle};

use anyhow::{Context as _, bail};
use crossbeam_channel::{bounded, unbounded};
use sluice_schemas::record::{Bos, ContextPolicy};

use crate::assemble::RecordPolicy;
use crate::batch::{Batch, Window};
use crate::config::{BatchSettings, BosChoice, Config};
use crate::device::Device;
use crate::dispatch::{Dispatcher, Run, run_model};
use crate::health::Health;
use crate::job::Job;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::outcome::Outcome;
use crate::score::model::Model;
use crate::score::{ModelIdentity, Score};
use crate::sink::Sink;
use crate::source;

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
    let bos = match (config.score.bos, model.bos_token) {
        (BosChoice::None, _) => Bos::None,
        (BosChoice::Document, Some(token)) => Bos::Document(token),
        (BosChoice::Window, Some(token)) => Bos::Window(token),
        (_, None) => {
            bail!("score.bos asks for a BOS token, and config.json does not name one (bos_token_id)")
        }
    };
    if let Bos::Document(token) | Bos::Window(token) = bos {
        if token >= model.identity.vocabulary {
            bail!(
                "bos_token_id in config.json is {token}, beyond the vocabulary of {}",
                model.identity.vocabulary
            );
        }
        if stride + 1 >= window {
            bail!(
                "with score.bos, which takes a place in the window, score.stride_tokens ({stride}) must be at least \
                 two less than the window ({window})"
            );
        }
    }
    Ok(ContextPolicy { window, stride, bos })
}

/// Runs the shapes of batches that scoring will meet, so that memory is had and kernels are chosen before the daemon
/// says that it is ready; says how many there were.
///
/// On a GPU, where kernels are chosen by shape, these are all lengths on the ladder, with a full batch of rows and with
/// one. The CPU chooses none by shape: the smallest and the largest tell whether the model runs and the memory is there.
pub fn warm_up(
    scorer: &mut dyn Score,
    device: Device,
    policy: ContextPolicy,
    batch: &BatchSettings,
) -> anyhow::Result<usize> {
    let shapes = warm_up_shapes(device, policy, batch);
    for &(rows, len) in &shapes {
        let window =
            Window { document: 0, tokens: vec![0; len].into(), span: 0..len, bos: None, first_scored: 1 };
        let scores = scorer
            .score(&Batch::new(vec![window; rows], batch.ladder(policy)))
            .with_context(|| format!("the model fails on a batch of {rows} x {len} tokens of padding"))?;
        if let Some(loss) = scores.losses.iter().find(|loss| !loss.is_finite()) {
            bail!("the model gives a loss of {loss}; its weights or its arithmetic are broken");
        }
    }
    Ok(shapes.len())
}

/// Rows and lengths, largest batch first, so that the memory it leaves behind serves the others.
fn warm_up_shapes(device: Device, policy: ContextPolicy, batch: &BatchSettings) -> Vec<(usize, usize)> {
    let mut lengths = batch.ladder(policy).lengths();
    // One token alone predicts nothing.
    lengths.retain(|&len| len >= 2);
    let full = |len: usize| ((batch.tokens_max / len).max(1), len);
    match (device, lengths.as_slice()) {
        (Device::Cpu, [shortest, .., longest]) => vec![full(*longest), (1, *shortest)],
        _ => lengths.iter().rev().flat_map(|&len| [full(len), (1, len)]).collect(),
    }
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
    // Without room: a batch is handed over when the model asks for it, so that no more than one waits.
    let (batches_in, batches_out) = bounded::<Batch>(0);
    let (runs_in, runs_out) = bounded::<Run>(1);
    std::thread::scope(|scope| {
        let source = spawn(scope, health, "source", || {
            let jobs = jobs_in;
            guarded(health, || source::run(&consumer, &jobs, &ledger, model, config, metrics, health))
        })?;
        let dispatch = spawn(scope, health, "dispatch", || {
            let batches = batches_in;
            let dispatcher = Dispatcher::new(record, &ledger, &config.batch, metrics);
            guarded(health, || dispatcher.run(&jobs_out, &batches, &runs_out, health))
        })?;
        let model = spawn(scope, health, "model", || {
            let (batches, runs) = (batches_out, runs_in);
            guarded(health, || {
                run_model(scorer, &batches, &runs, metrics);
                Ok(())
            })
        })?;
        let sink = spawn(scope, health, "sink", || {
            guarded(health, || Sink::new(config, &consumer, &ledger, metrics, health)?.run())
        })?;
        for (what, thread) in
            [("running the model", model), ("scoring", dispatch), ("publishing", sink), ("reading", source)]
        {
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
