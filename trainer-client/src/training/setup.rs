//! A run put together from what is asked for, by whatever front end asks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use serde_json::{Value, json};
use sluice_feed::feed::Feed;
use sluice_feed::plan::Plan as FeedPlan;
use sluice_feed::snapshot::Snapshot;

use super::evaluate::{EvalFile, EvalSet, read_sets};
use super::learner::Learner;
use super::{Ending, Outcome, Plan, Training};
use crate::failure::{Classify, Failure};
use crate::run::checkpoints::{DataState, Reached, STATE_FILE, damaged, read_state};
use crate::run::folder::{RUN_FILE, RunFolder, is_locked, recorded, refuse_a_run};
use crate::run::record::RunRecord;
use crate::text::{Bounds, TextTokenizer};
use crate::watch::progress::Progress;
use crate::watch::telemetry::Telemetry;

/// What is written down, where, and how often is looked.
#[derive(Clone, Debug)]
pub struct Output {
    /// Folder of the run.
    pub folder: PathBuf,
    /// Whether a run that is there is gone on with.
    pub resume: bool,
    /// Held-out sets.
    pub evals: Vec<EvalFile>,
    /// Name of the token that their texts begin with.
    pub begin_with: Option<String>,
    /// Name of the token that their texts end with.
    pub end_with: Option<String>,
    /// Sets of which every loss is written down.
    pub token_losses: Vec<String>,
    /// Whether it is written down which documents each step learnt from.
    pub log_documents: bool,
    /// Checkpoints to keep.
    pub checkpoints_keep: usize,
    /// Steps between evaluations.
    pub eval_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// The set by whose loss the best checkpoint is kept.
    pub best_by: Option<String>,
    /// The checkpoint of another run that this one begins with.
    pub branch_from: Option<PathBuf>,
    /// Whether event files are written for `TensorBoard`.
    pub tensorboard: bool,
}

impl Output {
    /// The tokens around each text.
    pub fn bounds(&self, tokenizer: &TextTokenizer) -> anyhow::Result<Bounds> {
        Bounds::named(tokenizer, self.begin_with.as_deref(), self.end_with.as_deref()).or_usage()
    }

    /// Refuses what can be seen to be wrong before anything is opened: a file that is not there, a folder that is taken.
    pub fn check(&self) -> anyhow::Result<()> {
        if let Some(name) =
            self.token_losses.iter().find(|&name| !self.evals.iter().any(|file| file.name == *name))
        {
            let error = format!("--token-losses {name} names no evaluation set: give --eval {name}=FILE too");
            return Err(Failure::Usage(error).into());
        }
        if let Some(name) =
            self.best_by.iter().find(|&name| !self.evals.iter().any(|file| file.name == *name))
        {
            let error = format!("--keep-best {name} names no evaluation set: give --eval {name}=FILE too");
            return Err(Failure::Usage(error).into());
        }
        for file in &self.evals {
            let opened = std::fs::File::open(&file.path);
            opened
                .with_context(|| format!("cannot read evaluation set {}", file.path.display()))
                .or_usage()?;
        }
        if let Some(source) = &self.branch_from
            && !source.join(STATE_FILE).is_file()
        {
            let error = format!(
                "{} holds no {STATE_FILE}: give a checkpoint of a run to --branch-from, or weights alone to --init",
                source.display()
            );
            return Err(Failure::Usage(error).into());
        }
        // Of a folder that another process writes to, that is what is said, once it is opened.
        if self.resume || is_locked(&self.folder) { Ok(()) } else { refuse_a_run(&self.folder).or_usage() }
    }
}

/// Settings of a run that are for `run.json` alone: they decide its steps, but nothing here looks into them.
#[derive(Clone, Debug)]
pub struct Described {
    /// The command that makes the run.
    pub command: &'static str,
    /// Whatever else there is to know, by name.
    pub settings: BTreeMap<String, Value>,
}

