//! The folder of a run: what was asked for (`run.json`), what happened (`metrics.jsonl`), what was thought of a
//! few tokens (`tokens.json`), and checkpoints.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use sluice_schemas::fingerprint::Fingerprint;

use crate::learner::Learner;
use crate::metrics::Metric;
use crate::picture::TokenPicture;
use crate::schedule::Schedule;
use crate::select::{Objective, Thresholds};
use crate::stream::Position;
use crate::text::TextTokenizer;

/// What was asked for.
pub const RUN_FILE: &str = "run.json";
/// What happened, a line per step and per evaluation.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The token picture.
pub const TOKENS_FILE: &str = "tokens.json";
/// Checkpoints, a folder each.
pub const CHECKPOINTS: &str = "checkpoints";
/// The tokenizer beside each checkpoint.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The run's progress beside each checkpoint.
pub const STATE_FILE: &str = "state.json";

/// Held locked by the process that writes the run.
const LOCK_FILE: &str = "lock";
/// Name of a model's weights file, which [`Learner::save`] writes.
const WEIGHTS_FILE: &str = "model.safetensors";
/// Checkpoints kept; older ones are removed.
const CHECKPOINTS_KEPT: usize = 2;

/// The content of `run.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunRecord {
    /// The command that made the run: `run` or `reference`.
    pub command: String,
    /// What is minimised.
    pub objective: Objective,
    /// Seed of initial weights, shuffles and random draws.
    pub seed: u64,
    /// Sequences in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in an optimizer step.
    pub accumulate: usize,
    /// Tokens in a sequence.
    pub sequence_length: usize,
    /// The learning rate over the run, and its length in steps.
    pub schedule: Schedule,
    /// Fingerprint of the tokenizer.
    pub tokenizer: Fingerprint,
    /// Fingerprint of the model that made the reference losses; absent without such losses.
    pub reference_model: Option<Fingerprint>,
    /// Digest of the weights file before the first step: equal for runs that started alike.
    pub initial_weights: Fingerprint,
    /// The rest of the settings, for people: model, optimizer, stream.
    pub settings: BTreeMap<String, serde_json::Value>,
    /// Versions of what ran.
    pub versions: BTreeMap<String, String>,
}

/// The content of a checkpoint's `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Predictions seen.
    pub tokens: u64,
    /// Predictions kept.
    pub tokens_kept: u64,
    /// How far the stream has been read; up to a batch of it may wait in the packer.
    pub position: Position,
    /// Running thresholds of the selection.
    pub thresholds: Thresholds,
}

/// A run folder being written.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    metrics: File,
    /// Step of the last checkpoint that this run wrote.
    saved_step: Option<u64>,
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
        // A run that was refused before its first step has left an empty file of metrics, which is in nobody's way.
        let has_metrics = fs::metadata(path.join(METRICS_FILE)).is_ok_and(|file| file.len() > 0);
        if path.join(RUN_FILE).exists() || path.join(TOKENS_FILE).exists() || has_metrics {
            bail!("{} already holds a run; remove it or give another --out", path.display());
        }
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
        Ok(Self { path: path.to_owned(), metrics: file, saved_step: None, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
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
        written.with_context(|| format!("cannot write {}", self.path.join(METRICS_FILE).display()))
    }

    /// Digest of the weights as [`Learner::save`] writes them now.
    pub fn digest_weights(&self, learner: &dyn Learner) -> anyhow::Result<Fingerprint> {
        let folder = self.path.join(".initial");
        recreate(&folder)?;
        learner.save(&folder)?;
        let file = folder.join(WEIGHTS_FILE);
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        Ok(Fingerprint::of_bytes(&bytes))
    }

    /// Writes a checkpoint under a temporary name, renames it, removes all but the last two, and says where it is.
    /// The step that this run saved last is not saved again.
    pub fn checkpoint(
        &mut self,
        learner: &dyn Learner,
        tokenizer: &TextTokenizer,
        state: &State,
    ) -> anyhow::Result<PathBuf> {
        let folder = self.path.join(CHECKPOINTS).join(format!("step-{:07}", state.step));
        if self.saved_step == Some(state.step) {
            return Ok(folder);
        }
        if folder.exists() {
            bail!("{} is there already, but this run has not written it; remove it", folder.display());
        }
        let partial = self.path.join(CHECKPOINTS).join(".partial");
        recreate(&partial)?;
        learner.save(&partial)?;
        write_synced(&partial.join(TOKENIZER_FILE), tokenizer.file())?;
        write_json(&partial.join(STATE_FILE), state)?;
        fs::rename(&partial, &folder)
            .with_context(|| format!("cannot rename {} into place", partial.display()))?;
        self.saved_step = Some(state.step);
        let checkpoints = checkpoints(&self.path)?;
        for old in &checkpoints[..checkpoints.len().saturating_sub(CHECKPOINTS_KEPT)] {
            fs::remove_dir_all(old)
                .with_context(|| format!("cannot remove old checkpoint {}", old.display()))?;
        }
        Ok(folder)
    }
}

