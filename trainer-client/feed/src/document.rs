//! A document as training sees it: token ids with what the reference model said of each, checked once, on entry.

use std::ops::Range;

use sluice_schemas::record::ContextPolicy;

/// Token ids of one document and, when it was scored, the reference loss and entropy of each, or what a token classifier says of
/// each, with the contexts that they were computed in.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    id: String,
    source: String,
    tokens: Vec<u32>,
    reference: Vec<f32>,
    reference_entropy: Vec<f32>,
    attribute: Option<Vec<f32>>,
    context: Option<ContextPolicy>,
}

/// A document with as many losses or entropies as it should not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("document {id:?} has {tokens} tokens but {values} reference {what}")]
pub struct LengthMismatch {
    id: String,
    tokens: usize,
    values: usize,
    what: &'static str,
}

impl Document {
    /// A document without reference losses.
    pub fn plain(id: String, source: String, tokens: Vec<u32>) -> Self {
        let none = vec![f32::NAN; tokens.len()];
        let (reference, reference_entropy) = (none.clone(), none);
        Self { id, source, tokens, reference, reference_entropy, attribute: None, context: None }
    }

    /// A document with one reference loss in nats per token, NaN where there is none (the first token).
    pub fn scored(
        id: String,
        source: String,
        tokens: Vec<u32>,
        reference: Vec<f32>,
    ) -> Result<Self, LengthMismatch> {
        if tokens.len() == reference.len() {
            let reference_entropy = vec![f32::NAN; tokens.len()];
            Ok(Self { id, source, tokens, reference, reference_entropy, attribute: None, context: None })
        } else {
            Err(LengthMismatch { id, tokens: tokens.len(), values: reference.len(), what: "losses" })
        }
    }

    /// The same document with one entropy in nats per token, NaN where there is none.
    pub fn with_entropies(mut self, reference_entropy: Vec<f32>) -> Result<Self, LengthMismatch> {
        if self.tokens.len() == reference_entropy.len() {
            self.reference_entropy = reference_entropy;
            Ok(self)
        } else {
            let (tokens, values) = (self.tokens.len(), reference_entropy.len());
            Err(LengthMismatch { id: self.id, tokens, values, what: "entropies" })
        }
    }

    /// The same document with one number per token of a token classifier.
    pub fn with_attribute(mut self, attribute: Vec<f32>) -> Result<Self, LengthMismatch> {
        if self.tokens.len() == attribute.len() {
            self.attribute = Some(attribute);
            Ok(self)
        } else {
            let (tokens, values) = (self.tokens.len(), attribute.len());
            Err(LengthMismatch { id: self.id, tokens, values, what: "attributes" })
        }
    }

    /// The same document, whose losses and entropies the reference computed in these contexts.
    #[must_use]
    pub fn with_context(self, context: ContextPolicy) -> Self {
        Self { context: Some(context), ..self }
    }

    /// The contexts that the reference saw the document in; `None` where it was not scored.
    pub fn context(&self) -> Option<ContextPolicy> {
        self.context
    }

    /// Those that a model in training is to see it in too, for its losses to be compared with the reference's. What a token
    /// classifier says of a token is compared with nothing.
    pub fn compared_context(&self) -> Option<ContextPolicy> {
        self.context.filter(|_| self.attribute.is_none())
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

    /// Entropy in nats of the reference's prediction of each token, NaN where there is none.
    pub fn reference_entropy(&self) -> &[f32] {
        &self.reference_entropy
    }

    /// What a token classifier says of each token; `None` where none has scored it.
    pub fn attribute(&self) -> Option<&[f32]> {
        self.attribute.as_deref()
    }

    /// Some of its tokens, under the same id.
    ///
    /// # Panics
    /// When the range does not lie within the document.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        Self {
            id: self.id.clone(),
            source: self.source.clone(),
            tokens: self.tokens[range.clone()].to_vec(),
            reference: self.reference[range.clone()].to_vec(),
            reference_entropy: self.reference_entropy[range.clone()].to_vec(),
            attribute: self.attribute.as_ref().map(|values| values[range].to_vec()),
            context: self.context,
        }
    }

    /// The same document cut after `tokens` tokens.
    #[must_use]
    pub fn truncated(self, tokens: usize) -> Self {
        if tokens >= self.tokens.len() { self } else { self.slice(0..tokens) }
    }

    /// Drops what the reference says of its tokens.
    pub(crate) fn forget_reference(&mut self) {
        self.reference.fill(f32::NAN);
        self.reference_entropy.fill(f32::NAN);
    }
}
