//! What a gradient flows through.

use serde::{Deserialize, Serialize};

/// What the gradient of the kept tokens' losses flows through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Backward {
    /// Every token that a kept one has seen: the gradient of the loss
    #[default]
    Exact,
    /// Kept tokens alone: dropped ones are constants in every layer, so that the backward pass costs the kept share of itself,
    /// and is another gradient
    // Collider, arXiv 2502.00340: activations of filtered tokens are left out of the backward pass of every layer.
    Kept,
}

impl Backward {
    /// Its name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Kept => "kept",
        }
    }
}
