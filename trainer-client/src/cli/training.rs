//! `sluice-train run` and `sluice-train reference`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names;

use super::arguments::{BrokerArguments, ModelArguments, OptimizationArguments, OutputArguments, at_least};
use super::selection::SelectionArguments;
use crate::checkpoints::{Reached, State};
use crate::evaluate::read_sets;
use crate::failure::{Classify, Failure};
use crate::learner::Learner;
use crate::model::{BurnLearner, Precision};
use crate::process::stop_on_signals;
use crate::progress::Progress;
use crate::run_folder::RunFolder;
use crate::run_record::RunRecord;
use crate::select::Objective;
use crate::snapshot::Snapshot;
use crate::stream::{Decoder, DocumentStream, Extent, KafkaStream, Shard, ShuffledDocuments, TopicKind};
use crate::supply::count_batches;
use crate::telemetry::{Stage, Telemetry};
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
    /// Equal parts of the topic, each with its partitions, shuffle buffer and packing, that a step takes --accumulate
    /// micro-batches of; may change when a run is resumed
    #[arg(long, env = "SLUICE_TRAIN_WORLD_SIZE", default_value_t = 1, value_parser = at_least::<1>)]
    world_size: usize,
    /// Documents that wait in each part to be drawn from at random [default: the topic's order]
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
    let objective = arguments.selection.objective(arguments.steps)?;
    // Here as well, so that a wrong flag is found before a folder is made.
    arguments.optimization.schedule(arguments.steps)?;
    let extent = match arguments.epochs {
        Some(epochs) => Extent::UntilEnd { epochs },
        None if arguments.until_end => Extent::UntilEnd { epochs: 1 },
        None => Extent::Follow,
    };
    let stop = stop_on_signals()?;
    let broker = arguments.broker.broker()?;
    let telemetry = arguments.output.telemetry()?;
    let broker = broker.observed(telemetry.clone());
    let tokenizer = TextTokenizer::read(&arguments.tokenizer)?;
    let mut prepared =
        Prepared::new(&arguments.model, &arguments.optimization, &arguments.output, &tokenizer)?;
    prepared.give_history(&arguments.selection)?;
    let settings =
        [("stream", arguments.stream_settings(extent)), ("history", arguments.selection.history_settings())];
    let plan = prepared.plan(objective, arguments.steps, arguments.shuffle_buffer)?;
    let record = prepared.record("run", &plan, settings.into())?;
    let begun = prepared.begun(&record, arguments.world_size)?;

    let decoder = Decoder::new(TopicKind::Scored, tokenizer.fingerprint(), tokenizer.vocabulary())
        .needing_entropies(plan.objective.needs().reference_entropy)
        .allowing(&arguments.reference_models)
        .after(begun.as_ref().and_then(|begun| begun.reference_model))
        .with_contexts(begun.as_ref().map(|begun| begun.snapshot.contexts.clone()).unwrap_or_default());
    let mut streams = Vec::with_capacity(arguments.world_size);
    for rank in 0..arguments.world_size {
        let shard = Shard { rank, world_size: arguments.world_size };
        let place = begun.as_ref().map(|begun| &begun.snapshot.ranks[rank].position);
        let (broker, decoder) = (broker.clone(), decoder.clone());
        let stop = Arc::clone(&stop);
        streams.push(KafkaStream::open_at(broker, &arguments.topic, extent, (shard, place), decoder, stop)?);
    }
    let streams = streams.iter_mut().map(|stream| -> &mut dyn DocumentStream { stream }).collect();
    prepared.train(plan, record, begun, streams, (&stop, telemetry))
}

