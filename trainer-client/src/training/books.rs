//! The books of one optimizer step: what was kept of what, and the losses of both parts.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use sluice_feed::batch::{PackedBatch, digest_of_step};
use sluice_feed::cut::Piece;
use sluice_feed::select::{Choice, Objective};
use sluice_feed::sources::SourceNames;
use sluice_schemas::fingerprint::Fingerprint;

use crate::run::histogram::ScoreHistogram;
use crate::run::metrics::{SourceCount, StepMetric};

/// Hexadecimal digits of a step's digest.
const DIGEST_DIGITS: usize = 16;

/// Sums over the micro-batches of one step, under the model before it.
#[derive(Clone, Debug)]
pub(crate) struct Books {
    has_threshold: bool,
    selected: Mean,
    unselected: Mean,
    scored: u64,
    threshold: Option<f32>,
    sources: BTreeMap<String, SourceCount>,
    digest: Sha256,
    /// Digests of what was read.
    micro_batches: Vec<Fingerprint>,
    histogram: Option<ScoreHistogram>,
}

impl Books {
    /// Empty books for a step of this objective.
    pub fn new(objective: &Objective) -> Self {
        Self {
            has_threshold: objective.has_threshold(),
            selected: Mean::default(),
            unselected: Mean::default(),
            scored: 0,
            threshold: None,
            sources: BTreeMap::new(),
            digest: Sha256::new(),
            micro_batches: vec![],
            histogram: None,
        }
    }

    /// The same books, which also count how often which score occurs.
    pub fn counting_scores(self) -> Self {
        Self { histogram: Some(ScoreHistogram::default()), ..self }
    }

    /// Enters a micro-batch with its losses in nats and what was chosen of it, by the names of its sources.
    pub fn add(&mut self, packed: &PackedBatch, losses: &[f32], choice: &Choice, sources: &mut SourceNames) {
        let sources_of: Vec<u16> =
            packed.rows.iter().flat_map(|row| sources_of(row, packed.batch.len, sources)).collect();
        let mut counts = vec![SourceCount::default(); sources.names().len()];
        let mut kept = choice.kept.iter().map(|&index| index as usize).peekable();
        for (index, (&loss, &score)) in losses.iter().zip(&choice.scores).enumerate() {
            let is_kept = kept.next_if_eq(&index).is_some();
            if loss.is_nan() {
                continue;
            }
            let is_eligible = !score.is_nan();
            if let Some(histogram) = &mut self.histogram {
                histogram.add(score, is_kept);
            }
            if is_kept { &mut self.selected } else { &mut self.unselected }.add(loss);
            self.scored += u64::from(is_eligible);
            if is_kept && self.has_threshold {
                self.threshold = Some(self.threshold.map_or(score, |lowest| lowest.min(score)));
            }
            let count = &mut counts[usize::from(sources_of[index])];
            count.kept += u64::from(is_kept);
            count.scored += u64::from(is_eligible);
        }
        for (name, count) in sources.names().iter().zip(counts).filter(|(_, count)| count.scored > 0) {
            let sum = self.sources.entry(name.clone()).or_default();
            sum.kept += count.kept;
            sum.scored += count.scored;
        }
        self.micro_batches.push(packed.digest());
        let words = packed.batch.tokens.iter().chain(&choice.kept).copied();
        for word in words.chain(losses.iter().map(|loss| loss.to_bits())) {
            self.digest.update(word.to_le_bytes());
        }
    }

    /// Whether there was a token to choose.
    pub fn has_scored(&self) -> bool {
        self.scored > 0
    }

    /// The counts of scores, where they were asked for.
    pub fn take_scores(&mut self) -> Option<ScoreHistogram> {
        self.histogram.take()
    }

    /// What the books say of a step; the rest of the metric is 0.
    pub fn into_metric(self) -> StepMetric {
        let all = Mean {
            sum: self.selected.sum + self.unselected.sum,
            count: self.selected.count + self.unselected.count,
        };
        let digest = format!("{:x}", self.digest.finalize());
        StepMetric {
            step: 0,
            tokens: 0,
            tokens_kept: 0,
            loss: None,
            loss_all: all.get().unwrap_or(0.0),
            loss_selected: self.selected.get(),
            loss_unselected: self.unselected.get(),
            threshold: self.threshold,
            kept: self.selected.count,
            scored: self.scored,
            learning_rate: 0.0,
            gradient_norm: 0.0,
            seconds: 0.0,
            data_wait_seconds: 0.0,
            cpu_seconds: 0.0,
            sources: self.sources,
            data: digest_of_step(&self.micro_batches).to_string()[..DIGEST_DIGITS].to_owned(),
            digest: digest[..DIGEST_DIGITS].to_owned(),
        }
    }
}

/// Source index of each position of a row of `len`; 0 in padding, which has no loss. A document's first token, where it is
/// predicted, counts as the source of the token before it.
fn sources_of(row: &[Piece], len: usize, sources: &mut SourceNames) -> Vec<u16> {
    let mut indices = Vec::with_capacity(len);
    for piece in row {
        indices.extend(std::iter::repeat_n(sources.index(piece.document.source()), piece.len()));
    }
    indices.resize(len, 0);
    indices
}

#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, value: f32) {
        self.sum += f64::from(value);
        self.count += 1;
    }

    fn get(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}
