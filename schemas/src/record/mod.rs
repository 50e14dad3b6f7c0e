//! Records whose checks have passed: a value of one of these types is well-formed by construction.
//!
//! What only a reader can know, such as its own tokenizer and vocabulary, is checked by
//! [`TokenizedDocument::check_tokenizer`] and [`TokenIds::check_vocabulary`].

mod context;
mod error;
mod losses;
mod tokens;
mod version;

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;

pub use context::{Bos, ContextPolicy};
pub use error::RecordError;
pub use losses::{LossFormat, Losses, NEGATIVE_LOSS_TOLERANCE};
pub use tokens::TokenIds;
pub use version::SCHEMA_VERSION;

use crate::fingerprint::Fingerprint;
use crate::wire;

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

impl ScoredDocument {
    /// Decodes and checks one record of the scored topic; ids and losses share the payload's buffer.
    pub fn decode(payload: Bytes) -> Result<Self, RecordError> {
        if payload.is_empty() {
            return Err(RecordError::EmptyPayload);
        }
        let record = wire::ScoredDocument::decode(payload)?;
        check_version(record.schema_version)?;
        let precision = match record.precision() {
            wire::Precision::F32 => Precision::F32,
            wire::Precision::F16 => Precision::F16,
            wire::Precision::Bf16 => Precision::Bf16,
            wire::Precision::Int8 => Precision::Int8,
            wire::Precision::Int4 => Precision::Int4,
            wire::Precision::Unspecified => return Err(RecordError::UnknownPrecision(record.precision)),
        };
        let format = match record.loss_format() {
            wire::LossFormat::F32 => LossFormat::F32,
            wire::LossFormat::F16 => LossFormat::F16,
            wire::LossFormat::Unspecified => return Err(RecordError::UnknownLossFormat(record.loss_format)),
        };
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
        let mut record = wire::ScoredDocument {
            schema_version: SCHEMA_VERSION,
            document: Some(self.document.to_wire()),
            reference_loss: self.reference_losses.bytes().clone(),
            reference_entropy: self
                .reference_entropies
                .as_ref()
                .map(|e| e.bytes().clone())
                .unwrap_or_default(),
            reference_model_fingerprint: Bytes::copy_from_slice(self.reference_model.as_bytes()),
            context: Some(self.context.to_wire()),
            ..Default::default()
        };
        record.set_loss_format(match self.reference_losses.format() {
            LossFormat::F32 => wire::LossFormat::F32,
            LossFormat::F16 => wire::LossFormat::F16,
        });
        record.set_precision(match self.precision {
            Precision::F32 => wire::Precision::F32,
            Precision::F16 => wire::Precision::F16,
            Precision::Bf16 => wire::Precision::Bf16,
            Precision::Int8 => wire::Precision::Int8,
            Precision::Int4 => wire::Precision::Int4,
        });
        record.encode_to_vec().into()
    }
}

fn check_version(found: u32) -> Result<(), RecordError> {
    if found == SCHEMA_VERSION { Ok(()) } else { Err(RecordError::UnknownVersion(found)) }
}

fn fingerprint(bytes: &[u8], of: &'static str) -> Result<Fingerprint, RecordError> {
    Fingerprint::from_slice(bytes).ok_or(RecordError::BadFingerprint { of, len: bytes.len() })
}
