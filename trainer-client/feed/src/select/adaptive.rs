//! The rule that needs no share: learn where the reference knows more.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ratio::KeepRatio;

/// Keeps the tokens whose score is at least 0, but no smaller and no larger a share of those that compete. By the excess loss
/// these are the tokens that the reference predicts better than the model in training, so the share falls by itself as the
/// model learns. As text: `adaptive` or `adaptive:MIN:MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adaptive {
    /// The smallest share: a step that learns from next to nothing is unsteady.
    pub min: KeepRatio,
    /// The largest share.
    pub max: KeepRatio,
}

/// How its text begins, and all of it where the bounds are the default ones.
pub(super) const NAME: &str = "adaptive";

impl Adaptive {
    /// How many of `eligible` tokens are kept, `positive` of which score at least 0.
    pub fn count(self, eligible: usize, positive: usize) -> usize {
        positive.clamp(self.min.count(eligible), self.max.count(eligible))
    }
}

impl Default for Adaptive {
    fn default() -> Self {
        Self { min: KeepRatio::TWENTIETH, max: KeepRatio::ALL }
    }
}

impl FromStr for Adaptive {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("{text:?} is not {NAME} or {NAME}:MIN:MAX with MIN at most MAX, such as {NAME}:0.05:0.8")
        };
        let Some(bounds) = text.strip_prefix(NAME) else { return Err(wrong()) };
        if bounds.is_empty() {
            return Ok(Self::default());
        }
        let (min, max) =
            bounds.strip_prefix(':').and_then(|bounds| bounds.split_once(':')).ok_or_else(wrong)?;
        let (min, max): (KeepRatio, KeepRatio) = (min.parse()?, max.parse()?);
        if min.get() <= max.get() { Ok(Self { min, max }) } else { Err(wrong()) }
    }
}

impl fmt::Display for Adaptive {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{NAME}:{}:{}", self.min, self.max)
    }
}
