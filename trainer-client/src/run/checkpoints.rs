//! Checkpoints of a run: the model and its optimizer, how far the run has come, and where its data stands.
//!
//! A checkpoint is written under another name, put on the disk, and renamed; one that has its name is whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use sluice_feed::select::Thresholds;
use sluice_feed::snapshot::Snapshot;
use sluice_feed::stream::Position;

use crate::run::files::{read_json, recreate, sync_folder, write_json, write_whole};
use crate::run::picture::PictureDocuments;
use crate::text::{TOKENIZER_FILE, TextTokenizer};
use crate::training::learner::Learner;

/// Checkpoints of a run folder, a folder each.
pub const CHECKPOINTS: &str = "checkpoints";
/// How far the run had come, in each checkpoint.
pub const STATE_FILE: &str = "state.json";

/// Where the data stands, in each checkpoint: a [`Snapshot`].
pub const FEED_FILE: &str = "feed.safetensors";

/// Which checkpoint is the best, beside them.
const BEST_FILE: &str = "best.json";

/// Name of a checkpoint that is being written.
const PARTIAL: &str = ".partial";
/// Name of a checkpoint that is being removed.
const REMOVED: &str = ".removed";

/// How far a run has come. Random draws are named by seed and step, and learning rates by the step, so this is all
/// there is to know of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reached {
    /// Steps done.
    pub step: u64,
    /// Predictions seen.
    pub tokens: u64,
    /// Predictions kept.
    pub tokens_kept: u64,
    /// Lowest score that the last step kept, where a score decided.
    pub threshold: Option<f32>,
    /// Running thresholds of the selection.
    pub thresholds: Thresholds,
}

/// The best checkpoint of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step after which it was written.
    pub step: u64,
    /// The evaluation set that says so.
    pub set: String,
    /// Its loss on that set, in nats per predicted token.
    pub loss: f64,
}

impl Best {
    /// Which it is, if one is kept.
    pub fn read(run: &Path) -> anyhow::Result<Option<Self>> {
        let path = run.join(CHECKPOINTS).join(BEST_FILE);
        if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
    }

    /// Writes down which it is; the checkpoint is there.
    pub(crate) fn write(&self, run: &Path) -> anyhow::Result<()> {
        write_json(&run.join(CHECKPOINTS).join(BEST_FILE), self)
    }

    /// Its folder.
    pub fn folder(&self, run: &Path) -> PathBuf {
        run.join(CHECKPOINTS).join(folder_name(self.step))
    }
}

/// Name of the checkpoint after a step.
fn folder_name(step: u64) -> String {
    format!("step-{step:07}")
}

/// What a run has read and looked at, beside the model: the data side of a checkpoint.
#[derive(Clone, Debug)]
pub struct DataState {
    /// Where the stream stands, and what was read and not learnt from.
    pub feed: Snapshot,
    /// Names of sources, in the order of appearance.
    pub sources: Vec<String>,
    /// Documents of the token picture.
    pub picture: PictureDocuments,
}

/// The content of a checkpoint's `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    /// How far the run had come.
    #[serde(flatten)]
    reached: Reached,
    sources: Vec<String>,
    picture: PictureDocuments,
    /// Where each partition stands, for people: what counts is in [`FEED_FILE`].
    partitions: BTreeMap<usize, Position>,
}

/// Part of `state.json` in versions that kept their data by rank.
#[derive(Deserialize)]
struct BeforeLanes {
    data: Option<IgnoredAny>,
}

impl Reached {
    /// How far the run of a checkpoint had come.
    pub fn read(checkpoint: &Path) -> anyhow::Result<Self> {
        read_json(&checkpoint.join(STATE_FILE))
    }
}

/// What to say of a checkpoint that cannot be read.
pub fn damaged(checkpoint: &Path) -> String {
    format!(
        "{0} may be damaged: remove {0}, and --resume goes on from the one before, or begin another run with --init",
        checkpoint.display()
    )
}

/// Reads a checkpoint's state, and its data.
pub fn read_state(checkpoint: &Path) -> anyhow::Result<(Reached, DataState)> {
    let file = checkpoint.join(STATE_FILE);
    if read_json::<BeforeLanes>(&file)?.data.is_some() {
        bail!(
            "{0} was written by a version of Sluice that kept the data of a run by rank, and this one keeps it by partition: \
             it cannot be gone on with; begin another run with --init {0}",
            checkpoint.display()
        );
    }
    let State { reached, sources, picture, .. } = read_json(&file).with_context(|| damaged(checkpoint))?;
    let path = checkpoint.join(FEED_FILE);
    let bytes = fs::read(&path)
        .with_context(|| format!("cannot read {}", path.display()))
        .with_context(|| damaged(checkpoint))?;
    let feed = Snapshot::from_bytes(&bytes)
        .with_context(|| format!("cannot use {}", path.display()))
        .with_context(|| damaged(checkpoint))?;
    let step = reached.step;
    if feed.step != step || step_of(checkpoint).is_some_and(|named| named != step) {
        let of = format!("{STATE_FILE} is of step {step}, {FEED_FILE} of step {}", feed.step);
        return Err(anyhow!("its files do not belong together: {of}")).with_context(|| damaged(checkpoint));
    }
    Ok((reached, DataState { feed, sources, picture }))
}

