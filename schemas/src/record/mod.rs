//! Records whose checks have passed: a value of one of these types is well-formed by construction.
//!
//! What only a reader can know, such as its own tokenizer and vocabulary, is checked by
//! [`TokenizedDocument::check_tokenizer`] and [`TokenIds::check_vocabulary`].

mod attribute;
mod context;
mod error;
mod losses;
mod tokens;
mod version;

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;

pub use attribute::TokenAttribute;
pub use context::{Bos, ContextPolicy};
pub use error::RecordError;
pub use losses::{LossFormat, Losses, NEGATIVE_LOSS_TOLERANCE};
pub use tokens::TokenIds;
pub use version::SCHEMA_VERSION;

use crate::fingerprint::Fingerprint;
use crate::wire;

/// What the records of a kind carry, in words.
const LOSSES: &str = "losses";
/// Likewise.
const ATTRIBUTES: &str = "attributes of a token classifier";

/// One document as token ids: at least one token, an id, and the fingerprint of the tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizedDocument {
    /// Names the document; stable over re-runs of ingestion.
    pub id: String,
    /// The token ids.
    pub tokens: TokenIds,
    /// Fingerprint of the `tokenizer.json` that made the ids.
    pub tokenizer: Fingerprint,
    /// Where the document comes from; free text, may be empty.
    pub source: String,
    /// Anything else its producer wants to travel along.
    pub attributes: BTreeMap<String, String>,
}

impl TokenizedDocument {
    /// Decodes and checks one record of the documents topic; token ids share the payload's buffer.
    pub fn decode(payload: Bytes) -> Result<Self, RecordError> {
        if payload.is_empty() {
            return Err(RecordError::EmptyPayload);
        }
        Self::check(wire::TokenizedDocument::decode(payload)?)
    }

    fn check(record: wire::TokenizedDocument) -> Result<Self, RecordError> {
        check_version(record.schema_version)?;
        if record.id.is_empty() {
            return Err(RecordError::MissingId);
        }
        let tokens = TokenIds::from_wire(record.tokens, record.token_width)?;
        if tokens.is_empty() {
            return Err(RecordError::EmptyDocument);
        }
        let tokenizer = fingerprint(&record.tokenizer_fingerprint, "tokenizer")?;
        Ok(Self { id: record.id, tokens, tokenizer, source: record.source, attributes: record.attributes })
    }

    /// The record's bytes.
    pub fn encode(&self) -> Bytes {
        self.to_wire().encode_to_vec().into()
    }

    /// Refuses a document that another tokenizer than `expected` has made.
    pub fn check_tokenizer(&self, expected: Fingerprint) -> Result<(), RecordError> {
        if self.tokenizer == expected {
            Ok(())
        } else {
            Err(RecordError::ForeignTokenizer { found: self.tokenizer, expected })
        }
    }

    fn to_wire(&self) -> wire::TokenizedDocument {
        wire::TokenizedDocument {
            schema_version: SCHEMA_VERSION,
            id: self.id.clone(),
            tokens: self.tokens.bytes().clone(),
            token_width: self.tokens.width(),
            tokenizer_fingerprint: Bytes::copy_from_slice(self.tokenizer.as_bytes()),
            source: self.source.clone(),
            attributes: self.attributes.clone(),
        }
    }

    /// A record of this document as far as all kinds of models have it.
    fn scored_record(
        &self,
        model: Fingerprint,
        context: ContextPolicy,
        precision: Precision,
    ) -> wire::ScoredDocument {
        wire::ScoredDocument {
            schema_version: SCHEMA_VERSION,
            document: Some(self.to_wire()),
            reference_model_fingerprint: Bytes::copy_from_slice(model.as_bytes()),
            context: Some(context.to_wire()),
            precision: precision.to_wire().into(),
            ..Default::default()
        }
    }
}

