//! What a run does with its micro-batches.

use sluice_feed::select::{KeepRatio, Objective, Score, Turn};

use super::schedule::Schedule;

/// What a run does with its micro-batches.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is minimised.
    pub objective: Objective,
    /// Learning rates, and the most steps to take.
    pub schedule: Schedule,
    /// Seed of random selections.
    pub seed: u64,
    /// Steps between evaluations; there is one before the first step and one after the last as well.
    pub eval_every: u64,
    /// Steps between checkpoints; there is one after the last as well.
    pub checkpoint_every: u64,
    /// Name of the evaluation set by whose loss the best checkpoint is kept, beside the last ones.
    pub best_by: Option<String>,
}

impl Plan {
    /// What the draws of a step are named by.
    pub(super) fn turn(&self, step: u64) -> Turn {
        Turn { seed: self.seed, step, steps: self.schedule.steps, micro_batch: 0 }
    }

    /// The share of tokens that a step is to keep; `None` where a threshold decides.
    pub(super) fn keep_ratio(&self, step: u64) -> Option<f64> {
        match self.objective.selection() {
            None => Some(KeepRatio::ALL.get()),
            Some(selection) => selection.keep_at(step, self.schedule.steps).map(KeepRatio::get),
        }
    }

    /// Whether a step's scores are written down: at the first step, at every evaluation and at the last.
    pub(super) fn counts_scores(&self, step: u64) -> bool {
        let is_scored = self.objective.selection().is_some_and(|selection| selection.score != Score::Random);
        is_scored && (step == 1 || step == self.schedule.steps || step.is_multiple_of(self.eval_every))
    }
}
