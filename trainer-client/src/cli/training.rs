//! `sluice-train run` and `sluice-train reference`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use sluice_feed::document::Document;
use sluice_feed::feed::{Alone, Feed, Step};
use sluice_feed::pack::BatchShape;
use sluice_feed::plan::Plan as FeedPlan;
use sluice_feed::select::Objective;
use sluice_feed::snapshot::Snapshot;
use sluice_feed::stream::{
    Broker, Decoder, DocumentStream, Extent, KafkaStream, Next, Shard, ShuffledDocuments, Start, StreamError,
    TopicKind, first_context,
};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names;

use super::arguments::{BrokerArguments, ModelArguments, OptimizationArguments, OutputArguments};
use super::selection::SelectionArguments;
use crate::failure::{Classify, Failure};
use crate::model::BurnLearner;
use crate::run::folder::recorded;
use crate::run::record::RunRecord;
use crate::text::TextTokenizer;
use crate::training::Plan;
use crate::training::learner::Learner;
use crate::training::schedule::Schedule;
use crate::training::setup::{Begun, Described, Setup};
use crate::watch::process::stop_on_signals;
use crate::watch::telemetry::{Stage, Telemetry};

/// Tokens of a sequence where no reference says how many it read at once.
const SEQUENCE_LENGTH_WITHOUT_REFERENCE: usize = 256;

/// Arguments of `sluice-train run`.
#[derive(Args, Clone, Debug)]
pub(super) struct RunArguments {
    /// Topic of scored documents
    #[arg(long, env = "SLUICE_TRAIN_TOPIC", default_value = names::SCORED_TOPIC)]
    topic: String,
    /// The tokenizer.json that the documents were made with
    #[arg(long, env = "SLUICE_TRAIN_TOKENIZER", value_name = "FILE")]
    tokenizer: PathBuf,
    /// Optimizer steps
    #[arg(long, env = "SLUICE_TRAIN_STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Stop at the end that the topic has now, even before the last step
    #[arg(long, env = "SLUICE_TRAIN_UNTIL_END", conflicts_with = "follow")]
    until_end: bool,
    /// Wait for further documents at the end of the topic (this is the default)
    #[arg(long, env = "SLUICE_TRAIN_FOLLOW")]
    follow: bool,
    /// Passes over the topic; implies --until-end
    #[arg(long, env = "SLUICE_TRAIN_EPOCHS", conflicts_with = "follow", value_parser = clap::value_parser!(u64).range(1..))]
    epochs: Option<u64>,
    /// Said no more, and refused with what to give instead
    #[arg(long, env = "SLUICE_TRAIN_WORLD_SIZE", hide = true)]
    world_size: Option<String>,
    /// Documents that wait to be drawn from at random, over all partitions [default: each partition's order]
    #[arg(
        long,
        env = "SLUICE_TRAIN_SHUFFLE_BUFFER",
        value_name = "DOCUMENTS",
        default_value_t = 0,
        hide_default_value = true
    )]
    shuffle_buffer: usize,
    /// Fingerprint of a reference model whose losses are accepted; repeatable, in the environment one a line
    /// [default: that of the first record]
    #[arg(
        long = "reference-model",
        env = "SLUICE_TRAIN_REFERENCE_MODEL",
        value_name = "SHA256",
        value_delimiter = '\n'
    )]
    reference_models: Vec<Fingerprint>,
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

