//! The folder of a run: what was asked for (`run.json`), what happened (`metrics.jsonl`), what was thought of a
//! few tokens (`tokens.json`), and checkpoints.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use sluice_feed::batch::PackedBatch;
use sluice_feed::cut::Piece;

use crate::failure::Failure;
use crate::run::checkpoints::{
    Best, CHECKPOINTS, DataState, Reached, adopt_checkpoint, damaged, latest_checkpoint, remove_others,
    write_checkpoint,
};
use crate::run::files::{read_json, write_json, write_whole};
use crate::run::metrics::{EvalMetric, Metric, read_metrics};
use crate::run::picture::TokenPicture;
use crate::run::record::RunRecord;
use crate::run::tensorboard::EventFile;
use crate::run::token_losses;
use crate::text::TextTokenizer;
use crate::training::learner::Learner;

/// What was asked for.
pub const RUN_FILE: &str = "run.json";
/// What happened, a line per step and per evaluation.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The token picture.
pub const TOKENS_FILE: &str = "tokens.json";
/// Which documents each micro-batch was made of, where that was asked for.
pub const DOCUMENTS_FILE: &str = "documents.jsonl";

/// Held locked by the process that writes the run.
const LOCK_FILE: &str = "lock";

/// What `run.json` in a folder says, if there is one.
pub fn recorded(folder: &Path) -> anyhow::Result<Option<RunRecord>> {
    let path = folder.join(RUN_FILE);
    if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
}

/// Whether a process is writing a run into a folder.
pub fn is_locked(path: &Path) -> bool {
    let lock = File::open(path.join(LOCK_FILE));
    lock.is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Refuses a folder that already holds a run.
pub fn refuse_a_run(path: &Path) -> anyhow::Result<()> {
    // A run that was refused before its first step has left an empty file of metrics, which is in nobody's way.
    let has_metrics = fs::metadata(path.join(METRICS_FILE)).is_ok_and(|file| file.len() > 0);
    if path.join(RUN_FILE).exists() || path.join(TOKENS_FILE).exists() || has_metrics {
        bail!("{} already holds a run; remove it or give another --out", path.display());
    }
    Ok(())
}

/// A run folder being written.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    metrics: File,
    /// Open where the run writes down its documents.
    documents: Option<File>,
    /// Names of the evaluation sets whose every loss is written down.
    token_losses: Vec<String>,
    checkpoints_kept: usize,
    /// Step of the last checkpoint that this run wrote.
    saved_step: Option<u64>,
    /// The best checkpoint, where one is kept.
    best: Option<Best>,
    /// The last step that was evaluated, and the loss on each set.
    evaluated: (u64, BTreeMap<String, f64>),
    /// Open where the run writes event files for `TensorBoard`.
    events: Option<EventFile>,
    /// The operating system lets go of the lock when the process ends, however it ends.
    _lock: File,
}