/// Arithmetic of the reference model: what most of the weights in its matrix products are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Integers of 5 to 8 bits with scales.
    Int8,
    /// Integers of at most 4 bits with scales.
    Int4,
}

/// A document with the reference model's loss of each token.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredDocument {
    /// The document, as it was read.
    pub document: TokenizedDocument,
    /// Reference losses, one for each token.
    pub reference_losses: Losses,
    /// Entropies of the reference model's predictions, one for each token, where they were asked for.
    pub reference_entropies: Option<Losses>,
    /// Fingerprint of the reference model's graph and weights.
    pub reference_model: Fingerprint,
    /// How the model saw the document.
    pub context: ContextPolicy,
    /// Arithmetic of the model's weights.
    pub precision: Precision,
}

impl Precision {
    fn from_wire(precision: i32) -> Result<Self, RecordError> {
        match wire::Precision::try_from(precision) {
            Ok(wire::Precision::F32) => Ok(Self::F32),
            Ok(wire::Precision::F16) => Ok(Self::F16),
            Ok(wire::Precision::Bf16) => Ok(Self::Bf16),
            Ok(wire::Precision::Int8) => Ok(Self::Int8),
            Ok(wire::Precision::Int4) => Ok(Self::Int4),
            Ok(wire::Precision::Unspecified) | Err(_) => Err(RecordError::UnknownPrecision(precision)),
        }
    }

    fn to_wire(self) -> wire::Precision {
        match self {
            Self::F32 => wire::Precision::F32,
            Self::F16 => wire::Precision::F16,
            Self::Bf16 => wire::Precision::Bf16,
            Self::Int8 => wire::Precision::Int8,
            Self::Int4 => wire::Precision::Int4,
        }
    }
}

impl ScoredDocument {
    /// Decodes and checks one record of the scored topic; ids and losses share the payload's buffer. One that a token
    /// classifier scored is refused: it has no losses ([`ScoredRecord`] reads both).
    pub fn decode(payload: Bytes) -> Result<Self, RecordError> {
        match ScoredRecord::decode(payload)? {
            ScoredRecord::Losses(record) => Ok(record),
            ScoredRecord::Attributes(_) => {
                Err(RecordError::OtherModelKind { found: ATTRIBUTES, expected: LOSSES })
            }
        }
    }

    fn check(record: wire::ScoredDocument) -> Result<Self, RecordError> {
        // A field of the other kind would be lost where this record is written again.
        if record.attribute.is_some() {
            return Err(RecordError::OtherModelKind { found: ATTRIBUTES, expected: LOSSES });
        }
        let precision = Precision::from_wire(record.precision)?;
        let format = LossFormat::from_wire(record.loss_format)?;
        let context = ContextPolicy::check(record.context.ok_or(RecordError::MissingField("context"))?)?;
        let document =
            TokenizedDocument::check(record.document.ok_or(RecordError::MissingField("document"))?)?;
        let tokens = document.tokens.len();
        let reference_losses = Losses::from_wire(record.reference_loss, format, tokens)?;
        let reference_entropies = if record.reference_entropy.is_empty() {
            None
        } else {
            Some(Losses::from_wire(record.reference_entropy, format, tokens)?)
        };
        for values in [Some(&reference_losses), reference_entropies.as_ref()].into_iter().flatten() {
            values.check_first(context.bos)?;
        }
        Ok(Self {
            document,
            reference_losses,
            reference_entropies,
            reference_model: fingerprint(&record.reference_model_fingerprint, "reference model")?,
            context,
            precision,
        })
    }

    /// The record's bytes.
    pub fn encode(&self) -> Bytes {
        let mut record = self.document.scored_record(self.reference_model, self.context, self.precision);
        record.reference_loss = self.reference_losses.bytes().clone();
        record.reference_entropy =
            self.reference_entropies.as_ref().map(|entropies| entropies.bytes().clone()).unwrap_or_default();
        record.set_loss_format(self.reference_losses.format().to_wire());
        record.encode_to_vec().into()
    }
}

