//! Record bytes to documents, with every check that needs to know the run.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names;
use sluice_schemas::record::{ContextPolicy, Losses, RecordError, ScoredDocument, TokenizedDocument};

use super::error::{Origin, StreamError};
use crate::document::Document;

/// What the records of a topic are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopicKind {
    /// `sluice.v1.ScoredDocument`.
    Scored,
    /// `sluice.v1.TokenizedDocument`.
    Documents,
}

impl TopicKind {
    /// The kind that a record's header names; `None` for a header of something else.
    pub(super) fn of_header(value: &[u8]) -> Option<Self> {
        [(Self::Scored, names::SCORED_DOCUMENT), (Self::Documents, names::TOKENIZED_DOCUMENT)]
            .into_iter()
            .find_map(|(kind, name)| (value == name.as_bytes()).then_some(kind))
    }

    /// Many records of this kind, in words.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Scored => "scored documents",
            Self::Documents => "tokenized documents",
        }
    }

    /// What to do with a topic of this kind that was read as the other.
    pub(super) fn advice(self) -> &'static str {
        match self {
            Self::Scored => "`reference` wants tokenized ones, so check --topic",
            Self::Documents => "`run` wants scored ones, so check --topic or score it with `sluiced serve`",
        }
    }
}

impl std::fmt::Display for TopicKind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Scored => "a scored document",
            Self::Documents => "a tokenized document",
        })
    }
}

/// How reference models saw their documents, by fingerprint.
pub type Contexts = BTreeMap<Fingerprint, ContextPolicy>;

/// Decodes records and holds them against the run's tokenizer and reference model.
#[derive(Clone, Debug)]
pub struct Decoder {
    kind: TopicKind,
    tokenizer: Fingerprint,
    vocabulary: u32,
    needs_entropies: bool,
    allowed: Arc<[Fingerprint]>,
    /// Shared by the decoders of all ranks.
    reference_model: Arc<OnceLock<Fingerprint>>,
    /// Shared as well: how each reference model has seen its documents so far.
    contexts: Arc<Mutex<Contexts>>,
}

impl Decoder {
    /// A decoder that refuses documents of another tokenizer and ids of `vocabulary` and beyond.
    pub fn new(kind: TopicKind, tokenizer: Fingerprint, vocabulary: u32) -> Self {
        Self {
            kind,
            tokenizer,
            vocabulary,
            needs_entropies: false,
            allowed: Arc::new([]),
            reference_model: Arc::default(),
            contexts: Arc::default(),
        }
    }

    /// The same decoder, which refuses scored documents without reference entropies if they are needed.
    #[must_use]
    pub fn needing_entropies(mut self, needs_entropies: bool) -> Self {
        self.needs_entropies = needs_entropies;
        self
    }

    /// The same decoder, which takes records of these reference models and no others; of an empty list, those of the
    /// model that scored the first record.
    #[must_use]
    pub fn allowing(self, reference_models: &[Fingerprint]) -> Self {
        Self { allowed: reference_models.into(), ..self }
    }

    /// The same decoder, which has seen a record of this reference model already.
    #[must_use]
    pub fn after(self, reference_model: Option<Fingerprint>) -> Self {
        let reference_model = reference_model.map(OnceLock::from).unwrap_or_default();
        Self { reference_model: Arc::new(reference_model), ..self }
    }

    /// The same decoder, which has seen reference models score in these contexts already.
    #[must_use]
    pub fn with_contexts(self, contexts: Contexts) -> Self {
        Self { contexts: Arc::new(Mutex::new(contexts)), ..self }
    }

    /// How each reference model has seen its documents so far, of this decoder and its clones.
    pub fn contexts(&self) -> Contexts {
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The reference model of the first scored record, of this decoder and its clones.
    pub fn reference_model(&self) -> Option<Fingerprint> {
        self.reference_model.get().copied()
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

    /// Decodes and checks one record.
    pub fn decode(&self, payload: Bytes, origin: impl Fn() -> Origin) -> Result<Document, StreamError> {
        let refused = |error| StreamError::Record { origin: origin(), error: Box::new(error) };
        match self.kind {
            TopicKind::Documents => {
                let record = TokenizedDocument::decode(payload).map_err(refused)?;
                self.check(&record).map_err(refused)?;
                let tokens = record.tokens.to_vec();
                Ok(Document::plain(record.id, record.source, tokens))
            }
            TopicKind::Scored => {
                let record = ScoredDocument::decode(payload).map_err(refused)?;
                self.check(&record.document).map_err(refused)?;
                self.check_reference(record.reference_model, &origin)?;
                self.check_context(record.reference_model, record.context, &origin)?;
                let entropies = record.reference_entropies.as_ref().map(Losses::to_vec);
                if self.needs_entropies && entropies.is_none() {
                    return Err(StreamError::NoEntropies { origin: origin() });
                }
                let (tokens, losses) = (record.document.tokens.to_vec(), record.reference_losses.to_vec());
                Document::scored(record.document.id, record.document.source, tokens, losses)
                    .and_then(|document| match entropies {
                        Some(entropies) => document.with_entropies(entropies),
                        None => Ok(document),
                    })
                    .map_err(|error| StreamError::Losses { origin: origin(), error })
            }
        }
    }

    fn check_reference(&self, found: Fingerprint, origin: impl Fn() -> Origin) -> Result<(), StreamError> {
        let expected = *self.reference_model.get_or_init(|| found);
        if !self.allowed.is_empty() {
            let is_allowed = self.allowed.contains(&found);
            return if is_allowed {
                Ok(())
            } else {
                Err(StreamError::NotAllowed { origin: origin(), found })
            };
        }
        if found == expected {
            Ok(())
        } else {
            Err(StreamError::ForeignReference { origin: origin(), found, expected })
        }
    }

    /// One model's losses under more and under less context are no more to be compared than two models'.
    fn check_context(
        &self,
        reference_model: Fingerprint,
        found: ContextPolicy,
        origin: impl Fn() -> Origin,
    ) -> Result<(), StreamError> {
        let mut contexts = self.contexts.lock().unwrap_or_else(PoisonError::into_inner);
        let expected = *contexts.entry(reference_model).or_insert(found);
        if found == expected {
            Ok(())
        } else {
            Err(StreamError::ForeignContext { origin: origin(), found, expected })
        }
    }

    fn check(&self, record: &TokenizedDocument) -> Result<(), RecordError> {
        record.check_tokenizer(self.tokenizer)?;
        record.tokens.check_vocabulary(self.vocabulary)
    }
}
