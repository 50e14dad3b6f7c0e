//! How often which score occurred in a step, among the tokens that were kept and among those left out.

use serde::{Deserialize, Serialize};

/// Lower end of the first bin, in nats.
pub const LOWEST: f32 = -8.0;
/// Width of a bin, in nats.
pub const WIDTH: f32 = 0.25;
/// Bins, so that the last ends at 8 nats. The first and the last hold what lies beyond as well.
pub const BINS: usize = 64;

/// Counts of scores in equal bins from [`LOWEST`] on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoreHistogram {
    /// Tokens that were kept, for each bin.
    pub kept: Vec<u64>,
    /// Tokens that could have been kept and were not, for each bin.
    pub left_out: Vec<u64>,
}

impl Default for ScoreHistogram {
    fn default() -> Self {
        Self { kept: vec![0; BINS], left_out: vec![0; BINS] }
    }
}

impl ScoreHistogram {
    /// Counts a token; NaN, the score of one that could not be chosen, is passed over.
    pub fn add(&mut self, score: f32, is_kept: bool) {
        if score.is_nan() {
            return;
        }
        let bin = ((score - LOWEST) / WIDTH).floor().clamp(0.0, (BINS - 1) as f32) as usize;
        let counts = if is_kept { &mut self.kept } else { &mut self.left_out };
        counts[bin] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::{BINS, ScoreHistogram};

    #[test]
    fn scores_fall_into_their_bins_and_what_lies_beyond_into_the_outer_ones() {
        let mut histogram = ScoreHistogram::default();
        for (score, is_kept) in
            [(-9.0, false), (-8.0, false), (-0.01, false), (0.0, true), (0.24, true), (0.25, true)]
        {
            histogram.add(score, is_kept);
        }
        histogram.add(f32::INFINITY, true);
        histogram.add(f32::NAN, false);
        // By hand: bin 31 is [-0.25, 0), bin 32 [0, 0.25), bin 33 [0.25, 0.5).
        let counts = |values: &[u64]| -> Vec<(usize, u64)> {
            values.iter().copied().enumerate().filter(|&(_, count)| count > 0).collect()
        };
        assert_eq!(counts(&histogram.left_out), [(0, 2), (31, 1)]);
        assert_eq!(counts(&histogram.kept), [(32, 2), (33, 1), (BINS - 1, 1)]);
    }
}