impl RunFolder {
    /// Creates the folder and locks it for as long as the value lives. One that already holds a run, or a part of
    /// one, is refused: two runs never mix.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let checkpoints = path.join(CHECKPOINTS);
        fs::create_dir_all(&checkpoints)
            .with_context(|| format!("cannot create {}", checkpoints.display()))?;
        // Before anything is looked at: what another process writes here now is not to be judged, or removed.
        let lock = lock(path)?;
        refuse_a_run(path)?;
        let mut left = fs::read_dir(&checkpoints)
            .with_context(|| format!("cannot list checkpoints in {}", checkpoints.display()))?;
        if left.next().is_some() {
            bail!(
                "{} holds checkpoints of an earlier run; remove them or give another --out",
                checkpoints.display()
            );
        }
        let metrics = path.join(METRICS_FILE);
        let file = File::create(&metrics).with_context(|| format!("cannot create {}", metrics.display()))?;
        let path = path.to_owned();
        Ok(Self {
            path,
            metrics: file,
            documents: None,
            token_losses: vec![],
            checkpoints_kept: 2,
            saved_step: None,
            best: None,
            evaluated: Default::default(),
            events: None,
            _lock: lock,
        })
    }

    /// Opens a folder to go on with the run in it, and locks it. What was written down after the last checkpoint is cut
    /// off, as those steps will be taken again; without any checkpoint, so is everything, and `None` comes with it.
    /// A folder that is not there is created.
    pub fn resume(path: &Path) -> anyhow::Result<(Self, Option<PathBuf>)> {
        let checkpoints = path.join(CHECKPOINTS);
        fs::create_dir_all(&checkpoints)
            .with_context(|| format!("cannot create {}", checkpoints.display()))?;
        let lock = lock(path)?;
        let checkpoint = latest_checkpoint(path)?;
        let read = |checkpoint: &Path| Reached::read(checkpoint).with_context(|| damaged(checkpoint));
        let last_step = checkpoint.as_deref().map(read).transpose()?.map(|reached| reached.step);
        if last_step.is_none() {
            remove_if_there(&path.join(RUN_FILE))?;
            remove_if_there(&path.join(TOKENS_FILE))?;
        }
        let metrics = path.join(METRICS_FILE);
        cut_lines(&metrics, last_step)?;
        cut_lines(&path.join(DOCUMENTS_FILE), last_step)?;
        token_losses::cut(path, last_step)?;
        let file = append_to(&metrics)?;
        let best = if last_step.is_some() { Best::read(path)? } else { None };
        let evaluated = (last_step.unwrap_or(0), evaluated_at(&metrics, last_step)?);
        let path = path.to_owned();
        let run = Self {
            path,
            best,
            evaluated,
            events: None,
            metrics: file,
            documents: None,
            token_losses: vec![],
            checkpoints_kept: 2,
            saved_step: last_step,
            _lock: lock,
        };
        Ok((run, checkpoint))
    }

    /// Takes over a checkpoint of another run, to go on from.
    pub fn adopt(&mut self, source: &Path) -> anyhow::Result<PathBuf> {
        let step = Reached::read(source)?.step;
        let adopted = adopt_checkpoint(&self.path, source, step)?;
        self.saved_step = Some(step);
        Ok(adopted)
    }

    /// From here on writes `TensorBoard` event files too; what an earlier one says of steps after `step` is void.
    pub fn open_events(&mut self, step: u64) -> anyhow::Result<()> {
        self.events = Some(EventFile::create(&self.path, step)?);
        Ok(())
    }

    /// Keeps this many of the last checkpoints, at least one.
    pub fn keep_checkpoints(&mut self, count: usize) {
        self.checkpoints_kept = count.max(1);
    }

    /// From here on writes down which documents each micro-batch is made of.
    pub fn open_documents(&mut self) -> anyhow::Result<()> {
        self.documents = Some(append_to(&self.path.join(DOCUMENTS_FILE))?);
        Ok(())
    }

    /// Writes down which pieces of which documents a step's micro-batches are made of, if that was asked for.
    pub fn log_documents(&mut self, step: u64, batch: &[PackedBatch]) -> anyhow::Result<()> {
        let Some(file) = &mut self.documents else { return Ok(()) };
        let mut lines = Vec::new();
        for packed in batch {
            let pieces: Vec<PieceLine<'_>> = packed.rows.iter().flatten().map(PieceLine::of).collect();
            let line = DocumentsLine { step, lane: packed.lane, pieces };
            serde_json::to_writer(&mut lines, &line).context("cannot encode a list of documents")?;
            lines.push(b'\n');
        }
        let written = file.write_all(&lines);
        written.with_context(|| format!("cannot write {}", self.path.join(DOCUMENTS_FILE).display()))
    }

    /// From here on writes down the loss of every token of these evaluation sets at each evaluation.
    pub fn keep_token_losses(&mut self, sets: &[String]) {
        self.token_losses = sets.to_vec();
    }

    /// Writes down the losses of a set (by number and name) after a step, if that was asked for.
    pub fn log_token_losses(&self, set: (usize, &str), step: u64, losses: &[f32]) -> anyhow::Result<()> {
        if self.token_losses.iter().any(|name| name == set.1) {
            token_losses::write(&self.path, set, step, losses)?;
        }
        Ok(())
    }

    /// The loss on a set after a step, where that was the last step that was evaluated.
    pub fn evaluated(&self, step: u64, set: &str) -> Option<f64> {
        let (last, losses) = &self.evaluated;
        losses.get(set).copied().filter(|_| *last == step)
    }

    /// The best checkpoint so far.
    pub fn best(&self) -> Option<&Best> {
        self.best.as_ref()
    }

    /// Keeps a checkpoint that is there, beside the last ones, until there is a better one.
    pub fn keep_best(&mut self, best: Best) -> anyhow::Result<()> {
        best.write(&self.path)?;
        self.best = Some(best);
        remove_others(&self.path, self.checkpoints_kept, self.best.as_ref())
    }

    /// The step of the checkpoint that this run was resumed from, or wrote last.
    pub fn saved_step(&self) -> Option<u64> {
        self.saved_step
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads `run.json`.
    pub fn read_record(&self) -> anyhow::Result<RunRecord> {
        read_json(&self.path.join(RUN_FILE))
    }

    /// Writes `run.json`.
    pub fn write_record(&self, record: &RunRecord) -> anyhow::Result<()> {
        write_json(&self.path.join(RUN_FILE), record)
    }

    /// Writes `tokens.json`.
    pub fn write_picture(&self, picture: &TokenPicture) -> anyhow::Result<()> {
        write_json(&self.path.join(TOKENS_FILE), picture)
    }

    /// Adds a line to `metrics.jsonl`; it can be read at once.
    pub fn log(&mut self, metric: &Metric) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(metric).context("cannot encode a metric")?;
        line.push(b'\n');
        // In one write, so that a reader or a crash rarely sees half a line.
        let written = self.metrics.write_all(&line);
        written.with_context(|| format!("cannot write {}", self.path.join(METRICS_FILE).display()))?;
        if let Some(events) = &mut self.events {
            events.write(metric)?;
        }
        if let Metric::Eval(EvalMetric { step, set, loss, .. }) = metric {
            if self.evaluated.0 != *step {
                self.evaluated = (*step, BTreeMap::new());
            }
            self.evaluated.1.insert(set.clone(), *loss);
        }
        Ok(())
    }

    /// Writes a checkpoint, removes all but the last few, and says where it is. The step that was saved last is not
    /// saved again.
    pub fn checkpoint(
        &mut self,
        learner: &dyn Learner,
        tokenizer: &TextTokenizer,
        reached: &Reached,
        data: &DataState,
    ) -> anyhow::Result<PathBuf> {
        // A checkpoint must not outlive the lines that lead up to it.
        for file in [Some(&self.metrics), self.documents.as_ref()].into_iter().flatten() {
            file.sync_data().with_context(|| format!("cannot write to disk in {}", self.path.display()))?;
        }
        let is_saved = self.saved_step == Some(reached.step);
        let kept = self.checkpoints_kept;
        let kept = (kept, self.best.as_ref());
        let folder = write_checkpoint(&self.path, kept, is_saved, (learner, tokenizer), reached, data)?;
        self.saved_step = Some(reached.step);
        Ok(folder)
    }
}

