//! The share of tokens that is kept, over the steps of a run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ratio::KeepRatio;

/// A share for each step. As text: `0.6`, `linear:0.8:0.6`, `cosine:0.8:0.6` or
/// `steps:0.8,500=0.7,1000=0.6`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "shape", rename_all = "lowercase")]
pub enum KeepSchedule {
    /// The same at every step.
    Constant {
        /// The share.
        keep: KeepRatio,
    },
    /// On a straight line from the first step to the last.
    Linear {
        /// Share of the first step.
        from: KeepRatio,
        /// Share of the last step.
        to: KeepRatio,
    },
    /// Along half a cosine from the first step to the last.
    Cosine {
        /// Share of the first step.
        from: KeepRatio,
        /// Share of the last step.
        to: KeepRatio,
    },
    /// Changes at given steps.
    Steps {
        /// Share before the first change.
        from: KeepRatio,
        /// The changes, by ascending step.
        changes: Vec<Stair>,
    },
}

/// A change of the share.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stair {
    /// First step (from 1) with the new share.
    pub step: u64,
    /// The share from there on.
    pub keep: KeepRatio,
}

impl KeepSchedule {
    /// The same share at every step.
    pub fn constant(keep: KeepRatio) -> Self {
        Self::Constant { keep }
    }

    /// The share at a step (from 1) of a run whose schedule goes from step `first` to step `last`.
    pub fn at(&self, step: u64, first: u64, last: u64) -> KeepRatio {
        let between = |from: KeepRatio, to: KeepRatio, progress: f64| {
            let ratio = from.get() + (to.get() - from.get()) * progress;
            // Between two shares lies a share, but for rounding.
            KeepRatio::try_from(ratio.min(1.0)).unwrap_or(to)
        };
        let span = last.saturating_sub(first).max(1) as f64;
        let progress = (step.saturating_sub(first) as f64 / span).min(1.0);
        match self {
            Self::Constant { keep } => *keep,
            Self::Linear { from, to } => between(*from, *to, progress),
            Self::Cosine { from, to } => {
                between(*from, *to, 0.5 * (1.0 - (std::f64::consts::PI * progress).cos()))
            }
            Self::Steps { from, changes } => {
                changes.iter().rfind(|change| change.step <= step).map_or(*from, |change| change.keep)
            }
        }
    }

    /// The last step at which the schedule says something new; 0 where it says nothing of steps.
    pub fn last_change(&self) -> u64 {
        match self {
            Self::Steps { changes, .. } => changes.last().map_or(0, |change| change.step),
            _ => 0,
        }
    }
}

impl FromStr for KeepSchedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((shape, rest)) = text.split_once(':') else { return Ok(Self::constant(text.parse()?)) };
        let ends = || -> Result<(KeepRatio, KeepRatio), String> {
            let (from, to) = rest
                .split_once(':')
                .ok_or_else(|| format!("{text:?} is not {shape}:FROM:TO, such as {shape}:0.8:0.6"))?;
            Ok((from.parse()?, to.parse()?))
        };
        match shape {
            "linear" => ends().map(|(from, to)| Self::Linear { from, to }),
            "cosine" => ends().map(|(from, to)| Self::Cosine { from, to }),
            "steps" => {
                let mut parts = rest.split(',');
                let from = parts.next().unwrap_or_default().parse()?;
                let changes: Vec<Stair> = parts.map(str::parse).collect::<Result<_, _>>()?;
                if changes.is_empty() || !changes.is_sorted_by(|a, b| a.step < b.step) {
                    return Err(format!(
                        "{text:?} is not steps:FROM,STEP=KEEP,... with ascending steps, such as steps:0.8,500=0.6"
                    ));
                }
                Ok(Self::Steps { from, changes })
            }
            _ => Err(format!(
                "{text:?} is none of KEEP, linear:FROM:TO, cosine:FROM:TO and steps:FROM,STEP=KEEP,..."
            )),
        }
    }
}

impl FromStr for Stair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let step = |step: &str| step.parse().ok().filter(|&step: &u64| step > 1);
        match text.split_once('=').map(|(at, keep)| (step(at), keep)) {
            Some((Some(step), keep)) => Ok(Self { step, keep: keep.parse()? }),
            _ => Err(format!("{text:?} is not STEP=KEEP with a step of at least 2, such as 500=0.7")),
        }
    }
}

impl fmt::Display for KeepSchedule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant { keep } => keep.fmt(formatter),
            Self::Linear { from, to } => write!(formatter, "linear:{from}:{to}"),
            Self::Cosine { from, to } => write!(formatter, "cosine:{from}:{to}"),
            Self::Steps { from, changes } => {
                write!(formatter, "steps:{from}")?;
                changes.iter().try_for_each(|Stair { step, keep }| write!(formatter, ",{step}={keep}"))
            }
        }
    }
}
