//! `sluice-train run`.

use std::path::Path;
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};
use sluice_feed::pack::BatchShape;
use sluice_feed::plan::Plan as FeedPlan;
use sluice_feed::stream::Extent;
use sluice_text::output::say;

use super::arguments::{BrokerArguments, OutputArguments};
use super::model::ModelArguments;
use super::optimization::{BatchArguments, OptimizationArguments};
use super::selection::SelectionArguments;
use super::source::{ScoredArguments, Source};
use super::training::{described, plan, say_begun, set_up, stream_settings, train};
use crate::failure::{Classify, Failure};
use crate::run::folder::recorded;
use crate::run::record::BACKWARD_KEY;
use crate::text::TextTokenizer;
use crate::training::files;
use crate::training::learner::Learner;
use crate::training::setup::Begun;
use crate::watch::process::stop_on_signals;

/// Arguments of `sluice-train run`.
#[derive(Args, Clone, Debug)]
pub(super) struct RunArguments {
    #[command(flatten)]
    scored: ScoredArguments,
    /// Optimizer steps
    #[arg(long, env = "SLUICE_TRAIN_STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Stop at the end that the topic has now, even before the last step
    #[arg(long, env = "SLUICE_TRAIN_UNTIL_END", conflicts_with = "follow")]
    until_end: bool,
    /// Wait for further documents at the end of the topic (this is the default)
    #[arg(long, env = "SLUICE_TRAIN_FOLLOW", conflicts_with = "files")]
    follow: bool,
    /// Passes over the topic; implies --until-end
    #[arg(long, env = "SLUICE_TRAIN_EPOCHS", conflicts_with = "follow", value_parser = clap::value_parser!(u64).range(1..))]
    epochs: Option<u64>,
    /// Said no more, and refused with what to give instead
    #[arg(long, env = "SLUICE_TRAIN_WORLD_SIZE", hide = true)]
    world_size: Option<String>,
    /// Documents that wait to be drawn from at random, an equal share for each partition, so more than there are
    /// partitions [default: each partition's order]
    #[arg(
        long,
        env = "SLUICE_TRAIN_SHUFFLE_BUFFER",
        value_name = "DOCUMENTS",
        default_value_t = 0,
        hide_default_value = true
    )]
    shuffle_buffer: usize,
    #[command(flatten)]
    selection: SelectionArguments,
    #[command(flatten)]
    broker: BrokerArguments,
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    optimization: OptimizationArguments,
    #[command(flatten)]
    output: OutputArguments,
}

/// Trains on a scored topic.
pub(super) fn run(arguments: &RunArguments) -> anyhow::Result<()> {
    let RunArguments { selection, optimization, model, output, .. } = arguments;
    // One is what a run is.
    if arguments.world_size.as_deref().is_some_and(|given| !matches!(given.trim(), "" | "1")) {
        let error = "--world-size (or SLUICE_TRAIN_WORLD_SIZE) is no more: a run reads every partition in turn, in an order that no number of ranks \
                     changes; for the steps of --world-size W --accumulate A give --accumulate W*A";
        return Err(Failure::Usage(error.to_owned()).into());
    }
    let objective = selection.objective(arguments.steps)?;
    // Here as well, so that a wrong flag is found before a folder is made.
    let schedule = optimization.schedule(arguments.steps, model.is_trained(output))?;
    let packing = optimization.packing()?;
    let extent = arguments.extent();
    files::check(&arguments.scored.files).or_usage()?;
    let stop = stop_on_signals()?;
    let broker = arguments.broker.broker()?;
    let telemetry = output.telemetry()?;
    let broker = broker.observed(Arc::new(telemetry.clone()));
    let tokenizer = Arc::new(TextTokenizer::read(&arguments.scored.tokenizer)?);
    // Before the broker is asked for anything.
    model.check(&tokenizer, optimization.batch.sequence_length)?;
    output.output().check()?;
    let bounds = output.bounds.bounds(&tokenizer)?;
    let source =
        arguments.scored.source(broker, Arc::clone(&tokenizer), bounds, objective.needs(), Arc::clone(&stop));
    let topic = source.name(&arguments.scored.topic)?;
    let Some(len) = arguments.sequence_length(&source, extent)? else {
        say(format_args!("stopped by a signal before the topic held a record"));
        return Ok(());
    };
    let feed_plan = FeedPlan {
        topic: topic.clone(),
        extent,
        shape: BatchShape { rows: optimization.batch.batch_size, len },
        packing,
        micro_batches: optimization.accumulate,
        shuffle_buffer: arguments.shuffle_buffer,
        seed: optimization.seed,
    };
    let mut setup = set_up(model, optimization, output, &tokenizer, feed_plan.shape)?;
    selection.give_history(&mut setup.learner)?;
    setup.learner.flow_through(selection.backward);
    if let Some(checkpoint) = setup.checkpoint().map(Path::to_owned) {
        // The history is as it was in the checkpoint.
        setup.learner.load(&checkpoint).or_data()?;
    }
    let plan = plan(objective, schedule, optimization, output);
    let settings = [
        ("stream", arguments.stream_settings(&topic)),
        ("history", selection.history_settings()),
        (BACKWARD_KEY, json!(selection.backward)),
    ];
    let described = described("run", &setup.learner, model, optimization, settings)?;
    let record = setup.record(described, &plan, &feed_plan)?;
    let begun = setup.begun(&record)?;
    say_begun(&setup, begun.as_ref());
    let snapshot = begun.as_ref().map(Begun::feed);
    let feed = source.open(feed_plan, snapshot)?;
    train(setup, plan, record, begun, feed, (&stop, telemetry))
}

impl RunArguments {
    /// Tokens of a sequence: as given, as the run that is gone on with has them, or as many as the reference's windows
    /// hold, which the first record of the topic says. `None` where the run was asked to stop before there was one.
    fn sequence_length(&self, source: &Source, extent: Extent) -> anyhow::Result<Option<usize>> {
        let BatchArguments { batch_size, sequence_length } = self.optimization.batch;
        if let Some(given) = sequence_length {
            return Ok(Some(given));
        }
        if self.output.resume
            && let Some(record) = recorded(&self.output.out).or_data()?
        {
            return Ok(Some(record.sequence_length));
        }
        source.sequence_length(&self.scored.topic, extent, self.model.longest_sequence()?, batch_size)
    }

    fn extent(&self) -> Extent {
        match self.epochs {
            Some(epochs) => Extent::UntilEnd { epochs },
            None if self.until_end || !self.scored.files.is_empty() => Extent::UntilEnd { epochs: 1 },
            None => Extent::Follow,
        }
    }

    fn stream_settings(&self, topic: &str) -> Value {
        let mut settings = stream_settings(topic, &self.broker);
        settings["extent"] = json!(self.extent());
        settings["shuffle_buffer"] = self.shuffle_buffer.into();
        let allowed: Vec<String> = self.scored.reference_models.iter().map(ToString::to_string).collect();
        settings["reference_models"] = allowed.into();
        settings
    }
}
