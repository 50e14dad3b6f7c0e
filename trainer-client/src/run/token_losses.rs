//! The loss of every token of an evaluation set, one file for each evaluation of a run: what an analysis of how single
//! tokens fare over training needs (Rho-1, arXiv 2404.07965, section 2.1).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::run::tensors::{NamedTensor, read_tensors, write_tensors};

/// Folder of these files in a run folder.
pub const TOKEN_LOSSES: &str = "token-losses";

const SET_KEY: &str = "set";
const LOSSES: &str = "losses";

/// Losses of one set at one time.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLosses {
    /// Steps done; 0 before the first.
    pub step: u64,
    /// Name of the set.
    pub set: String,
    /// Loss in nats of each predicted token, in an order that is the same at every step.
    pub losses: Vec<f32>,
}

/// Writes the losses of a set after a step; what is there of the same step is replaced.
pub(crate) fn write(run: &Path, (index, set): (usize, &str), step: u64, losses: &[f32]) -> Result<()> {
    let folder = run.join(TOKEN_LOSSES);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let tensor = NamedTensor { name: LOSSES.to_owned(), shape: vec![losses.len()], values: losses.to_vec() };
    // Sets go by number, as a name may hold what a file name must not.
    write_tensors(&folder.join(format!("step-{step:07}-set-{index}.safetensors")), &[tensor], (SET_KEY, set))
}

/// Removes what was written after a step; everything where there is none.
pub(crate) fn cut(run: &Path, last_step: Option<u64>) -> Result<()> {
    for (step, path) in files(run)? {
        if last_step.is_none_or(|last| step > last) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// All that a run has written, in the order of the steps; nothing where it was not asked to.
pub fn read(run: &Path) -> Result<Vec<TokenLosses>> {
    let mut found = Vec::new();
    for (step, path) in files(run)? {
        let (tensors, metadata) = read_tensors(&path)?;
        let whole = || Some((metadata.get(SET_KEY)?.clone(), tensors.into_iter().next()?.values));
        let (set, losses) = whole().with_context(|| format!("{} holds no losses", path.display()))?;
        found.push(TokenLosses { step, set, losses });
    }
    Ok(found)
}

fn files(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = run.join(TOKEN_LOSSES);
    if !folder.is_dir() {
        return Ok(vec![]);
    }
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let step = name.strip_suffix(".safetensors").and_then(|name| name.strip_prefix("step-"));
        if let Some(Ok(step)) = step.and_then(|name| name.split('-').next()).map(str::parse) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::{TokenLosses, cut, read, write};

    #[test]
    fn what_was_written_after_a_checkpoint_is_cut_and_the_rest_comes_back_in_order() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), []);
        for step in [20, 0, 10_000_000] {
            write(folder.path(), (1, "a/b"), step, &[step as f32, 0.5]).unwrap();
        }
        write(folder.path(), (0, "c"), 20, &[1.0]).unwrap();
        cut(folder.path(), Some(20)).unwrap();
        let entry = |step, set: &str, losses: &[f32]| TokenLosses {
            step,
            set: set.to_owned(),
            losses: losses.to_vec(),
        };
        let left = [entry(0, "a/b", &[0.0, 0.5]), entry(20, "c", &[1.0]), entry(20, "a/b", &[20.0, 0.5])];
        assert_eq!(read(folder.path()).unwrap(), left);
        cut(folder.path(), None).unwrap();
        assert_eq!(read(folder.path()).unwrap(), []);
    }
}
