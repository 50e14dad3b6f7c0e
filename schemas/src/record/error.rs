//! Everything that can be wrong with a record.

use super::version::SCHEMA_VERSION;
use crate::fingerprint::Fingerprint;

/// Why a record was refused.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A record without a payload (a tombstone) or of no bytes.
    #[error("the record has no payload")]
    EmptyPayload,
    /// Not the expected protobuf message, or cut short.
    #[error("the payload is not a valid record: {0}")]
    Malformed(prost::DecodeError),
    /// Written by a newer or foreign producer.
    #[error("schema version {0} is unknown; this build reads version {version}", version = SCHEMA_VERSION)]
    UnknownVersion(u32),
    /// A message that must be there is not.
    #[error("the record has no {0}")]
    MissingField(&'static str),
    /// A document without a name.
    #[error("the document has no id")]
    MissingId,
    /// A document of no tokens.
    #[error("the document has no tokens")]
    EmptyDocument,
    /// A token width other than 2 and 4.
    #[error("a token id cannot be {0} bytes wide; 2 and 4 are known")]
    BadTokenWidth(u32),
    /// The ids' bytes do not divide into whole ids.
    #[error("{len} bytes do not divide into token ids of {width} bytes")]
    BadTokenLength {
        /// Bytes of all ids.
        len: usize,
        /// Bytes of one id.
        width: u32,
    },
    /// A token id that the model has no row for.
    #[error("token id {id} at position {position} is beyond the vocabulary of {vocabulary}")]
    TokenBeyondVocabulary {
        /// The token id.
        id: u32,
        /// Its index in the document.
        position: usize,
        /// Number of ids that the model knows.
        vocabulary: u32,
    },
    /// A fingerprint that is not 32 bytes long.
    #[error("the {of} fingerprint has {len} bytes, not 32")]
    BadFingerprint {
        /// What the fingerprint is of.
        of: &'static str,
        /// Its length in bytes.
        len: usize,
    },
    /// A document made by another tokenizer.
    #[error("the document was made by tokenizer {found}, and this one is {expected}")]
    ForeignTokenizer {
        /// The document's tokenizer.
        found: Fingerprint,
        /// The reader's tokenizer.
        expected: Fingerprint,
    },
    /// A loss format this build does not know.
    #[error("loss format {0} is unknown")]
    UnknownLossFormat(i32),
    /// A precision this build does not know.
    #[error("precision {0} is unknown")]
    UnknownPrecision(i32),
    /// A policy for the beginning of a window that this build does not know.
    #[error("BOS policy {0} is unknown")]
    UnknownBosPolicy(i32),
    /// A kind of model this build does not know.
    #[error("model kind {0} is unknown")]
    UnknownModelKind(i32),
    /// Losses were asked for, and the record carries an attribute; or the other way round.
    #[error("the record carries {found}, and {expected} are asked for")]
    OtherModelKind {
        /// What there is.
        found: &'static str,
        /// What should be.
        expected: &'static str,
    },
    /// Not one attribute for each token.
    #[error("{found} bytes of attributes where {tokens} tokens need {expected}")]
    BadAttributeLength {
        /// Bytes of all values.
        found: usize,
        /// Bytes there should be.
        expected: usize,
        /// Tokens of the document.
        tokens: usize,
    },
    /// An attribute that is NaN or infinite.
    #[error("the attribute at position {position} is {value}")]
    NonFiniteAttribute {
        /// Index of the token.
        position: usize,
        /// The value.
        value: f32,
    },
    /// Not one loss for each token.
    #[error("{found} bytes of losses where {tokens} tokens need {expected}")]
    BadLossLength {
        /// Bytes of all losses.
        found: usize,
        /// Bytes there should be.
        expected: usize,
        /// Tokens of the document.
        tokens: usize,
    },
    /// A prediction for the first token, which nothing comes before.
    #[error("the first token has a loss of {0}, and nothing comes before it")]
    UnexpectedPrediction(f32),
    /// A loss that is NaN or infinite.
    #[error("the loss at position {position} is {loss}")]
    NonFiniteLoss {
        /// Index of the token.
        position: usize,
        /// The value.
        loss: f32,
    },
    /// A loss further below zero than rounding explains: a broken kernel.
    #[error("the loss at position {position} is {loss}, below zero by more than rounding")]
    NegativeLoss {
        /// Index of the token.
        position: usize,
        /// The value.
        loss: f32,
    },
}

impl RecordError {
    /// Every code that [`Self::code`] can give, for metrics that start at zero.
    pub const CODES: [&'static str; 21] = [
        "empty_payload",
        "malformed",
        "unknown_version",
        "missing_field",
        "missing_id",
        "empty_document",
        "bad_token_width",
        "bad_token_length",
        "token_beyond_vocabulary",
        "bad_fingerprint",
        "foreign_tokenizer",
        "unknown_loss_format",
        "unknown_policy",
        "unknown_model_kind",
        "other_model_kind",
        "bad_attribute_length",
        "non_finite_attribute",
        "bad_loss_length",
        "unexpected_prediction",
        "non_finite_loss",
        "negative_loss",
    ];

    /// A short stable name of the reason: a metric label and a dead-letter header.
    pub fn code(&self) -> &'static str {
        match self {
            Self::EmptyPayload => "empty_payload",
            Self::Malformed(_) => "malformed",
            Self::UnknownVersion(_) => "unknown_version",
            Self::MissingField(_) => "missing_field",
            Self::MissingId => "missing_id",
            Self::EmptyDocument => "empty_document",
            Self::BadTokenWidth(_) => "bad_token_width",
            Self::BadTokenLength { .. } => "bad_token_length",
            Self::TokenBeyondVocabulary { .. } => "token_beyond_vocabulary",
            Self::BadFingerprint { .. } => "bad_fingerprint",
            Self::ForeignTokenizer { .. } => "foreign_tokenizer",
            Self::UnknownLossFormat(_) => "unknown_loss_format",
            Self::UnknownPrecision(_) | Self::UnknownBosPolicy(_) => "unknown_policy",
            Self::UnknownModelKind(_) => "unknown_model_kind",
            Self::OtherModelKind { .. } => "other_model_kind",
            Self::BadAttributeLength { .. } => "bad_attribute_length",
            Self::NonFiniteAttribute { .. } => "non_finite_attribute",
            Self::BadLossLength { .. } => "bad_loss_length",
            Self::UnexpectedPrediction(_) => "unexpected_prediction",
            Self::NonFiniteLoss { .. } => "non_finite_loss",
            Self::NegativeLoss { .. } => "negative_loss",
        }
    }
}

// Not `#[from]`, which would make it a source, and whoever shows the whole chain would show it twice.
impl From<prost::DecodeError> for RecordError {
    fn from(error: prost::DecodeError) -> Self {
        Self::Malformed(error)
    }
}
