//! What goes out: scored records and dead letters, and what becomes of one that is too large.

use bytes::Bytes;
use rdkafka::message::{Header, OwnedHeaders};
use sluice_schemas::names;

use crate::ledger::Ticket;
use crate::metrics::RECORD_TOO_LARGE;

/// What became of a record.
#[derive(Debug)]
pub enum Outcome {
    /// It was scored.
    Scored(Scored),
    /// It could not be.
    DeadLetter(DeadLetter),
}

/// A record for the scored topic.
#[derive(Debug)]
pub struct Scored {
    /// The key of the record that was read; the document's id where it had none.
    pub key: Bytes,
    /// The encoded [`sluice_schemas::record::ScoredDocument`].
    pub payload: Bytes,
    /// The payload as it was read, for the case that the broker refuses this record.
    pub origin: Bytes,
    /// Number of tokens.
    pub tokens: usize,
}

/// A record for the dead-letter topic.
#[derive(Debug)]
pub struct DeadLetter {
    /// The key of the record that was read.
    pub key: Option<Bytes>,
    /// The payload as it was read; nothing where it is too large to be carried along.
    pub payload: Option<Bytes>,
    /// A short name of the reason.
    pub reason: &'static str,
    /// The reason in words.
    pub detail: String,
}

impl Outcome {
    /// The dead letter to publish in place of a record that is too large; nothing where it cannot be made smaller.
    pub fn shrink(&self) -> Option<DeadLetter> {
        match self {
            Self::Scored(scored) => Some(DeadLetter {
                key: Some(scored.key.clone()),
                payload: Some(scored.origin.clone()),
                reason: RECORD_TOO_LARGE,
                detail: format!(
                    "with its losses the record has {} bytes, more than the broker or kafka.record_bytes_max allows",
                    scored.payload.len()
                ),
            }),
            Self::DeadLetter(letter) => letter.payload.is_some().then(|| DeadLetter {
                key: letter.key.clone(),
                payload: None,
                reason: letter.reason,
                detail: letter.detail.clone(),
            }),
        }
    }

    /// The record's key.
    pub fn key(&self) -> Option<&Bytes> {
        match self {
            Self::Scored(scored) => Some(&scored.key),
            Self::DeadLetter(letter) => letter.key.as_ref(),
        }
    }

    /// The record's payload.
    pub fn payload(&self) -> Option<&Bytes> {
        match self {
            Self::Scored(scored) => Some(&scored.payload),
            Self::DeadLetter(letter) => letter.payload.as_ref(),
        }
    }

    /// The record's headers: its kind, or why it is a dead letter and where it comes from.
    pub fn headers(&self, ticket: Ticket, documents_topic: &str) -> OwnedHeaders {
        let headers = OwnedHeaders::new();
        let header = |key, value| Header { key, value: Some(value) };
        match self {
            Self::Scored(_) => headers.insert(header(names::RECORD_HEADER, names::SCORED_DOCUMENT)),
            Self::DeadLetter(letter) => {
                let (partition, offset) = (ticket.partition.to_string(), ticket.offset.to_string());
                let headers = headers
                    .insert(header(names::ERROR_HEADER, letter.reason))
                    .insert(header(names::ERROR_DETAIL_HEADER, &letter.detail))
                    .insert(header(names::ORIGIN_TOPIC_HEADER, documents_topic))
                    .insert(header(names::ORIGIN_PARTITION_HEADER, &partition))
                    .insert(header(names::ORIGIN_OFFSET_HEADER, &offset));
                if letter.payload.is_none() {
                    headers.insert(header(names::PAYLOAD_OMITTED_HEADER, "true"))
                } else {
                    headers
                }
            }
        }
    }
}
