//! A threshold that follows the scores, so that a micro-batch can be chosen from before the next one is read. It moves once
//! a step, so that it does not depend on how many ranks share the step's micro-batches, nor on their order.

use serde::{Deserialize, Serialize};

/// Weight of the newest step once there have been as many as its inverse.
const NEWEST_WEIGHT: f32 = 0.1;

/// A running mean over the steps of the mean of the lowest score that each micro-batch would have kept: the first ones weigh
/// alike, later on each weighs a tenth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunningThreshold {
    /// The mean's bits, because decimals in JSON need not come back as the same number.
    bits: Option<u32>,
    /// Steps seen.
    seen: u64,
}

impl RunningThreshold {
    /// The threshold in the score's unit; `None` before the end of the first step.
    pub fn get(&self) -> Option<f32> {
        self.bits.map(f32::from_bits)
    }

    /// Takes in the lowest score that each micro-batch of a step would have kept; those that are not finite are left out.
    pub fn end_step(&mut self, lowest: impl Iterator<Item = f32>) {
        // In double precision, so that their order decides nothing.
        let (sum, count) = lowest
            .filter(|lowest| lowest.is_finite())
            .fold((0.0_f64, 0_u32), |(sum, count), lowest| (sum + f64::from(lowest), count + 1));
        if count == 0 {
            return;
        }
        let step = (sum / f64::from(count)) as f32;
        self.seen += 1;
        let mean = self.get().unwrap_or(step);
        let weight = NEWEST_WEIGHT.max(1.0 / self.seen as f32);
        self.bits = Some((mean + weight * (step - mean)).to_bits());
    }
}

/// The lowest scores that a micro-batch would have kept by itself: what running thresholds learn from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lowest {
    /// Of the score, or of the reference loss where two rankings decide; `None` where no running threshold decides, or nothing
    /// could be kept.
    pub score: Option<f32>,
    /// Of the reference entropy, where two rankings decide.
    pub entropy: Option<f32>,
}

/// The running thresholds of a run: what a checkpoint must carry of its selection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Of the score, or of the reference loss where two rankings decide.
    pub score: RunningThreshold,
    /// Of the reference entropy, where two rankings decide.
    pub entropy: RunningThreshold,
}

impl Thresholds {
    /// Takes in what the micro-batches of a step would have kept by themselves: all of them, of all ranks.
    pub fn end_step(&mut self, lowest: &[Lowest]) {
        self.score.end_step(lowest.iter().filter_map(|lowest| lowest.score));
        self.entropy.end_step(lowest.iter().filter_map(|lowest| lowest.entropy));
    }
}
