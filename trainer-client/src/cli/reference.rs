//! `sluice-train reference`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use serde_json::json;
use sluice_feed::document::Document;
use sluice_feed::feed::{Alone, Feed, Step};
use sluice_feed::pack::BatchShape;
use sluice_feed::plan::Plan as FeedPlan;
use sluice_feed::select::Objective;
use sluice_feed::snapshot::Snapshot;
use sluice_feed::stream::{
    Broker, Decoder, DocumentStream, Extent, KafkaStream, Next, Shard, ShuffledDocuments, Start, TopicKind,
};
use sluice_schemas::names;

use super::arguments::{BrokerArguments, OutputArguments};
use super::model::ModelArguments;
use super::optimization::OptimizationArguments;
use super::training::{described, plan, say_begun, set_up, stream_settings, train};
use crate::text::TextTokenizer;
use crate::training::setup::Begun;
use crate::watch::process::stop_on_signals;
use crate::watch::stage::Stage;

/// Tokens of a sequence where no reference says how many it read at once.
const SEQUENCE_LENGTH_WITHOUT_REFERENCE: usize = 256;

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
    let whole = count_steps(&mut over(stream.clone(), None)?)?;
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
    let feed = over(stream.after(read), snapshot)?;
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
