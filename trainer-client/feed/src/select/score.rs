//! What makes a token worth learning from: a score for each, higher first.

use serde::{Deserialize, Serialize};

use super::ratio::KeepRatio;

/// What is known of each position of a micro-batch: one value in nats a position, NaN where there is none. A list
/// that a score does not need ([`Score::needs`]) may be empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct Signals<'a> {
    /// Loss of the model in training.
    pub loss: &'a [f32],
    /// Entropy of its prediction.
    pub entropy: &'a [f32],
    /// Loss of an earlier state of the model in training.
    pub history_loss: &'a [f32],
    /// Loss of the reference model.
    pub reference_loss: &'a [f32],
    /// Entropy of the reference model's prediction.
    pub reference_entropy: &'a [f32],
}

/// Which lists beside the losses of both models a score looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// [`Signals::entropy`].
    pub entropy: bool,
    /// [`Signals::history_loss`].
    pub history_loss: bool,
    /// [`Signals::reference_entropy`].
    pub reference_entropy: bool,
}

/// How tokens are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum Score {
    /// Highest excess loss `L_current - L_reference` (equation 2 of Rho-1).
    Excess,
    /// Lowest reference loss (self-reference, section 3.4 of Rho-1).
    ReferenceLoss,
    /// Lowest entropy of the reference's prediction (self-reference).
    ReferenceEntropy,
    /// Tokens among the lowest by reference loss and among the lowest by reference entropy. The rule's share is that
    /// of the loss; fewer are kept than either share, as many as are in both.
    Intersection {
        /// Share of the lowest entropies, where it is not the rule's.
        #[serde(skip_serializing_if = "Option::is_none")]
        entropy_keep: Option<KeepRatio>,
    },
    /// Tokens among the lowest by reference loss or among the lowest by reference entropy.
    Union {
        /// Share of the lowest entropies, where it is not the rule's.
        #[serde(skip_serializing_if = "Option::is_none")]
        entropy_keep: Option<KeepRatio>,
    },
    /// Highest loss of the model in training; no reference decides.
    Loss,
    /// Highest entropy of the prediction of the model in training; no reference decides.
    Entropy,
    /// Highest improvement `L_history - L_current` over an earlier state of the same model: an average of its
    /// weights, or an older checkpoint.
    Improvement,
    /// Drawn without looking: the control.
    Random,
}

impl Score {
    /// What the score looks at.
    pub fn needs(self) -> Needs {
        let none = Needs::default();
        match self {
            Self::Excess | Self::ReferenceLoss | Self::Loss | Self::Random => none,
            Self::ReferenceEntropy | Self::Intersection { .. } | Self::Union { .. } => {
                Needs { reference_entropy: true, ..none }
            }
            Self::Entropy => Needs { entropy: true, ..none },
            Self::Improvement => Needs { history_loss: true, ..none },
        }
    }

    /// Whether nothing of the model in training decides, so that a choice can be made before its forward pass.
    pub fn is_known_beforehand(self) -> bool {
        match self {
            Self::ReferenceLoss
            | Self::ReferenceEntropy
            | Self::Intersection { .. }
            | Self::Union { .. }
            | Self::Random => true,
            Self::Excess | Self::Loss | Self::Entropy | Self::Improvement => false,
        }
    }

    /// Whether it looks at losses or entropies of the reference, so that scoring is a cost of it.
    pub fn looks_at_reference(self) -> bool {
        !matches!(self, Self::Loss | Self::Entropy | Self::Improvement | Self::Random)
    }

    /// Whether one number decides, so that a threshold on it means something.
    pub fn has_threshold(self) -> bool {
        !matches!(self, Self::Intersection { .. } | Self::Union { .. } | Self::Random)
    }

    /// The score of each position in nats, higher first; NaN where it cannot be chosen. Where two rankings decide,
    /// that of the reference loss. For [`Score::Random`], whose draws are not scores, the excess loss: a random run
    /// chooses among the same positions as the run that it is the control of.
    ///
    /// # Panics
    /// When a list that the score needs is not as long as the losses.
    pub fn values(self, signals: &Signals<'_>) -> Vec<f32> {
        let Signals { loss, entropy, history_loss, reference_loss, reference_entropy } = *signals;
        match self {
            Self::Excess | Self::Random => difference(loss, reference_loss),
            Self::ReferenceLoss => only_targets(loss, &negated(reference_loss)),
            Self::ReferenceEntropy => only_targets(loss, &negated(reference_entropy)),
            Self::Intersection { .. } | Self::Union { .. } => {
                let by_loss = only_targets(loss, &negated(reference_loss));
                only_targets(reference_entropy, &by_loss)
            }
            Self::Loss => loss.to_vec(),
            Self::Entropy => only_targets(loss, entropy),
            Self::Improvement => difference(history_loss, loss),
        }
    }
}

/// `left - right`; NaN where either is.
fn difference(left: &[f32], right: &[f32]) -> Vec<f32> {
    assert_eq!(left.len(), right.len(), "one value per position in both lists");
    left.iter().zip(right).map(|(left, right)| left - right).collect()
}

fn negated(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| -value).collect()
}

/// `values`, and NaN where `target` is.
fn only_targets(target: &[f32], values: &[f32]) -> Vec<f32> {
    assert_eq!(target.len(), values.len(), "one value per position in both lists");
    let pairs = target.iter().zip(values);
    pairs.map(|(target, &value)| if target.is_nan() { f32::NAN } else { value }).collect()
}