/// Locks a run folder for this process.
fn lock(run: &Path) -> anyhow::Result<File> {
    let path = run.join(LOCK_FILE);
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("another process is writing a run into {}; give another --out", run.display())
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| {
            format!("cannot lock {}; give an --out on a file system that has locks", path.display())
        }),
    }
}

/// Finished checkpoints of a run, oldest first.
pub fn checkpoints(run: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let folder = run.join(CHECKPOINTS);
    let entries =
        fs::read_dir(&folder).with_context(|| format!("cannot list checkpoints in {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list checkpoints in {}", folder.display()))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-")) {
            found.push(path);
        }
    }
    // Step numbers are padded with zeros, so names sort as numbers do up to ten million steps; longer ones follow.
    found.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
    Ok(found)
}

/// The last finished checkpoint of a run.
pub fn latest_checkpoint(run: &Path) -> anyhow::Result<PathBuf> {
    let last = checkpoints(run)?.pop();
    last.with_context(|| format!("{} holds no finished checkpoint; let the run reach one", run.display()))
}

/// A run as its folder tells it.
#[derive(Clone, Debug)]
pub struct RecordedRun {
    /// Name of the folder.
    pub name: String,
    /// What was asked for.
    pub record: RunRecord,
    /// What happened, in order.
    pub metrics: Vec<Metric>,
    /// The token picture, if the run came to its end.
    pub picture: Option<TokenPicture>,
}

impl RecordedRun {
    /// Reads a run folder; a last line cut short by a crash is left out.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let absolute =
            fs::canonicalize(path).with_context(|| format!("cannot find run folder {}", path.display()))?;
        let name = absolute.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let picture = path.join(TOKENS_FILE);
        Ok(Self {
            name,
            record: read_json(&path.join(RUN_FILE))?,
            metrics: read_metrics(&path.join(METRICS_FILE))?,
            picture: if picture.exists() { Some(read_json(&picture)?) } else { None },
        })
    }
}

fn read_metrics(path: &Path) -> anyhow::Result<Vec<Metric>> {
    // Bytes, because a crash may cut the last line inside a character.
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let whole = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    let lines: Vec<&[u8]> = whole.split(|&byte| byte == b'\n').collect();
    let mut metrics = Vec::with_capacity(lines.len());
    for (number, line) in (1..).zip(&lines) {
        match serde_json::from_slice(line) {
            Ok(metric) => metrics.push(metric),
            Err(error) if number == lines.len() && error.is_eof() => {}
            Err(error) => bail!("{}, line {number} is not a metric: {error}", path.display()),
        }
    }
    Ok(metrics)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is not what a run writes there", path.display()))
}

fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut bytes =
        serde_json::to_vec_pretty(value).with_context(|| format!("cannot encode {}", path.display()))?;
    bytes.push(b'\n');
    write_synced(path, &bytes)
}

/// Writes a file and waits until it is on the disk: a rename must not overtake it.
fn write_synced(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// An empty folder, whatever an interrupted run left there.
fn recreate(folder: &Path) -> anyhow::Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}
