//! A document as training sees it: token ids with their reference losses, checked once, on entry.

/// Token ids of one document and, when it was scored, the reference loss of each.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    id: String,
    source: String,
    tokens: Vec<u32>,
    reference: Vec<f32>,
}

/// A document with as many losses as it should not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("document {id:?} has {tokens} tokens but {losses} reference losses")]
pub struct LengthMismatch {
    id: String,
    tokens: usize,
    losses: usize,
}

impl Document {
    /// A document without reference losses.
    pub fn plain(id: String, source: String, tokens: Vec<u32>) -> Self {
        let reference = vec![f32::NAN; tokens.len()];
        Self { id, source, tokens, reference }
    }

    /// A document with one reference loss in nats per token, NaN where there is none (the first token).
    pub fn scored(
        id: String,
        source: String,
        tokens: Vec<u32>,
        reference: Vec<f32>,
    ) -> Result<Self, LengthMismatch> {
        if tokens.len() == reference.len() {
            Ok(Self { id, source, tokens, reference })
        } else {
            Err(LengthMismatch { id, tokens: tokens.len(), losses: reference.len() })
        }
    }

    /// The document's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where the document comes from, in the producer's words; may be empty.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Token ids.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Reference loss in nats of each token, NaN where there is none.
    pub fn reference(&self) -> &[f32] {
        &self.reference
    }

    /// The same document cut after `tokens` tokens.
    #[must_use]
    pub fn truncated(mut self, tokens: usize) -> Self {
        self.tokens.truncate(tokens);
        self.reference.truncate(tokens);
        self
    }
}