/// Arguments of `sluice-train reference`.
#[derive(Args, Clone, Debug)]
pub(super) struct ReferenceArguments {
    /// Topic of tokenized documents; read to the end it has now and held in memory
    #[arg(long, env = "SLUICE_TRAIN_TOPIC", default_value = names::DOCUMENTS_TOPIC)]
    topic: String,
    /// The tokenizer.json that the documents were made with
    #[arg(long, env = "SLUICE_TRAIN_TOKENIZER", value_name = "FILE")]
    tokenizer: PathBuf,
    /// Passes over the documents, each in an order of its own
    #[arg(long, env = "SLUICE_TRAIN_EPOCHS", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Most optimizer steps [default: as many as the epochs hold]
    #[arg(long, env = "SLUICE_TRAIN_STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
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
    if arguments.world_size.is_some() {
        let error = "--world-size is no more: a run reads every partition in turn, in an order that no number of ranks \
                     changes; for the steps of --world-size W --accumulate A give --accumulate W*A";
        return Err(Failure::Usage(error.to_owned()).into());
    }
    let objective = selection.objective(arguments.steps)?;
    // Here as well, so that a wrong flag is found before a folder is made.
    let schedule = optimization.schedule(arguments.steps)?;
    let packing = optimization.packing()?;
    let extent = arguments.extent();
    let stop = stop_on_signals()?;
    let broker = arguments.broker.broker()?;
    let telemetry = output.telemetry()?;
    let broker = broker.observed(Arc::new(telemetry.clone()));
    let tokenizer = TextTokenizer::read(&arguments.tokenizer)?;
    // Before the broker is asked for anything.
    model.check(&tokenizer, optimization.sequence_length)?;
    let decoder = Decoder::new(TopicKind::Scored, tokenizer.fingerprint(), tokenizer.vocabulary())
        .needing_entropies(objective.needs().reference_entropy)
        .allowing(&arguments.reference_models);
    let Some(len) = arguments.sequence_length(&broker, extent, &decoder, &stop)? else {
        super::say(format_args!("stopped by a signal before the topic held a record"));
        return Ok(());
    };
    let feed_plan = FeedPlan {
        topic: arguments.topic.clone(),
        extent,
        shape: BatchShape { rows: optimization.batch_size, len },
        packing,
        micro_batches: optimization.accumulate,
        shuffle_buffer: arguments.shuffle_buffer,
        seed: optimization.seed,
    };
    let mut setup = set_up(model, optimization, output, &tokenizer, feed_plan.shape)?;
    selection.give_history(&mut setup.learner)?;
    if let Some(checkpoint) = setup.checkpoint().map(Path::to_owned) {
        // The history is as it was in the checkpoint.
        setup.learner.load(&checkpoint).or_data()?;
    }
    let plan = plan(objective, schedule, optimization, output);
    let settings = [("stream", arguments.stream_settings()), ("history", selection.history_settings())];
    let described = described("run", &setup.learner, model, optimization, settings)?;
    let record = setup.record(described, &plan, &feed_plan)?;
    let begun = setup.begun(&record)?;
    say_begun(&setup, begun.as_ref());
    let snapshot = begun.as_ref().map(Begun::feed);
    let feed = Feed::open(broker, feed_plan, Shard::WHOLE, snapshot, decoder, Arc::clone(&stop))?;
    train(setup, plan, record, begun, feed, (&stop, telemetry))
}

/// Trains a reference model on curated documents.
pub(super) fn reference(arguments: &ReferenceArguments) -> anyhow::Result<()> {
    let ReferenceArguments { optimization, model, output, .. } = arguments;
    let packing = optimization.packing()?;
    let stop = stop_on_signals()?;
    let broker = arguments.broker.broker()?;
    let telemetry = output.telemetry()?;
    let broker = broker.observed(Arc::new(telemetry.clone()));
    let tokenizer = TextTokenizer::read(&arguments.tokenizer)?;
    let seed = optimization.seed;
    let feed_plan = FeedPlan {
        topic: arguments.topic.clone(),
        extent: Extent::UntilEnd { epochs: arguments.epochs },
        shape: BatchShape {
            rows: optimization.batch_size,
            len: optimization.sequence_length.unwrap_or(SEQUENCE_LENGTH_WITHOUT_REFERENCE),
        },
        packing,
        micro_batches: optimization.accumulate,
        shuffle_buffer: 0,
        seed,
    };
    let setup = set_up(model, optimization, output, &tokenizer, feed_plan.shape)?;
    let decoder = Decoder::new(TopicKind::Documents, tokenizer.fingerprint(), tokenizer.vocabulary());
    telemetry.enter(Stage::Data);
    let documents = read_documents(broker, &arguments.topic, decoder, Arc::clone(&stop))?;
    let tokens: usize = documents.iter().map(|document| document.tokens().len()).sum();
    tracing::info!(documents = documents.len(), tokens, "read the curated documents");
    let stream = ShuffledDocuments::new(documents, arguments.epochs, seed, Arc::clone(&stop));
    let over = |stream: ShuffledDocuments, snapshot: Option<&Snapshot>| {
        Feed::over(Box::new(stream), feed_plan.clone(), Shard::WHOLE, snapshot, tokenizer.fingerprint())
    };
    let whole = count_steps(&mut over(stream.clone(), None))?;
    let steps = arguments.steps.map_or(whole, |steps| steps.min(whole));
    let mut settings = stream_settings(&arguments.topic, &arguments.broker);
    settings["extent"] = json!({ "until_end": { "epochs": arguments.epochs } });
    settings["documents"] = stream.documents().into();
    settings["tokens"] = tokens.into();
    let plan = plan(Objective::Clm, optimization.schedule(steps)?, optimization, output);
    let described = described("reference", &setup.learner, model, optimization, [("stream", settings)])?;
    let record = setup.record(described, &plan, &feed_plan)?;
    let begun = setup.begun(&record)?;
    say_begun(&setup, begun.as_ref());
    let snapshot = begun.as_ref().map(Begun::feed);
    let read =
        snapshot.map_or(0, |snapshot| snapshot.held.values().map(|lane| lane.position.documents).sum());
    let feed = over(stream.after(read), snapshot);
    telemetry.enter(Stage::Setup);
    train(setup, plan, record, begun, feed, (&stop, telemetry))
}