/// A model, its folder and its held-out sets, before a stream is opened, so that a wrong setting is found at once.
pub struct Setup<'a, L> {
    /// The model.
    pub learner: L,
    tokenizer: &'a TextTokenizer,
    evals: Vec<EvalSet>,
    folder: RunFolder,
    /// The checkpoint to go on from.
    checkpoint: Option<PathBuf>,
    output: Output,
}

/// A run to go on with.
pub struct Begun {
    reached: Reached,
    data: DataState,
    /// What `run.json` says of it, or should say where it `is_new`: of a branch, or of a run that was made longer.
    record: RunRecord,
    is_new: bool,
}

impl Begun {
    /// Where its data stands.
    pub fn feed(&self) -> &Snapshot {
        &self.data.feed
    }
}

impl<'a, L: Learner> Setup<'a, L> {
    /// Reads the held-out sets, which are measured in batches of `rows`, opens the folder and makes the model, by `learner`,
    /// which is given the checkpoint that a run goes on from.
    pub fn new(
        tokenizer: &'a TextTokenizer,
        rows: usize,
        output: Output,
        learner: impl FnOnce(Option<&Path>) -> anyhow::Result<L>,
    ) -> anyhow::Result<Self> {
        output.check()?;
        let bounds = output.bounds(tokenizer)?;
        let evals = read_sets(&output.evals, tokenizer, bounds, rows)?;
        let (mut folder, checkpoint, learner) = if output.resume && output.folder.is_dir() {
            let resumed = RunFolder::resume(&output.folder);
            let (mut folder, mut checkpoint) =
                if resumed.as_ref().is_err_and(passes) { resumed } else { resumed.or_data() }?;
            if let (None, Some(source)) = (&checkpoint, &output.branch_from) {
                checkpoint = Some(folder.adopt(source)?);
            }
            let learner = learner(checkpoint.as_deref())?;
            (folder, checkpoint, learner)
        } else {
            // Before the folder is made, so that a wrong setting leaves nothing behind.
            let learner = learner(output.branch_from.as_deref())?;
            let created = RunFolder::create(&output.folder);
            let mut folder = if created.as_ref().is_err_and(is_held) { created } else { created.or_usage() }?;
            let checkpoint = output.branch_from.as_deref().map(|source| folder.adopt(source)).transpose()?;
            (folder, checkpoint, learner)
        };
        folder.keep_checkpoints(output.checkpoints_keep);
        folder.keep_token_losses(&output.token_losses);
        if output.log_documents {
            folder.open_documents()?;
        }
        Ok(Self { learner, tokenizer, evals, folder, checkpoint, output })
    }

    /// The run's folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The checkpoint to go on from.
    pub fn checkpoint(&self) -> Option<&Path> {
        self.checkpoint.as_deref()
    }

    /// `run.json` of the run.
    pub fn record(&self, described: Described, plan: &Plan, feed: &FeedPlan) -> anyhow::Result<RunRecord> {
        let Described { command, mut settings } = described;
        let packing = serde_json::to_value(feed.packing).context("cannot encode the run's settings")?;
        settings.insert("packing".into(), packing);
        settings.insert("eval_every".into(), self.output.eval_every.into());
        settings.insert("checkpoint_every".into(), self.output.checkpoint_every.into());
        let evals = self.output.evals.iter().zip(&self.evals).map(|(file, set)| {
            json!({ "name": set.name, "file": file.path, "documents": set.documents(), "predictions": set.predictions() })
        });
        settings.insert("evals".into(), evals.collect());
        let (_, librdkafka) = rdkafka::util::get_rdkafka_version();
        let versions = [("sluice-train", env!("CARGO_PKG_VERSION").to_owned()), ("librdkafka", librdkafka)];
        Ok(RunRecord {
            command: command.to_owned(),
            objective: plan.objective.clone(),
            seed: plan.seed,
            batch_size: feed.shape.rows,
            accumulate: feed.micro_batches,
            sequence_length: feed.shape.len,
            schedule: plan.schedule,
            tokenizer: self.tokenizer.fingerprint(),
            reference_model: None,
            initial_weights: self.learner.digest()?,
            settings,
            versions: versions.into_iter().map(|(name, version)| (name.to_owned(), version)).collect(),
        })
    }

