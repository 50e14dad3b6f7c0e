//! The lines of a run's `metrics.jsonl`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::run::histogram::ScoreHistogram;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Metric {
    /// After an optimizer step.
    Step(StepMetric),
    /// After an evaluation.
    Eval(EvalMetric),
    /// The scores of a step, at every evaluation and after the first step.
    Scores(ScoresMetric),
}

/// What one optimizer step saw and did. Losses are in nats, under the model before the step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetric {
    /// Step, counted from 1.
    pub step: u64,
    /// Predictions seen so far, this step included.
    pub tokens: u64,
    /// Predictions kept so far, this step included.
    pub tokens_kept: u64,
    /// Mean loss over the kept tokens: what was minimised; absent where nothing was kept.
    pub loss: Option<f32>,
    /// Mean loss over every target of the batch.
    pub loss_all: f64,
    /// Mean loss over the kept tokens, from the same forward pass as `loss_all`.
    pub loss_selected: Option<f64>,
    /// Mean loss over the tokens that were not kept; absent where all were.
    pub loss_unselected: Option<f64>,
    /// Lowest score that was kept, higher scores being kept first (so a low reference loss is a high score); absent
    /// where no score decided.
    pub threshold: Option<f32>,
    /// Tokens kept.
    pub kept: u64,
    /// Tokens to choose from.
    pub scored: u64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global L2 norm of the gradient before clipping.
    pub gradient_norm: f32,
    /// Wall time of the step, with the wait for its data and without evaluations.
    pub seconds: f64,
    /// Part of `seconds` spent waiting for documents.
    pub data_wait_seconds: f64,
    /// CPU time of the process over `seconds`, to a hundredth of a second.
    #[serde(default)]
    pub cpu_seconds: f64,
    /// Kept and scored tokens by source of the document.
    pub sources: BTreeMap<String, SourceCount>,
    /// Digest of the step's micro-batches as the feed made them: equal for all trainers that read the same data by the same
    /// plan. Absent in runs of before there was one.
    #[serde(default)]
    pub data: String,
    /// Digest over the token ids, the kept positions and the bits of all losses: two steps with one digest saw and
    /// did the same.
    pub digest: String,
}

/// Tokens of one source in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceCount {
    /// Tokens kept.
    pub kept: u64,
    /// Tokens to choose from.
    pub scored: u64,
}

/// The loss on one evaluation set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalMetric {
    /// Steps done; 0 before the first.
    pub step: u64,
    /// Predictions seen so far in training.
    pub tokens: u64,
    /// Name of the set.
    pub set: String,
    /// Mean loss in nats per predicted token.
    pub loss: f64,
    /// Tokens predicted.
    pub predictions: u64,
    /// Share of the documents of which the model is sure: it gives each token that is predicted a probability above one half,
    /// so that greedy decoding would write them. Absent where the set's documents have no context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sure: Option<f64>,
}

/// How often which score occurred in one step, where scores decide.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoresMetric {
    /// The step, counted from 1.
    pub step: u64,
    /// Counts.
    #[serde(flatten)]
    pub histogram: ScoreHistogram,
}

/// Reads `metrics.jsonl`; a last line cut short by a crash is left out.
pub(crate) fn read_metrics(path: &Path) -> anyhow::Result<Vec<Metric>> {
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
