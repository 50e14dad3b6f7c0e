//! What is asked for, and where it goes.

use std::path::PathBuf;

use super::designs::Experiment;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which experiment.
    pub experiment: Experiment,
    /// Whether all is small.
    pub is_quick: bool,
    /// Settings to run, by name; all of them where none is named.
    pub settings: Vec<String>,
    /// Learning rates of each arm, of which its best is reported; the setting's own where none is given.
    pub learning_rates: Vec<f64>,
    /// A pretrained model to go on from, with its tokenizer, instead of base models that are trained.
    pub base: Option<PathBuf>,
    /// Seeds of each group; as many as the plan has where none is given.
    pub seeds: Option<u64>,
    /// Folder of the runs, which several experiments share.
    pub out: PathBuf,
    /// Folder of the results.
    pub results: PathBuf,
    /// A checkout of this repository.
    pub sources: PathBuf,
    /// The daemon, if it does not lie beside this program.
    pub daemon: Option<PathBuf>,
    /// The trainer, if it does not lie beside this program.
    pub trainer: Option<PathBuf>,
    /// A folder with GSM8K's `train.jsonl`, to evaluate on as well.
    pub gsm8k: Option<PathBuf>,
    /// The command that asked for it, for the results.
    pub command: String,
}
