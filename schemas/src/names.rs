//! Names that producers and consumers on both sides of a topic must agree on.

/// Default topic of tokenized documents.
pub const DOCUMENTS_TOPIC: &str = "sluice.documents";
/// Default topic of scored documents.
pub const SCORED_TOPIC: &str = "sluice.scored";
/// Default topic of records that could not be scored.
pub const DEAD_LETTER_TOPIC: &str = "sluice.dead-letters";

/// Record header that names the protobuf message in the payload.
pub const RECORD_HEADER: &str = "sluice-record";
/// Value of [`RECORD_HEADER`] for a tokenized document.
pub const TOKENIZED_DOCUMENT: &str = "sluice.v1.TokenizedDocument";
/// Value of [`RECORD_HEADER`] for a scored document.
pub const SCORED_DOCUMENT: &str = "sluice.v1.ScoredDocument";

/// Dead-letter header: the reason's code, one of [`crate::record::RecordError::code`] and the daemon's own.
pub const ERROR_HEADER: &str = "sluice-error";
/// Dead-letter header: the reason in words.
pub const ERROR_DETAIL_HEADER: &str = "sluice-error-detail";
/// Dead-letter header: the topic the record was read from.
pub const ORIGIN_TOPIC_HEADER: &str = "sluice-origin-topic";
/// Dead-letter header: the partition the record was read from, in decimal.
pub const ORIGIN_PARTITION_HEADER: &str = "sluice-origin-partition";
/// Dead-letter header: the offset the record was read from, in decimal.
pub const ORIGIN_OFFSET_HEADER: &str = "sluice-origin-offset";
/// Dead-letter header: `payload`, or `payload, key`, where these were too large to be carried along.
pub const OMITTED_HEADER: &str = "sluice-omitted";
