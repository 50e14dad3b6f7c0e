//! What makes a token worth learning from: a score for each, higher first.

use serde::{Deserialize, Serialize};

use super::ratio::KeepRatio;

/// What is known of each position of a micro-batch: one value a position, in nats but for the attribute, NaN where there is
/// none. A list that a score does not need ([`Score::needs`]) may be empty.
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
    /// What a token classifier says of the position's target, such as the probability of a class.
    pub attribute: &'a [f32],
}

/// Which lists beside the loss of the model in training a score looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "one for each list, all of which are independent")]
pub struct Needs {
    /// [`Signals::entropy`].
    pub entropy: bool,
    /// [`Signals::history_loss`].
    pub history_loss: bool,
    /// [`Signals::reference_loss`].
    pub reference_loss: bool,
    /// [`Signals::reference_entropy`].
    pub reference_entropy: bool,
    /// [`Signals::attribute`].
    pub attribute: bool,
}

/// Which end of an attribute is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The highest values, and of a threshold those at or above it.
    #[default]
    Above,
    /// The lowest values, and of a threshold those at or below it.
    Below,
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
    /// Highest or lowest attribute, by a token classifier; no loss decides ("Shaping capabilities with token-level data
    /// filtering", arXiv 2601.21571).
    Attribute {
        /// Which end is kept.
        #[serde(default)]
        keep: Side,
    },
    /// Drawn without looking: the control.
    Random,
}

impl Score {
    /// What the score looks at.
    pub fn needs(self) -> Needs {
        let none = Needs::default();
        match self {
            // A draw is made among the positions that the run which it is the control of chooses from, by losses or attributes.
            Self::Loss | Self::Random => none,
            Self::Excess | Self::ReferenceLoss => Needs { reference_loss: true, ..none },
            Self::ReferenceEntropy => Needs { reference_entropy: true, ..none },
            Self::Intersection { .. } | Self::Union { .. } => {
                Needs { reference_loss: true, reference_entropy: true, ..none }
            }
            Self::Attribute { .. } => Needs { attribute: true, ..none },
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
            | Self::Attribute { .. }
            | Self::Random => true,
            Self::Excess | Self::Loss | Self::Entropy | Self::Improvement => false,
        }
    }

    /// Whether it looks at what the reference says, so that scoring is a cost of it.
    pub fn looks_at_reference(self) -> bool {
        !matches!(self, Self::Loss | Self::Entropy | Self::Improvement | Self::Random)
    }

    /// Whether one number decides, so that a threshold on it means something.
    pub fn has_threshold(self) -> bool {
        !matches!(self, Self::Intersection { .. } | Self::Union { .. } | Self::Random)
    }

    /// The score of each position, higher first, in nats but for [`Score::Attribute`]; NaN where it cannot be chosen. Where two
    /// rankings decide, that of the reference loss. For [`Score::Random`], whose draws are not scores, the excess loss, or the
    /// loss where there is an attribute and none of the reference: a random run chooses among the same positions as the run
    /// that it is the control of.
    ///
    /// # Panics
    /// When a list that the score needs is not as long as the losses.
    pub fn values(self, signals: &Signals<'_>) -> Vec<f32> {
        let Signals { loss, entropy, history_loss, reference_loss, reference_entropy, attribute } = *signals;
        match self {
            Self::Excess => difference(loss, reference_loss),
            Self::Random => {
                let mut scores = difference(loss, reference_loss);
                for ((score, &loss), attribute) in scores.iter_mut().zip(loss).zip(attribute) {
                    if score.is_nan() && !attribute.is_nan() {
                        *score = loss;
                    }
                }
                scores
            }
            Self::Attribute { keep: Side::Above } => only_targets(loss, attribute),
            Self::Attribute { keep: Side::Below } => only_targets(loss, &negated(attribute)),
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