    /// The run that the checkpoint belongs to, if it is the one that `record` describes.
    pub fn begun(&self, record: &RunRecord) -> anyhow::Result<Option<Begun>> {
        let Some(checkpoint) = &self.checkpoint else { return Ok(None) };
        let (reached, data) = read_state(checkpoint).or_data()?;
        let vocabulary = self.tokenizer.vocabulary();
        let may_be_damaged = || damaged(checkpoint);
        data.feed.check(vocabulary).with_context(may_be_damaged).or_data()?;
        if !data.picture.fits(vocabulary) {
            let error = anyhow::anyhow!("the token picture holds token ids beyond the vocabulary");
            return Err(error).with_context(may_be_damaged).or_data();
        }
        let Some(before) = recorded(&self.output.folder).or_data()? else {
            let Some(source) = &self.output.branch_from else {
                return Err(anyhow::anyhow!("{RUN_FILE} is missing")).with_context(may_be_damaged).or_data();
            };
            // The feed refuses what would not be the same data.
            let mut record =
                RunRecord { reference_model: data.feed.identity.reference_model, ..record.clone() };
            let from = json!({ "checkpoint": source, "step": reached.step });
            record.settings.insert("branched_from".into(), from);
            return Ok(Some(Begun { reached, data, record, is_new: true }));
        };
        if let Some(difference) = before.first_difference(record, reached.step) {
            let error = anyhow::anyhow!(
                "the run in {} was begun otherwise: {difference} differs, so it would not be the same run; give what it \
                 began with (run.json), or begin another with --init {}",
                self.output.folder.display(),
                checkpoint.display()
            );
            return Err(error).or_usage();
        }
        let is_new = before.schedule != record.schedule;
        let record = RunRecord { schedule: record.schedule, ..before };
        Ok(Some(Begun { reached, data, record, is_new }))
    }

    /// Trains to the end of the run.
    pub fn train(
        mut self,
        plan: Plan,
        record: RunRecord,
        begun: Option<Begun>,
        feed: Feed,
        (stop, telemetry): (&AtomicBool, Telemetry),
    ) -> anyhow::Result<Outcome> {
        let steps = plan.schedule.steps;
        let label = if record.command == "reference" { "reference" } else { plan.objective.name() };
        // A resumed run's own record says what its reference model is.
        let step = begun.as_ref().map_or(0, |begun| begun.reached.step);
        let reference_model = begun.as_ref().and_then(|begun| begun.record.reference_model);
        if let Some(Begun { record, is_new: true, .. }) = &begun {
            self.folder.write_record(record)?;
        }
        if self.output.tensorboard {
            self.folder.open_events(step)?;
        }
        telemetry.begin(&RunRecord { reference_model, ..record.clone() }, self.folder.path(), step);
        let training = Training {
            learner: &mut self.learner,
            feed,
            evals: &self.evals,
            tokenizer: self.tokenizer,
            folder: &mut self.folder,
            stop,
            progress: Progress::new(label, steps),
            telemetry,
            plan,
        };
        match begun {
            Some(Begun { reached, data, .. }) => training.resume(reached, data.sources, data.picture),
            None => training.run(record),
        }
    }
}

impl Outcome {
    /// How a run of `steps` steps ended, in a sentence.
    pub fn sentence(&self, steps: u64, folder: &Path) -> String {
        let why = match self.ending {
            Ending::Finished => "all steps done",
            Ending::StreamEnded => {
                "the stream ended first; give --epochs for more passes, or --follow to wait"
            }
            Ending::Stopped => "stopped by a signal",
        };
        format!(
            "{} of {steps} steps, {} tokens seen, {} learnt from: {why}; the run is in {}",
            self.steps,
            self.tokens,
            self.tokens_kept,
            folder.display()
        )
    }
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
