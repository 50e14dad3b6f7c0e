//! A threshold that follows the scores, so that a micro-batch can be chosen from before the next one is read.

use serde::{Deserialize, Serialize};

/// Weight of the newest micro-batch once there have been as many as its inverse.
const NEWEST_WEIGHT: f32 = 0.1;

/// A running mean of the lowest score that each micro-batch would have kept: the first ones weigh alike, later on
/// each weighs a tenth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunningThreshold {
    /// The mean's bits, because decimals in JSON need not come back as the same number.
    bits: Option<u32>,
    /// Micro-batches seen.
    seen: u64,
}

impl RunningThreshold {
    /// The threshold in the score's unit; `None` before the first micro-batch.
    pub fn get(&self) -> Option<f32> {
        self.bits.map(f32::from_bits)
    }

    /// Takes in the lowest score that a micro-batch would have kept; one that is not finite is left out.
    pub fn update(&mut self, lowest_kept: f32) {
        if !lowest_kept.is_finite() {
            return;
        }
        self.seen += 1;
        let mean = self.get().unwrap_or(lowest_kept);
        let weight = NEWEST_WEIGHT.max(1.0 / self.seen as f32);
        self.bits = Some((mean + weight * (lowest_kept - mean)).to_bits());
    }
}

/// The running thresholds of a run: what a checkpoint must carry of its selection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Of the score, or of the reference loss where two rankings decide.
    pub score: RunningThreshold,
    /// Of the reference entropy, where two rankings decide.
    pub entropy: RunningThreshold,
}