/// A line of `documents.jsonl`.
#[derive(Serialize)]
struct DocumentsLine<'a> {
    step: u64,
    lane: usize,
    pieces: Vec<PieceLine<'a>>,
}

/// Some tokens of a document, from the `start`-th on, of which those from the `predicted_from`-th of the document on are
/// predicted.
#[derive(Serialize)]
struct PieceLine<'a> {
    document: &'a str,
    start: usize,
    tokens: usize,
    predicted_from: usize,
}

impl<'a> PieceLine<'a> {
    fn of(piece: &'a Piece) -> Self {
        let tokens = piece.document.tokens().len();
        let predicted_from = piece.start + piece.first_predicted;
        Self { document: piece.document.id(), start: piece.start, tokens, predicted_from }
    }
}

/// The step that a line of any kind belongs to.
#[derive(Deserialize)]
struct StepOnly {
    step: u64,
}

/// Cuts off the lines after a step, and half a line at the end; everything where there is no step. What is not there
/// has no lines.
fn cut_lines(path: &Path, last_step: Option<u64>) -> anyhow::Result<()> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut kept = Vec::new();
    for line in bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")) {
        let step = serde_json::from_slice::<StepOnly>(line)
            .with_context(|| format!("{} holds a line that no run writes there", path.display()))?
            .step;
        if last_step.is_some_and(|last| step <= last) {
            kept.extend_from_slice(line);
        }
    }
    if kept.len() < bytes.len() {
        write_whole(path, &kept)?;
    }
    Ok(())
}

/// The losses that were written down after a step, by evaluation set.
fn evaluated_at(metrics: &Path, step: Option<u64>) -> anyhow::Result<BTreeMap<String, f64>> {
    if step.is_none() || !metrics.exists() {
        return Ok(BTreeMap::new());
    }
    let evals = read_metrics(metrics)?.into_iter().filter_map(|metric| match metric {
        Metric::Eval(eval) if Some(eval.step) == step => Some((eval.set, eval.loss)),
        _ => None,
    });
    Ok(evals.collect())
}

fn append_to(path: &Path) -> anyhow::Result<File> {
    let file = File::options().create(true).append(true).open(path);
    file.with_context(|| format!("cannot open {}", path.display()))
}

fn remove_if_there(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Locks a run folder for this process.
fn lock(run: &Path) -> anyhow::Result<File> {
    let path = run.join(LOCK_FILE);
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let error = format!(
                "another process is writing a run into {}; wait for its end, or give another --out",
                run.display()
            );
            Err(Failure::Unavailable(error).into())
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| {
            format!("cannot lock {}; give an --out on a file system that has locks", path.display())
        }),
    }
}
