//! `sluice-train reference`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::json;
use sluice_feed::feed::{Alone, Feed, Step};
use sluice_feed::pack::BatchShape;
use sluice_feed::plan::Plan as FeedPlan;
use sluice_feed::select::Objective;
use sluice_feed::snapshot::Snapshot;
use sluice_feed::stream::{Decoder, Extent, Shard, ShuffledDocuments, TopicKind};
use sluice_schemas::names;

use super::arguments::{BrokerArguments, OutputArguments, at_least};
use super::model::ModelArguments;
use super::optimization::OptimizationArguments;
use super::source::Source;
use super::training::{described, plan, say_begun, set_up, stream_settings, train};
use crate::failure::Classify;
use crate::text::TextTokenizer;
use crate::training::files;
use crate::training::setup::Begun;
use crate::watch::process::stop_on_signals;
use crate::watch::stage::Stage;
use crate::watch::telemetry::Telemetry;

/// Tokens of a sequence where no reference says how many it read at once.
const SEQUENCE_LENGTH_WITHOUT_REFERENCE: usize = 256;

/// Arguments of `sluice-train reference`.
#[derive(Args, Clone, Debug)]
pub(super) struct ReferenceArguments {
    /// Topic of tokenized documents, read to the end it has now
    #[arg(long, env = "SLUICE_TRAIN_TOPIC", default_value = names::DOCUMENTS_TOPIC)]
    topic: String,
    /// Read documents from these files instead of Kafka, a partition each: JSON Lines with a "text" or with "tokens", as they
    /// are or compressed; in the environment one a line
    #[arg(long, env = "SLUICE_TRAIN_FILES", value_name = "FILE", num_args = 1.., value_delimiter = '\n', conflicts_with = "topic")]
    files: Vec<PathBuf>,
    /// The tokenizer.json that the documents were made with
    #[arg(long, env = "SLUICE_TRAIN_TOKENIZER", value_name = "FILE")]
    tokenizer: PathBuf,
    /// Read the documents anew for each pass and draw from so many of them at random, an equal share for each partition, where
    /// all are more than memory holds [default: all are held, and each pass has an order of its own]
    #[arg(long, env = "SLUICE_TRAIN_SHUFFLE_BUFFER", value_name = "DOCUMENTS", value_parser = at_least::<1>)]
    shuffle_buffer: Option<usize>,
    /// Passes over the documents
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

/// Trains a reference model on curated documents.
pub(super) fn reference(arguments: &ReferenceArguments) -> anyhow::Result<()> {
    let ReferenceArguments { optimization, model, .. } = arguments;
    let output = &OutputArguments {
        keep_best: arguments.output.keep_best.clone().or_else(|| {
            // More passes over little text end beyond the best model.
            arguments.output.evals.first().map(|file| file.name.clone())
        }),
        ..arguments.output.clone()
    };
    let packing = optimization.packing()?;
    files::check(&arguments.files).or_usage()?;
    let stop = stop_on_signals()?;
    let broker = arguments.broker.broker()?;
    let telemetry = output.telemetry()?;
    // What is streamed is counted first, which nobody need see.
    let broker = match arguments.shuffle_buffer {
        Some(_) => broker,
        None => broker.observed(Arc::new(telemetry.clone())),
    };
    let tokenizer = Arc::new(TextTokenizer::read(&arguments.tokenizer)?);
    let source = Source {
        broker,
        files: arguments.files.clone(),
        decoder: Decoder::new(TopicKind::Documents, tokenizer.fingerprint(), tokenizer.vocabulary()),
        kind: TopicKind::Documents,
        tokenizer: Arc::clone(&tokenizer),
        bounds: output.bounds.bounds(&tokenizer)?,
        stop: Arc::clone(&stop),
    };
    let topic = source.name(&arguments.topic)?;
    let extent = Extent::UntilEnd { epochs: arguments.epochs };
    let feed_plan = FeedPlan {
        topic: topic.clone(),
        extent,
        shape: BatchShape {
            rows: optimization.batch.batch_size,
            len: optimization.batch.sequence_length.unwrap_or(SEQUENCE_LENGTH_WITHOUT_REFERENCE),
        },
        packing,
        micro_batches: optimization.accumulate,
        shuffle_buffer: arguments.shuffle_buffer.unwrap_or(0),
        seed: optimization.seed,
    };
    let setup = set_up(model, optimization, output, &tokenizer, feed_plan.shape)?;
    telemetry.enter(Stage::Data);
    let documents = match arguments.shuffle_buffer {
        Some(_) => Documents::Streamed(source),
        None => Documents::Held(ShuffledDocuments::new(
            source.read(&arguments.topic)?,
            arguments.epochs,
            optimization.seed,
            Arc::clone(&stop),
        )),
    };
    // By making them once, for a falling learning rate must know its end; nothing of them is kept.
    let Counted { steps: whole, documents: count, predictions } =
        Counted::of(&mut documents.open(&feed_plan, None, &tokenizer)?)?;
    tracing::info!(steps = whole, documents = count, predictions, "counted what all passes hold");
    let steps = arguments.steps.map_or(whole, |steps| steps.min(whole));
    let mut settings = stream_settings(&topic, &arguments.broker);
    settings["extent"] = json!(extent);
    settings["shuffle_buffer"] = json!(arguments.shuffle_buffer);
    settings["documents"] = count.into();
    settings["tokens"] = predictions.into();
    let schedule = optimization.schedule(steps, model.is_trained(output))?;
    let plan = plan(Objective::Clm, schedule, optimization, output);
    let described = described("reference", &setup.learner, model, optimization, [("stream", settings)])?;
    let record = setup.record(described, &plan, &feed_plan)?;
    let begun = setup.begun(&record)?;
    say_begun(&setup, begun.as_ref());
    let feed =
        documents.observed(&telemetry).open(&feed_plan, begun.as_ref().map(Begun::feed), &tokenizer)?;
    telemetry.enter(Stage::Setup);
    train(setup, plan, record, begun, feed, (&stop, telemetry))
}

/// The curated documents.
enum Documents {
    /// In memory, in a new order for each pass.
    Held(ShuffledDocuments),
    /// Read anew for each pass.
    Streamed(Source),
}

impl Documents {
    /// Their micro-batches, from the beginning or from where a snapshot stands.
    fn open(
        &self,
        plan: &FeedPlan,
        snapshot: Option<&Snapshot>,
        tokenizer: &TextTokenizer,
    ) -> anyhow::Result<Feed> {
        match self {
            Self::Streamed(source) => source.open(plan.clone(), snapshot),
            Self::Held(documents) => {
                let held = snapshot.iter().flat_map(|snapshot| snapshot.held.values());
                let read = held.map(|lane| lane.position.documents).sum();
                let stream = Box::new(documents.clone().after(read));
                Ok(Feed::over(stream, plan.clone(), Shard::WHOLE, snapshot, tokenizer.fingerprint())?)
            }
        }
    }

    /// The same, counted from here on by those who watch.
    fn observed(self, telemetry: &Telemetry) -> Self {
        match self {
            Self::Streamed(source) => {
                let broker = source.broker.clone().observed(Arc::new(telemetry.clone()));
                Self::Streamed(Source { broker, ..source })
            }
            held @ Self::Held(_) => held,
        }
    }
}

/// What a feed holds.
#[derive(Default)]
struct Counted {
    steps: u64,
    documents: u64,
    predictions: u64,
}

impl Counted {
    /// Counts what a feed holds by making all of it, a step at a time.
    fn of(feed: &mut Feed) -> anyhow::Result<Self> {
        let mut counted = Self::default();
        while let Step::Batches(batches) = feed.next_step(&mut Alone)? {
            counted.steps += 1;
            counted.predictions +=
                batches.iter().map(|packed| packed.batch.predictions() as u64).sum::<u64>();
        }
        counted.documents = feed.documents();
        Ok(counted)
    }
}
