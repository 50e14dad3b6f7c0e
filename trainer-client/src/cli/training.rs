//! `sluice-train run` and `sluice-train reference`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use clap::Args;
use serde_json::json;
use sluice_schemas::names;

use super::arguments::{BrokerArguments, ModelArguments, OptimizationArguments, OutputArguments};
use super::selection::SelectionArguments;
use crate::evaluate::read_sets;
use crate::failure::{Classify, Failure};
use crate::model::BurnLearner;
use crate::progress::Progress;
use crate::run_folder::{RunFolder, RunRecord};
use crate::schedule::Schedule;
use crate::select::Objective;
use crate::stream::{Decoder, DocumentStream, Extent, KafkaStream, ShuffledDocuments, TopicKind};
use crate::supply::count_batches;
use crate::text::TextTokenizer;
use crate::train::{Ending, Plan, Training};

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
    let objective = arguments.selection.objective(arguments.steps)?;
    let extent = match arguments.epochs {
        Some(epochs) => Extent::UntilEnd { epochs },
        None if arguments.until_end => Extent::UntilEnd { epochs: 1 },
        None => Extent::Follow,
    };
    let stop = stop_on_signals()?;
    let broker = arguments.broker.broker()?;
    let tokenizer = TextTokenizer::read(&arguments.tokenizer).or_usage()?;
    let mut prepared =
        Prepared::new(&arguments.model, &arguments.optimization, &arguments.output, &tokenizer)?;
    arguments.selection.give_history(&mut prepared.learner)?;
    let decoder = Decoder::new(TopicKind::Scored, tokenizer.fingerprint(), tokenizer.vocabulary())
        .needing_entropies(objective.needs().reference_entropy);
    let mut stream = KafkaStream::open(broker, &arguments.topic, extent, decoder, Arc::clone(&stop))?;
    let extent = match extent {
        Extent::Follow => json!("follow"),
        Extent::UntilEnd { epochs } => json!({ "until_end": { "epochs": epochs } }),
    };
    let settings = [
        ("stream", stream_settings(&arguments.topic, &arguments.broker, &extent)),
        ("history", arguments.selection.history_settings()),
    ];
    prepared.train("run", objective, arguments.steps, &mut stream, &stop, settings.into())
}

/// Trains a reference model on curated documents.
pub(super) fn reference(arguments: &ReferenceArguments) -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    let broker = arguments.broker.broker()?;
    let tokenizer = TextTokenizer::read(&arguments.tokenizer).or_usage()?;
    let prepared = Prepared::new(&arguments.model, &arguments.optimization, &arguments.output, &tokenizer)?;
    let decoder = Decoder::new(TopicKind::Documents, tokenizer.fingerprint(), tokenizer.vocabulary());
    let extent = Extent::UntilEnd { epochs: 1 };
    let mut topic = KafkaStream::open(broker, &arguments.topic, extent, decoder, Arc::clone(&stop))?;
    let mut documents = Vec::new();
    while let Some(document) = topic.next_document()? {
        documents.push(document);
    }
    drop(topic);
    let tokens: usize = documents.iter().map(|document| document.tokens().len()).sum();
    tracing::info!(documents = documents.len(), tokens, "read the curated documents");
    let seed = arguments.optimization.seed;
    let mut stream = ShuffledDocuments::new(documents, arguments.epochs, seed, Arc::clone(&stop));
    let batches = count_batches(&mut stream.clone(), arguments.optimization.shape())?;
    let whole = batches.div_ceil(arguments.optimization.accumulate as u64);
    let steps = arguments.steps.map_or(whole, |steps| steps.min(whole));
    let extent = json!({ "until_end": { "epochs": arguments.epochs } });
    let settings = [("stream", stream_settings(&arguments.topic, &arguments.broker, &extent))];
    prepared.train("reference", Objective::Clm, steps, &mut stream, &stop, settings.into())
}

/// What both commands set up before they open a stream, so that a wrong flag is found at once.
struct Prepared<'a> {
    learner: BurnLearner,
    tokenizer: &'a TextTokenizer,
    evals: Vec<crate::evaluate::EvalSet>,
    folder: RunFolder,
    optimization: &'a OptimizationArguments,
    output: &'a OutputArguments,
}