/// Trains a reference model on curated documents.
pub(super) fn reference(arguments: &ReferenceArguments) -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    let broker = arguments.broker.broker()?;
    let telemetry = arguments.output.telemetry()?;
    let broker = broker.observed(telemetry.clone());
    let tokenizer = TextTokenizer::read(&arguments.tokenizer)?;
    let prepared = Prepared::new(&arguments.model, &arguments.optimization, &arguments.output, &tokenizer)?;
    let decoder = Decoder::new(TopicKind::Documents, tokenizer.fingerprint(), tokenizer.vocabulary());
    let extent = Extent::UntilEnd { epochs: 1 };
    let mut topic = KafkaStream::open(broker, &arguments.topic, extent, decoder, Arc::clone(&stop))?;
    telemetry.enter(Stage::Data);
    let mut documents = Vec::new();
    while let Some(document) = topic.next_document()? {
        documents.push(document);
    }
    drop(topic);
    let tokens: usize = documents.iter().map(|document| document.tokens().len()).sum();
    tracing::info!(documents = documents.len(), tokens, "read the curated documents");
    let seed = arguments.optimization.seed;
    let stream = ShuffledDocuments::new(documents, arguments.epochs, seed, Arc::clone(&stop));
    let batches = count_batches(&mut stream.clone(), arguments.optimization.shape())?;
    let whole = batches.div_ceil(arguments.optimization.accumulate as u64);
    let steps = arguments.steps.map_or(whole, |steps| steps.min(whole));
    let mut settings = stream_settings(&arguments.topic, &arguments.broker);
    settings["extent"] = json!({ "until_end": { "epochs": arguments.epochs } });
    settings["documents"] = stream.documents().into();
    settings["tokens"] = tokens.into();
    let plan = prepared.plan(Objective::Clm, steps, 0)?;
    let record = prepared.record("reference", &plan, [("stream", settings)].into())?;
    let begun = prepared.begun(&record, 1)?;
    let read = begun.as_ref().map_or(0, |begun| begun.snapshot.ranks[0].position.documents);
    telemetry.enter(Stage::Setup);
    prepared.train(plan, record, begun, vec![&mut stream.after(read)], (&stop, telemetry))
}

/// What both commands set up before they open a stream, so that a wrong flag is found at once.
struct Prepared<'a> {
    learner: BurnLearner,
    tokenizer: &'a TextTokenizer,
    evals: Vec<crate::evaluate::EvalSet>,
    folder: RunFolder,
    /// The checkpoint to go on from.
    checkpoint: Option<PathBuf>,
    optimization: &'a OptimizationArguments,
    output: &'a OutputArguments,
    precision: Precision,
}

/// A run to go on with.
struct Begun {
    reached: Reached,
    snapshot: Snapshot,
    reference_model: Option<Fingerprint>,
}

impl<'a> Prepared<'a> {
    fn new(
        model: &ModelArguments,
        optimization: &'a OptimizationArguments,
        output: &'a OutputArguments,
        tokenizer: &'a TextTokenizer,
    ) -> anyhow::Result<Self> {
        optimization.packing()?;
        let evals = read_sets(&output.evals, tokenizer, optimization.shape())?;
        if let Some(name) =
            output.token_losses.iter().find(|&name| !output.evals.iter().any(|file| file.name == *name))
        {
            let error = format!("--token-losses {name} names no evaluation set: give --eval {name}=FILE too");
            return Err(Failure::Usage(error).into());
        }
        let OptimizationArguments { sequence_length, seed, .. } = *optimization;
        let optimizer = optimization.optimizer();
        let (mut folder, checkpoint, learner) = if output.resume && output.out.is_dir() {
            let resumed = RunFolder::resume(&output.out);
            let (folder, checkpoint) =
                if resumed.as_ref().is_err_and(passes) { resumed } else { resumed.or_data() }?;
            let learner = match &checkpoint {
                Some(checkpoint) => model.resumed(checkpoint, tokenizer, sequence_length, optimizer)?,
                None => model.learner(tokenizer, sequence_length, optimizer, seed)?,
            };
            (folder, checkpoint, learner)
        } else {
            // Before the folder is made, so that a wrong flag leaves nothing behind.
            let learner = model.learner(tokenizer, sequence_length, optimizer, seed)?;
            let created = RunFolder::create(&output.out);
            let folder = if created.as_ref().is_err_and(is_held) { created } else { created.or_usage() }?;
            (folder, None, learner)
        };
        folder.keep_checkpoints(output.checkpoints_keep);
        folder.keep_token_losses(&output.token_losses);
        if output.log_documents {
            folder.open_documents()?;
        }
        Ok(Self {
            learner,
            tokenizer,
            evals,
            folder,
            checkpoint,
            optimization,
            output,
            precision: model.compute.precision,
        })
    }

    /// Gives the learner the history that its score looks at: as it was in the checkpoint, where there is one.
    fn give_history(&mut self, selection: &SelectionArguments) -> anyhow::Result<()> {
        selection.give_history(&mut self.learner)?;
        match &self.checkpoint {
            Some(checkpoint) => self.learner.load(checkpoint).or_data(),
            None => Ok(()),
        }
    }

