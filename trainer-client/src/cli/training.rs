//! What `sluice-train run` and `sluice-train reference` share: a run from its flags.

use std::sync::atomic::AtomicBool;

use anyhow::Context;
use serde_json::{Value, json};
use sluice_feed::feed::Feed;
use sluice_feed::pack::BatchShape;
use sluice_feed::select::Objective;
use sluice_text::output::say;

use super::arguments::{BrokerArguments, OutputArguments};
use super::model::ModelArguments;
use super::optimization::OptimizationArguments;
use crate::model::BurnLearner;
use crate::run::record::RunRecord;
use crate::text::TextTokenizer;
use crate::training::Plan;
use crate::training::schedule::Schedule;
use crate::training::setup::{Begun, Described, Setup};
use crate::watch::telemetry::Telemetry;

/// The model, its folder and its held-out sets.
pub(super) fn set_up<'a>(
    model: &ModelArguments,
    optimization: &OptimizationArguments,
    output: &OutputArguments,
    tokenizer: &'a TextTokenizer,
    shape: BatchShape,
) -> anyhow::Result<Setup<'a, BurnLearner>> {
    Setup::new(tokenizer, shape.rows, output.output(), |checkpoint| match checkpoint {
        Some(checkpoint) => model.resumed(
            checkpoint,
            tokenizer,
            shape.len,
            optimization.optimizer(),
            output.branch_from.is_some(),
        ),
        None => model.learner(tokenizer, shape.len, optimization.optimizer(), optimization.seed),
    })
}

/// What the run does with its micro-batches.
pub(super) fn plan(
    objective: Objective,
    schedule: Schedule,
    optimization: &OptimizationArguments,
    output: &OutputArguments,
) -> Plan {
    Plan {
        objective,
        schedule,
        seed: optimization.seed,
        eval_every: output.eval_every,
        checkpoint_every: output.checkpoint_every,
        best_by: output.keep_best.clone(),
    }
}

/// What `run.json` says of the model, and these further settings.
pub(super) fn described(
    command: &'static str,
    learner: &BurnLearner,
    model: &ModelArguments,
    optimization: &OptimizationArguments,
    settings: impl IntoIterator<Item = (&'static str, Value)>,
) -> anyhow::Result<Described> {
    let encode = |value: serde_json::Result<Value>| value.context("cannot encode the run's settings");
    let own = [
        ("model", encode(serde_json::to_value(learner.config()))?),
        ("optimizer", encode(serde_json::to_value(optimization.optimizer()))?),
        ("precision", encode(serde_json::to_value(model.compute.device.precision))?),
    ];
    let settings = own.into_iter().chain(settings).map(|(name, value)| (name.to_owned(), value));
    Ok(Described { command, settings: settings.collect() })
}

/// Says where a run goes on from, if it does.
pub(super) fn say_begun(setup: &Setup<'_, BurnLearner>, begun: Option<&Begun>) {
    if let (Some(checkpoint), Some(_)) = (setup.checkpoint(), begun) {
        say(format_args!("going on from {}", checkpoint.display()));
    }
}

/// Trains to the end of the run, and says how it ended.
pub(super) fn train(
    setup: Setup<'_, BurnLearner>,
    plan: Plan,
    record: RunRecord,
    begun: Option<Begun>,
    feed: Feed,
    (stop, telemetry): (&AtomicBool, Telemetry),
) -> anyhow::Result<()> {
    let (steps, folder) = (plan.schedule.steps, setup.folder().to_owned());
    let outcome = setup.train(plan, record, begun, feed, (stop, telemetry))?;
    say(format_args!("{}", outcome.sentence(steps, &folder)));
    Ok(())
}

/// What `run.json` says of the stream.
pub(super) fn stream_settings(topic: &str, broker: &BrokerArguments) -> Value {
    // Values of properties may be secrets; their names are enough to know that there were some.
    let properties: Vec<&str> = broker.property_names().collect();
    json!({ "topic": topic, "bootstrap_servers": broker.bootstrap_servers, "properties": properties })
}