/// A document with the probability of one class at each token, by a token classifier.
#[derive(Clone, Debug, PartialEq)]
pub struct AttributedDocument {
    /// The document, as it was read.
    pub document: TokenizedDocument,
    /// What the classifier says of each token.
    pub attribute: TokenAttribute,
    /// Fingerprint of the classifier's graph and weights, and of the class.
    pub reference_model: Fingerprint,
    /// How the classifier saw the document.
    pub context: ContextPolicy,
    /// Arithmetic of the classifier's weights.
    pub precision: Precision,
}

impl AttributedDocument {
    /// The record's bytes.
    pub fn encode(&self) -> Bytes {
        let mut record = self.document.scored_record(self.reference_model, self.context, self.precision);
        record.set_model_kind(wire::ModelKind::TokenClassifier);
        record.attribute = Some(self.attribute.to_wire());
        record.encode_to_vec().into()
    }

    fn check(record: wire::ScoredDocument) -> Result<Self, RecordError> {
        // A field of the other kind would be lost where this record is written again.
        if !record.reference_loss.is_empty() || !record.reference_entropy.is_empty() {
            return Err(RecordError::OtherModelKind { found: LOSSES, expected: ATTRIBUTES });
        }
        let precision = Precision::from_wire(record.precision)?;
        let context = ContextPolicy::check(record.context.ok_or(RecordError::MissingField("context"))?)?;
        let document =
            TokenizedDocument::check(record.document.ok_or(RecordError::MissingField("document"))?)?;
        let attribute = record.attribute.ok_or(RecordError::MissingField("attribute"))?;
        let attribute = TokenAttribute::from_wire(attribute, document.tokens.len())?;
        let reference_model = fingerprint(&record.reference_model_fingerprint, "reference model")?;
        Ok(Self { document, attribute, reference_model, context, precision })
    }
}

/// A record of the scored topic, of whichever kind of model.
#[derive(Clone, Debug, PartialEq)]
pub enum ScoredRecord {
    /// By a causal language model.
    Losses(ScoredDocument),
    /// By a token classifier.
    Attributes(AttributedDocument),
}

impl ScoredRecord {
    /// Decodes and checks one record of the scored topic; ids and values share the payload's buffer.
    pub fn decode(payload: Bytes) -> Result<Self, RecordError> {
        if payload.is_empty() {
            return Err(RecordError::EmptyPayload);
        }
        let record = wire::ScoredDocument::decode(payload)?;
        check_version(record.schema_version)?;
        match wire::ModelKind::try_from(record.model_kind) {
            Ok(wire::ModelKind::CausalLm) => ScoredDocument::check(record).map(Self::Losses),
            Ok(wire::ModelKind::TokenClassifier) => AttributedDocument::check(record).map(Self::Attributes),
            Err(_) => Err(RecordError::UnknownModelKind(record.model_kind)),
        }
    }

    /// The document, as it was read.
    pub fn document(&self) -> &TokenizedDocument {
        match self {
            Self::Losses(record) => &record.document,
            Self::Attributes(record) => &record.document,
        }
    }

    /// Fingerprint of the model that scored it.
    pub fn reference_model(&self) -> Fingerprint {
        match self {
            Self::Losses(record) => record.reference_model,
            Self::Attributes(record) => record.reference_model,
        }
    }

    /// How the model saw the document.
    pub fn context(&self) -> ContextPolicy {
        match self {
            Self::Losses(record) => record.context,
            Self::Attributes(record) => record.context,
        }
    }
}

fn check_version(found: u32) -> Result<(), RecordError> {
    if found == SCHEMA_VERSION { Ok(()) } else { Err(RecordError::UnknownVersion(found)) }
}

fn fingerprint(bytes: &[u8], of: &'static str) -> Result<Fingerprint, RecordError> {
    Fingerprint::from_slice(bytes).ok_or(RecordError::BadFingerprint { of, len: bytes.len() })
}
