//! Which tokens a step learns from: pure functions over slices (Rho-1, arXiv 2404.07965, section 2.2).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::random::SplitMix64;

/// Share of the eligible tokens that a step keeps: above 0, at most 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct KeepRatio(f64);

impl KeepRatio {
    /// The ratio as a number.
    pub fn get(self) -> f64 {
        self.0
    }

    /// How many of `eligible` tokens are kept: `floor(ratio * eligible + 0.5)`, and at least one of any.
    pub fn count(self, eligible: usize) -> usize {
        let rounded = (self.0 * eligible as f64 + 0.5).floor() as usize;
        rounded.clamp(usize::from(eligible > 0), eligible)
    }
}

/// A share outside `(0, 1]`.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("keep must be above 0 and at most 1 (0.6 keeps 60 % of the tokens), not {0}")]
pub struct KeepRatioError(f64);

impl TryFrom<f64> for KeepRatio {
    type Error = KeepRatioError;

    fn try_from(ratio: f64) -> Result<Self, KeepRatioError> {
        if ratio > 0.0 && ratio <= 1.0 { Ok(Self(ratio)) } else { Err(KeepRatioError(ratio)) }
    }
}

impl From<KeepRatio> for f64 {
    fn from(ratio: KeepRatio) -> f64 {
        ratio.0
    }
}

impl FromStr for KeepRatio {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ratio: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
        Self::try_from(ratio).map_err(|error| error.to_string())
    }
}

impl fmt::Display for KeepRatio {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// What a run minimises the loss of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Objective {
    /// Selective language modeling: the tokens with the highest excess loss.
    Slm {
        /// Share of the batch's tokens to keep.
        keep: KeepRatio,
    },
    /// Causal language modeling: every token.
    Clm,
    /// The control: as many tokens as SLM keeps, drawn without looking.
    Random {
        /// Share of the batch's tokens to keep.
        keep: KeepRatio,
    },
}

impl Objective {
    /// The objective's short name, as the command line spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Slm { .. } => "slm",
            Self::Clm => "clm",
            Self::Random { .. } => "random",
        }
    }

    /// Share of the tokens that is kept; 1 for CLM.
    pub fn keep(self) -> f64 {
        match self {
            Self::Slm { keep } | Self::Random { keep } => keep.get(),
            Self::Clm => 1.0,
        }
    }

    /// Positions this objective may choose from: those with an excess loss, or for CLM every prediction.
    pub fn is_eligible(self, current: f32, reference: f32) -> bool {
        match self {
            Self::Slm { .. } | Self::Random { .. } => !(current - reference).is_nan(),
            Self::Clm => !current.is_nan(),
        }
    }

    /// Flat indices of the positions to learn from, ascending.
    ///
    /// `current` and `reference` are losses in nats, one per position of the whole batch, NaN where there is no
    /// target. The draw of [`Objective::Random`] depends on `seed` and `step` and on nothing that went before.
    ///
    /// # Panics
    /// When the two slices differ in length.
    pub fn select(self, current: &[f32], reference: &[f32], seed: u64, step: u64) -> Vec<u32> {
        let excess = excess_losses(current, reference);
        match self {
            Self::Slm { keep } => top_k(&excess, keep),
            Self::Random { keep } => random_k(&excess, keep, seed, step),
            Self::Clm => {
                (0..).zip(current).filter(|(_, loss)| !loss.is_nan()).map(|(index, _)| index).collect()
            }
        }
    }
}

/// Excess loss `L_current - L_reference` of each position in nats (equation 2 of Rho-1); NaN where either is.
///
/// # Panics
/// When the slices differ in length.
pub fn excess_losses(current: &[f32], reference: &[f32]) -> Vec<f32> {
    assert_eq!(current.len(), reference.len(), "one reference loss per current loss");
    current.iter().zip(reference).map(|(current, reference)| current - reference).collect()
}

/// Indices of the `keep` share of the scores that are highest, ascending; NaN marks a position that is not
/// eligible, and of equal scores the earlier position wins. Linear in the number of scores.
pub fn top_k(scores: &[f32], keep: KeepRatio) -> Vec<u32> {
    // Adding zero turns -0.0 into 0.0, which `total_cmp` would otherwise tell apart.
    let candidates =
        (0..).zip(scores).filter(|(_, score)| !score.is_nan()).map(|(index, score)| (index, score + 0.0));
    first_k(candidates.collect(), keep, |left, right| right.1.total_cmp(&left.1).then(left.0.cmp(&right.0)))
}

/// As many indices as [`top_k`] keeps of the same scores, every subset equally likely.
pub fn random_k(scores: &[f32], keep: KeepRatio, seed: u64, step: u64) -> Vec<u32> {
    let mut generator = SplitMix64::keyed(seed, step);
    let candidates = (0..)
        .zip(scores)
        .filter(|(_, score)| !score.is_nan())
        .map(|(index, _)| (index, generator.next_u64()));
    first_k(candidates.collect(), keep, |left, right| right.1.cmp(&left.1).then(left.0.cmp(&right.0)))
}

/// The candidates that come first under `order` (a total one), as ascending indices.
fn first_k<T>(
    mut candidates: Vec<(u32, T)>,
    keep: KeepRatio,
    order: impl FnMut(&(u32, T), &(u32, T)) -> std::cmp::Ordering,
) -> Vec<u32> {
    let count = keep.count(candidates.len());
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, order);
        candidates.truncate(count);
    }
    let mut kept: Vec<u32> = candidates.into_iter().map(|(index, _)| index).collect();
    kept.sort_unstable();
    kept
}

#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
