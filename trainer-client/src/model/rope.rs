//! Rotary frequencies, and how families scale them for contexts longer than those that a model was first trained on.
//!
//! Formulas are those of transformers' `modeling_rope_utils.py`, in double precision.

use std::f64::consts::TAU;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// How rotary frequencies are scaled, under the names of `rope_scaling` in `config.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    Default,
    /// Every frequency is divided (Chen et al., arXiv 2306.15595).
    Linear {
        /// By this.
        factor: f64,
    },
    /// Low frequencies are divided, high ones are not, and those between them in part (Llama 3.1).
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// Turns over the original context below which a frequency is low.
        low_freq_factor: f64,
        /// Turns over the original context above which a frequency is high.
        high_freq_factor: f64,
        /// The context before it was made longer, in tokens.
        original_max_position_embeddings: usize,
    },
    /// The same with bounds on a straight line over dimensions, and cosines and sines that are scaled too (`YaRN`: Peng et
    /// al., arXiv 2309.00071).
    Yarn {
        /// What low frequencies are divided by.
        factor: f64,
        /// The context before it was made longer, in tokens.
        original_max_position_embeddings: usize,
        /// Turns over the original context from which on a frequency stays.
        beta_fast: f64,
        /// Turns over the original context up to which a frequency is divided.
        beta_slow: f64,
        /// What cosines and sines are multiplied with.
        attention_factor: f64,
        /// Whether the bounds are whole dimensions.
        truncate: bool,
    },
}

impl RopeScaling {
    /// Checks ranges; the error names the setting.
    pub fn validate(&self) -> Result<()> {
        let above_zero = |name: &str, value: f64| {
            ensure!(value.is_finite() && value > 0.0, "{name} {value} of the rotary scaling must be above 0");
            Ok(())
        };
        match *self {
            Self::Default => Ok(()),
            Self::Linear { factor } => above_zero("factor", factor),
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, .. } => {
                above_zero("factor", factor)?;
                above_zero("low_freq_factor", low)?;
                if !(high.is_finite() && high > low) {
                    bail!(
                        "high_freq_factor {high} of the rotary scaling must be above low_freq_factor {low}"
                    );
                }
                Ok(())
            }
            Self::Yarn { factor, beta_fast, beta_slow, attention_factor, .. } => {
                above_zero("factor", factor)?;
                above_zero("beta_fast", beta_fast)?;
                above_zero("beta_slow", beta_slow)?;
                above_zero("attention_factor", attention_factor)
            }
        }
    }
}

/// `YaRN`'s factor of cosines and sines for a context that is `factor` times as long: `0.1 mscale ln(factor) + 1`.
pub(super) fn yarn_attention_factor(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl RopeScaling {
    /// Radians a position for each pair of the `dim` dimensions of a head, `[dim / 2]`, by the base `theta`, and what cosines
    /// and sines are multiplied with.
    pub(super) fn frequencies(self, dim: usize, theta: f64) -> (Vec<f64>, f64) {
        let half = dim / 2;
        let plain = (0..half).map(|i| theta.powf(-(i as f64) / half as f64));
        match self {
            Self::Default => (plain.collect(), 1.0),
            Self::Linear { factor } => (plain.map(|frequency| frequency / factor).collect(), 1.0),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let scale = |frequency: f64| {
                    let turns = original_max_position_embeddings as f64 * frequency / TAU;
                    // 0 for a low frequency, 1 for a high one.
                    let high = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let high = high.clamp(0.0, 1.0);
                    (1.0 - high) * frequency / factor + high * frequency
                };
                (plain.map(scale).collect(), 1.0)
            }
            Self::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                // The dimension whose pair makes so many turns over the original context.
                let dimension_of =
                    |turns: f64| dim as f64 * (original as f64 / (turns * TAU)).ln() / (2.0 * theta.ln());
                let (mut low, mut high) = (dimension_of(beta_fast), dimension_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min((dim - 1) as f64));
                if (high - low).abs() < f64::EPSILON {
                    // As transformers does, so that nothing is divided by 0.
                    high += 0.001;
                }
                let scale = |(i, frequency): (usize, f64)| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    frequency / factor * divided + frequency * (1.0 - divided)
                };
                (plain.enumerate().map(scale).collect(), attention_factor)
            }
        }
    }
}