    fn plan(&self, objective: Objective, steps: u64, shuffle_buffer: usize) -> anyhow::Result<Plan> {
        let OptimizationArguments { seed, accumulate, .. } = *self.optimization;
        Ok(Plan {
            objective,
            schedule: self.optimization.schedule(steps)?,
            shape: self.optimization.shape(),
            packing: self.optimization.packing()?,
            accumulate,
            shuffle_buffer,
            seed,
            eval_every: self.output.eval_every,
            checkpoint_every: self.output.checkpoint_every,
        })
    }

    /// The run that the checkpoint belongs to, if it is the one that `record` describes; its data for `world_size` ranks.
    fn begun(&self, record: &RunRecord, world_size: usize) -> anyhow::Result<Option<Begun>> {
        let Some(checkpoint) = &self.checkpoint else { return Ok(None) };
        let (state, snapshot) = State::read(checkpoint).or_data()?;
        let is_whole = snapshot.check_ids(self.tokenizer.vocabulary());
        is_whole.with_context(|| format!("{} may be damaged", checkpoint.display())).or_data()?;
        let before = self.folder.read_record().or_data()?;
        let same_world_size = state.data.world_size() == world_size;
        if let Some(difference) = before.first_difference(record, same_world_size) {
            let error = anyhow::anyhow!(
                "the run in {} was begun otherwise: {difference} differs, so it would not be the same run; give what it \
                 began with (run.json), or begin another with --init {}",
                self.output.out.display(),
                checkpoint.display()
            );
            return Err(error).or_usage();
        }
        super::say(format_args!("going on from {}", checkpoint.display()));
        let snapshot = snapshot.for_world_size(world_size);
        Ok(Some(Begun { reached: state.reached, snapshot, reference_model: before.reference_model }))
    }

    fn train(
        mut self,
        plan: Plan,
        record: RunRecord,
        begun: Option<Begun>,
        mut streams: Vec<&mut dyn DocumentStream>,
        (stop, telemetry): (&AtomicBool, Telemetry),
    ) -> anyhow::Result<()> {
        let steps = plan.schedule.steps;
        let label = if record.command == "reference" { "reference" } else { plan.objective.name() };
        // A resumed run's own record says what its reference model is.
        let step = begun.as_ref().map_or(0, |begun| begun.reached.step);
        let reference_model = begun.as_ref().and_then(|begun| begun.reference_model);
        telemetry.begin(&RunRecord { reference_model, ..record.clone() }, self.folder.path(), step);
        let training = Training {
            learner: &mut self.learner,
            // Borrowed anew, for as long as everything else here lives.
            streams: streams.iter_mut().map(|stream| -> &mut dyn DocumentStream { &mut **stream }).collect(),
            evals: &self.evals,
            tokenizer: self.tokenizer,
            folder: &mut self.folder,
            stop,
            progress: Progress::new(label, steps),
            telemetry,
            plan,
        };
        let outcome = match begun {
            Some(Begun { reached, snapshot, .. }) => training.resume(reached, snapshot)?,
            None => training.run(record)?,
        };
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
        settings: BTreeMap<&str, Value>,
    ) -> anyhow::Result<RunRecord> {
        let mut settings: BTreeMap<String, Value> =
            settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let encode = |value: serde_json::Result<Value>| value.context("cannot encode the run's settings");
        settings.insert("model".into(), encode(serde_json::to_value(self.learner.config()))?);
        settings.insert("optimizer".into(), encode(serde_json::to_value(self.optimization.optimizer()))?);
        settings.insert("packing".into(), encode(serde_json::to_value(plan.packing))?);
        settings.insert("precision".into(), encode(serde_json::to_value(self.precision))?);
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

impl RunArguments {
    fn stream_settings(&self, extent: Extent) -> Value {
        let mut settings = stream_settings(&self.topic, &self.broker);
        settings["extent"] = match extent {
            Extent::Follow => json!("follow"),
            Extent::UntilEnd { epochs } => json!({ "until_end": { "epochs": epochs } }),
        };
        settings["shuffle_buffer"] = self.shuffle_buffer.into();
        settings["world_size"] = self.world_size.into();
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

/// Whether another process has the run folder.
fn is_held(error: &anyhow::Error) -> bool {
    error.is::<Failure>()
}

/// Whether a fault of a run folder may be over when somebody tries again, as a full disk and another process are: who starts
/// the run again must not take those for wrong data.
fn passes(error: &anyhow::Error) -> bool {
    is_held(error) || error.chain().any(<dyn std::error::Error>::is::<std::io::Error>)
}