/// All documents of a topic, up to the end that it has now, each partition's after the other's.
fn read_documents(
    broker: Broker,
    topic: &str,
    decoder: Decoder,
    stop: Arc<AtomicBool>,
) -> anyhow::Result<Vec<Document>> {
    let extent = Extent::UntilEnd { epochs: 1 };
    let mut topic = KafkaStream::open(broker, topic, extent, Start::whole(), decoder, stop)?;
    let mut documents = Vec::new();
    for lane in 0..topic.lanes() {
        while let Next::Document(document) = topic.next_document(lane)? {
            documents.push(document);
        }
    }
    Ok(documents)
}

/// Steps that a feed holds, counted by packing all of it.
fn count_steps(feed: &mut Feed) -> anyhow::Result<u64> {
    let mut steps = 0;
    while let Step::Batches(_) = feed.next_step(&mut Alone)? {
        steps += 1;
    }
    Ok(steps)
}

fn set_up<'a>(
    model: &ModelArguments,
    optimization: &OptimizationArguments,
    output: &OutputArguments,
    tokenizer: &'a TextTokenizer,
    shape: BatchShape,
) -> anyhow::Result<Setup<'a, BurnLearner>> {
    Setup::new(tokenizer, shape, output.output(), |checkpoint| match checkpoint {
        Some(checkpoint) => model.resumed(checkpoint, tokenizer, shape.len, optimization.optimizer()),
        None => model.learner(tokenizer, shape.len, optimization.optimizer(), optimization.seed),
    })
}

fn plan(
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
    }
}

fn described(
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
        ("precision", encode(serde_json::to_value(model.compute.precision))?),
    ];
    let settings = own.into_iter().chain(settings).map(|(name, value)| (name.to_owned(), value));
    Ok(Described { command, settings: settings.collect() })
}

fn say_begun(setup: &Setup<'_, BurnLearner>, begun: Option<&Begun>) {
    if let (Some(checkpoint), Some(_)) = (setup.checkpoint(), begun) {
        super::say(format_args!("going on from {}", checkpoint.display()));
    }
}

fn train(
    setup: Setup<'_, BurnLearner>,
    plan: Plan,
    record: RunRecord,
    begun: Option<Begun>,
    feed: Feed,
    (stop, telemetry): (&AtomicBool, Telemetry),
) -> anyhow::Result<()> {
    let (steps, folder) = (plan.schedule.steps, setup.folder().to_owned());
    let outcome = setup.train(plan, record, begun, feed, (stop, telemetry))?;
    super::say(format_args!("{}", outcome.sentence(steps, &folder)));
    Ok(())
}

impl RunArguments {
    /// Tokens of a sequence: as given, as the run that is gone on with has them, or as many as the reference's windows
    /// hold, which the first record of the topic says. `None` where the run was asked to stop before there was one.
    fn sequence_length(
        &self,
        broker: &Broker,
        extent: Extent,
        decoder: &Decoder,
        stop: &AtomicBool,
    ) -> anyhow::Result<Option<usize>> {
        if let Some(given) = self.optimization.sequence_length {
            return Ok(Some(given));
        }
        if self.output.resume
            && let Some(record) = recorded(&self.output.out)
        {
            return Ok(Some(record.sequence_length));
        }
        let context = first_context(broker, &self.topic, extent, decoder, stop)?;
        let Some(context) = context else {
            let is_stopped = stop.load(Ordering::Relaxed);
            return if is_stopped {
                Ok(None)
            } else {
                Err(StreamError::EmptyTopic(self.topic.clone()).into())
            };
        };
        let window = context.window as usize;
        let longest = self.model.longest_sequence()?.unwrap_or(window);
        let len = window.min(longest);
        if len < 2 {
            let error = format!(
                "the first record of {:?} was scored in windows of {window} tokens: give --sequence-length",
                self.topic
            );
            return Err(Failure::Data(error).into());
        }
        tracing::info!(
            window,
            "sequences of {len} tokens, by the reference model's windows (--sequence-length)"
        );
        Ok(Some(len))
    }

    fn extent(&self) -> Extent {
        match self.epochs {
            Some(epochs) => Extent::UntilEnd { epochs },
            None if self.until_end => Extent::UntilEnd { epochs: 1 },
            None => Extent::Follow,
        }
    }

    fn stream_settings(&self) -> Value {
        let mut settings = stream_settings(&self.topic, &self.broker);
        settings["extent"] = json!(self.extent());
        settings["shuffle_buffer"] = self.shuffle_buffer.into();
        let allowed: Vec<String> = self.reference_models.iter().map(ToString::to_string).collect();
        settings["reference_models"] = allowed.into();
        settings
    }
}

fn stream_settings(topic: &str, broker: &BrokerArguments) -> Value {
    // Values of properties may be secrets; their names are enough to know that there were some.
    let properties: Vec<&str> = broker.property_names().collect();
    json!({ "topic": topic, "bootstrap_servers": broker.bootstrap_servers, "properties": properties })
}
