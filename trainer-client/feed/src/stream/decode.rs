//! Record bytes to documents, with every check that needs to know the run.

use std::sync::Arc;

use bytes::Bytes;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{
    AttributedDocument, Bos, ContextPolicy, Losses, RecordError, ScoredDocument, ScoredRecord,
    TokenizedDocument,
};

use super::error::{Origin, StreamError};
use super::kind::TopicKind;
use crate::cut::has_equal_contexts;
use crate::document::Document;
use crate::select::Needs;

/// Most windows that a token of a long document may be in. Each is read, and held in memory, by itself.
const REREADS_MAX: u64 = 64;

/// Decodes records and holds each by itself against what a run can use.
#[derive(Clone, Debug)]
pub struct Decoder {
    kind: TopicKind,
    tokenizer: Fingerprint,
    vocabulary: u32,
    needs: Needs,
    allowed: Arc<[Fingerprint]>,
    /// Tokens of a sequence that documents must fit under the contexts of their reference losses.
    sequence: Option<usize>,
}

impl Decoder {
    /// A decoder that refuses documents of another tokenizer and ids of `vocabulary` and beyond.
    pub fn new(kind: TopicKind, tokenizer: Fingerprint, vocabulary: u32) -> Self {
        Self { kind, tokenizer, vocabulary, needs: Needs::default(), allowed: Arc::new([]), sequence: None }
    }

    /// Fingerprint of the tokenizer whose documents it takes.
    pub fn tokenizer(&self) -> Fingerprint {
        self.tokenizer
    }

    /// Token ids that it takes are below this.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// The same decoder, which refuses scored documents without what is needed of the reference: losses, entropies, or the
    /// attribute of a token classifier.
    #[must_use]
    pub fn needing(self, needs: Needs) -> Self {
        Self { needs, ..self }
    }

    /// The same decoder, which takes records of these reference models and no others; of an empty list, those of the
    /// model that scored the first record.
    #[must_use]
    pub fn allowing(self, reference_models: &[Fingerprint]) -> Self {
        Self { allowed: reference_models.into(), ..self }
    }

    /// The same decoder, which refuses documents that do not fit a sequence of so many tokens under the contexts of their
    /// reference losses.
    #[must_use]
    pub fn refusing_unequal_contexts(self, sequence: usize) -> Self {
        Self { sequence: Some(sequence), ..self }
    }

    /// Reference models whose records it takes; of an empty list, those of one.
    pub fn allowed(&self) -> &[Fingerprint] {
        &self.allowed
    }

    /// Refuses a record whose header says that it is of the other kind; one that says nothing is left to
    /// [`Decoder::decode`].
    pub(super) fn check_kind(
        &self,
        said: Option<TopicKind>,
        origin: impl Fn() -> Origin,
    ) -> Result<(), StreamError> {
        match said {
            Some(found) if found != self.kind => Err(StreamError::Kind { origin: origin(), found }),
            _ => Ok(()),
        }
    }

    /// Decodes and checks one record; gives the document, and the reference model that scored it, if one did.
    pub fn decode(
        &self,
        payload: Bytes,
        origin: impl Fn() -> Origin,
    ) -> Result<(Document, Option<Fingerprint>), StreamError> {
        let refused = |error| StreamError::Record { origin: origin(), error: Box::new(error) };
        match self.kind {
            TopicKind::Documents => {
                let record = TokenizedDocument::decode(payload).map_err(refused)?;
                self.check(&record).map_err(refused)?;
                let tokens = record.tokens.to_vec();
                Ok((Document::plain(record.id, record.source, tokens), None))
            }
            TopicKind::Scored => {
                let record = ScoredRecord::decode(payload).map_err(refused)?;
                self.check(record.document()).map_err(refused)?;
                let found = record.reference_model();
                if !self.allowed.is_empty() && !self.allowed.contains(&found) {
                    return Err(StreamError::NotAllowed { origin: origin(), found });
                }
                let document = match record {
                    ScoredRecord::Losses(record) => self.of_losses(record, origin)?,
                    ScoredRecord::Attributes(record) => self.of_attribute(record, origin)?,
                };
                Ok((document, Some(found)))
            }
        }
    }

    fn of_losses(
        &self,
        record: ScoredDocument,
        origin: impl Fn() -> Origin,
    ) -> Result<Document, StreamError> {
        let context = record.context;
        self.check_context(context, record.document.tokens.len(), &origin)?;
        if self.needs.attribute {
            return Err(StreamError::NoAttribute { origin: origin() });
        }
        let entropies = record.reference_entropies.as_ref().map(Losses::to_vec);
        if self.needs.reference_entropy && entropies.is_none() {
            return Err(StreamError::NoEntropies { origin: origin() });
        }
        let (tokens, losses) = (record.document.tokens.to_vec(), record.reference_losses.to_vec());
        Document::scored(record.document.id, record.document.source, tokens, losses)
            .and_then(|document| match entropies {
                Some(entropies) => document.with_entropies(entropies),
                None => Ok(document),
            })
            .map(|document| document.with_context(context))
            .map_err(|error| StreamError::Losses { origin: origin(), error })
    }

    fn of_attribute(
        &self,
        record: AttributedDocument,
        origin: impl Fn() -> Origin,
    ) -> Result<Document, StreamError> {
        if self.needs.reference_loss || self.needs.reference_entropy {
            let class = record.attribute.class_name().to_owned();
            return Err(StreamError::NoLosses { origin: origin(), class });
        }
        let (tokens, values) = (record.document.tokens.to_vec(), record.attribute.to_vec());
        Document::plain(record.document.id, record.document.source, tokens)
            .with_attribute(values)
            .map(|document| document.with_context(record.context))
            .map_err(|error| StreamError::Losses { origin: origin(), error })
    }

    fn check_context(
        &self,
        found: ContextPolicy,
        tokens: usize,
        origin: impl Fn() -> Origin,
    ) -> Result<(), StreamError> {
        let ContextPolicy { window, stride, bos } = found;
        // Windows that do not overlap leave tokens that no window could have scored. A BOS takes a place in them.
        let overlap = if bos == Bos::None { 1 } else { 2 };
        let is_cut = tokens as u64 + overlap - 1 > u64::from(window);
        if is_cut && (stride == 0 || u64::from(stride) + overlap > u64::from(window)) {
            return Err(StreamError::Windows { origin: origin(), tokens, context: found });
        }
        if is_cut && u64::from(window) > REREADS_MAX * u64::from(stride) {
            return Err(StreamError::Rereads { origin: origin(), context: found });
        }
        if let Bos::Document(token) | Bos::Window(token) = bos
            && token >= self.vocabulary
        {
            return Err(StreamError::ForeignBos { origin: origin(), token, vocabulary: self.vocabulary });
        }
        if let Some(sequence) = self.sequence
            && !has_equal_contexts(tokens, found, sequence)
        {
            return Err(StreamError::UnequalContexts { origin: origin(), tokens, window, sequence });
        }
        Ok(())
    }

    fn check(&self, record: &TokenizedDocument) -> Result<(), RecordError> {
        record.check_tokenizer(self.tokenizer)?;
        record.tokens.check_vocabulary(self.vocabulary)
    }
}
