//! The share of tokens that a selection keeps.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Share of the eligible tokens that a step keeps: above 0, at most 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct KeepRatio(f64);

impl KeepRatio {
    /// Every token.
    pub const ALL: Self = Self(1.0);
    /// One token in twenty.
    pub const TWENTIETH: Self = Self(0.05);

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
