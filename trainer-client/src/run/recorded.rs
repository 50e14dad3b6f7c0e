//! A run as its folder tells it, for reports and results.

use std::fs;
use std::path::Path;

use anyhow::Context;

use crate::run::files::read_json;
use crate::run::folder::{METRICS_FILE, RUN_FILE, TOKENS_FILE};
use crate::run::metrics::{EvalMetric, Metric, StepMetric, read_metrics};
use crate::run::picture::TokenPicture;
use crate::run::record::RunRecord;
use crate::run::token_losses::{self, TokenLosses};

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
    /// Losses of single tokens, where the run wrote them down.
    pub token_losses: Vec<TokenLosses>,
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
            token_losses: token_losses::read(path)?,
        })
    }

    /// Its steps, in order.
    pub fn steps(&self) -> impl Iterator<Item = &StepMetric> {
        self.metrics
            .iter()
            .filter_map(|metric| if let Metric::Step(step) = metric { Some(step) } else { None })
    }

    /// Its evaluations on all sets, in order.
    pub fn all_evals(&self) -> impl Iterator<Item = &EvalMetric> {
        self.metrics
            .iter()
            .filter_map(|metric| if let Metric::Eval(eval) = metric { Some(eval) } else { None })
    }

    /// Its evaluations on one set, in order.
    pub fn evals(&self, set: &str) -> impl Iterator<Item = &EvalMetric> {
        self.all_evals().filter(move |eval| eval.set == set)
    }
}