impl<'a> Prepared<'a> {
    fn new(
        model: &ModelArguments,
        optimization: &'a OptimizationArguments,
        output: &'a OutputArguments,
        tokenizer: &'a TextTokenizer,
    ) -> anyhow::Result<Self> {
        let learner = model.learner(
            tokenizer,
            optimization.sequence_length,
            optimization.optimizer(),
            optimization.seed,
        )?;
        let evals = read_sets(&output.evals, tokenizer, optimization.shape())?;
        let folder = RunFolder::create(&output.out).or_usage()?;
        Ok(Self { learner, tokenizer, evals, folder, optimization, output })
    }

    fn train(
        mut self,
        command: &str,
        objective: Objective,
        steps: u64,
        stream: &mut dyn DocumentStream,
        stop: &AtomicBool,
        settings: BTreeMap<&str, serde_json::Value>,
    ) -> anyhow::Result<()> {
        let OptimizationArguments { seed, learning_rate, warmup_steps, .. } = *self.optimization;
        let schedule =
            Schedule { shape: self.optimization.schedule, peak: learning_rate, warmup_steps, steps };
        let plan = Plan {
            objective,
            schedule,
            shape: self.optimization.shape(),
            accumulate: self.optimization.accumulate,
            seed,
            eval_every: self.output.eval_every,
            checkpoint_every: self.output.checkpoint_every,
        };
        let record = self.record(command, &plan, settings)?;
        let label = if command == "reference" { command } else { plan.objective.name() };
        let training = Training {
            learner: &mut self.learner,
            stream,
            plan,
            evals: &self.evals,
            tokenizer: self.tokenizer,
            folder: &mut self.folder,
            stop,
            progress: Progress::new(label, steps),
        };
        let outcome = training.run(record)?;
        let why = match outcome.ending {
            Ending::Finished => "all steps done",
            Ending::StreamEnded => {
                "the stream ended first; give --epochs for more passes, or --follow to wait"
            }
            Ending::Stopped => "stopped by a signal",
        };
        super::say(format_args!(
            "{} of {steps} steps, {} tokens seen, {} learnt from: {why}; the run is in {}",
            outcome.steps,
            outcome.tokens,
            outcome.tokens_kept,
            self.output.out.display()
        ));
        Ok(())
    }

    fn record(
        &self,
        command: &str,
        plan: &Plan,
        settings: BTreeMap<&str, serde_json::Value>,
    ) -> anyhow::Result<RunRecord> {
        let mut settings: BTreeMap<String, serde_json::Value> =
            settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let encode =
            |value: serde_json::Result<serde_json::Value>| value.context("cannot encode the run's settings");
        settings.insert("model".into(), encode(serde_json::to_value(self.learner.config()))?);
        settings.insert("optimizer".into(), encode(serde_json::to_value(self.optimization.optimizer()))?);
        settings.insert("eval_every".into(), self.output.eval_every.into());
        settings.insert("checkpoint_every".into(), self.output.checkpoint_every.into());
        let evals = self.output.evals.iter().zip(&self.evals).map(|(file, set)| {
            json!({ "name": set.name, "file": file.path, "documents": set.documents, "predictions": set.predictions })
        });
        settings.insert("evals".into(), evals.collect());
        let (_, librdkafka) = rdkafka::util::get_rdkafka_version();
        let versions = [("sluice-train", env!("CARGO_PKG_VERSION").to_owned()), ("librdkafka", librdkafka)];
        Ok(RunRecord {
            command: command.to_owned(),
            objective: plan.objective.clone(),
            seed: plan.seed,
            batch_size: plan.shape.rows,
            accumulate: plan.accumulate,
            sequence_length: plan.shape.len,
            schedule: plan.schedule,
            tokenizer: self.tokenizer.fingerprint(),
            reference_model: None,
            initial_weights: self.folder.digest_weights(&self.learner)?,
            settings,
            versions: versions.into_iter().map(|(name, version)| (name.to_owned(), version)).collect(),
        })
    }
}

fn stream_settings(topic: &str, broker: &BrokerArguments, extent: &serde_json::Value) -> serde_json::Value {
    // Values of properties may be secrets; their names are enough to know that there were some.
    let properties: Vec<&str> = broker.property_names().collect();
    json!({
        "topic": topic,
        "bootstrap_servers": broker.bootstrap_servers,
        "properties": properties,
        "extent": extent,
    })
}

/// A flag that the first SIGINT or SIGTERM sets; a second one ends the process at once.
fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for (signal, code) in [(signal_hook::consts::SIGINT, 130), (signal_hook::consts::SIGTERM, 143)] {
        // Registered first, so that it still sees the flag unset when the first signal arrives.
        signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(|error| Failure::Usage(format!("cannot listen for signal {signal}: {error}")))?;
    }
    Ok(stop)
}