/// The step that a checkpoint's folder is named after. Everything else beside them is somebody else's: a copy that was set aside,
/// say, which must neither be gone on from nor removed.
fn step_of(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_prefix("step-")?;
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if is_number && path.is_dir() { digits.parse().ok() } else { None }
}

/// Finished checkpoints of a run, oldest first.
pub fn checkpoints(run: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let folder = run.join(CHECKPOINTS);
    let entries =
        fs::read_dir(&folder).with_context(|| format!("cannot list checkpoints in {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list checkpoints in {}", folder.display()))?.path();
        found.extend(step_of(&path).map(|step| (step, path)));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// The last finished checkpoint of a run, if it has one.
pub fn latest_checkpoint(run: &Path) -> anyhow::Result<Option<PathBuf>> {
    Ok(checkpoints(run)?.pop())
}

/// Writes a checkpoint unless it `is_saved` already, and removes all but the last `kept` and the best.
pub(crate) fn write_checkpoint(
    run: &Path,
    (kept, best): (usize, Option<&Best>),
    is_saved: bool,
    (learner, tokenizer): (&dyn Learner, &TextTokenizer),
    reached: &Reached,
    data: &DataState,
) -> anyhow::Result<PathBuf> {
    let parent = run.join(CHECKPOINTS);
    let folder = parent.join(folder_name(reached.step));
    if is_saved {
        return Ok(folder);
    }
    if folder.exists() {
        bail!("{} is there already, but this run has not written it; remove it", folder.display());
    }
    let partial = parent.join(PARTIAL);
    recreate(&partial)?;
    learner.save(&partial)?;
    write_whole(&partial.join(TOKENIZER_FILE), tokenizer.file())?;
    let DataState { feed, sources, picture } = data;
    let documents = feed.to_bytes().context("cannot lay out the documents of a checkpoint")?;
    write_whole(&partial.join(FEED_FILE), &documents)?;
    let (sources, picture, partitions) = (sources.clone(), picture.clone(), feed.positions());
    write_json(&partial.join(STATE_FILE), &State { reached: *reached, sources, picture, partitions })?;
    sync_folder(&partial)?;
    fs::rename(&partial, &folder)
        .with_context(|| format!("cannot rename {} into place", partial.display()))?;
    sync_folder(&parent)?;
    remove_others(run, kept, best)?;
    Ok(folder)
}

/// Takes over a checkpoint of another run, which has come to `step`. Its files never change, so that they can be the same.
pub(crate) fn adopt_checkpoint(run: &Path, source: &Path, step: u64) -> anyhow::Result<PathBuf> {
    let parent = run.join(CHECKPOINTS);
    let (partial, folder) = (parent.join(PARTIAL), parent.join(folder_name(step)));
    recreate(&partial)?;
    let may_fail = || format!("cannot take over {}", source.display());
    for entry in fs::read_dir(source).with_context(may_fail)? {
        let entry = entry.with_context(may_fail)?;
        let to = partial.join(entry.file_name());
        // On another file system there is no such link.
        let copied = fs::hard_link(entry.path(), &to).or_else(|_| {
            fs::copy(entry.path(), &to)?;
            fs::File::open(&to)?.sync_all()
        });
        copied.with_context(may_fail)?;
    }
    sync_folder(&partial)?;
    fs::rename(&partial, &folder)
        .with_context(|| format!("cannot rename {} into place", partial.display()))?;
    sync_folder(&parent)?;
    Ok(folder)
}

/// Removes all checkpoints but the last `kept` and the best.
pub(crate) fn remove_others(run: &Path, kept: usize, best: Option<&Best>) -> anyhow::Result<()> {
    let checkpoints = checkpoints(run)?;
    let best = best.map(|best| best.folder(run));
    for old in &checkpoints[..checkpoints.len().saturating_sub(kept)] {
        if best.as_ref() != Some(old) {
            remove(old, &run.join(CHECKPOINTS).join(REMOVED))?;
        }
    }
    Ok(())
}

/// Removes a checkpoint, which loses its name first: one that has its name is whole.
fn remove(checkpoint: &Path, removed: &Path) -> anyhow::Result<()> {
    recreate(removed)?;
    let done = fs::rename(checkpoint, removed).and_then(|()| fs::remove_dir_all(removed));
    done.with_context(|| format!("cannot remove old checkpoint {}", checkpoint.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::{CHECKPOINTS, checkpoints};

    #[test]
    fn checkpoints_sort_by_their_step_and_what_is_no_checkpoint_is_none() {
        let run = tempfile::tempdir().unwrap();
        let folder = run.path().join(CHECKPOINTS);
        let steps = ["step-0000009", "step-0000100", "step-10000000"];
        for name in steps.into_iter().chain(["step-0000100.bak", "step-0000009-good", "step-best", "step-"]) {
            std::fs::create_dir_all(folder.join(name)).unwrap();
        }
        std::fs::write(folder.join("step-0000200"), "a file").unwrap();
        let found = checkpoints(run.path()).unwrap();
        let names: Vec<_> = found.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, steps);
    }
}
