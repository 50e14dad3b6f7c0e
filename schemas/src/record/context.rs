//! How the reference model saw a document.

use serde::{Deserialize, Serialize};

use super::error::RecordError;
use crate::wire;

/// How the reference model saw a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextPolicy {
    /// Longest run of tokens given to the model at once.
    pub window: u32,
    /// Tokens between the starts of two windows of a document longer than `window`.
    pub stride: u32,
    /// What stands before the first token of a window.
    pub bos: Bos,
}

/// What stands before the first token of a window: nothing, or the model's BOS token, by its id.
///
/// A document that begins with that token gets no second one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bos {
    /// Nothing: the first token of a document has no prediction.
    None,
    /// The token before a document's first window.
    Document(u32),
    /// The token before every window.
    Window(u32),
}

impl ContextPolicy {
    /// Whether the first token of a document of these tokens has a prediction: where a BOS token stands before it that it is
    /// not itself.
    pub fn predicts_first(&self, tokens: &[u32]) -> bool {
        match (self.bos, tokens.first()) {
            (Bos::Document(bos) | Bos::Window(bos), Some(&first)) => first != bos,
            _ => false,
        }
    }

    pub(super) fn check(policy: wire::ContextPolicy) -> Result<Self, RecordError> {
        let bos = match policy.bos() {
            wire::BosPolicy::None => Bos::None,
            wire::BosPolicy::Document => Bos::Document(policy.bos_token),
            wire::BosPolicy::Window => Bos::Window(policy.bos_token),
            wire::BosPolicy::Unspecified => return Err(RecordError::UnknownBosPolicy(policy.bos)),
        };
        Ok(Self { window: policy.window, stride: policy.stride, bos })
    }

    pub(super) fn to_wire(self) -> wire::ContextPolicy {
        let (bos, bos_token) = match self.bos {
            Bos::None => (wire::BosPolicy::None, 0),
            Bos::Document(token) => (wire::BosPolicy::Document, token),
            Bos::Window(token) => (wire::BosPolicy::Window, token),
        };
        wire::ContextPolicy { window: self.window, stride: self.stride, bos: bos.into(), bos_token }
    }
}
