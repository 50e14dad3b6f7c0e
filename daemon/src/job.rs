//! What reading hands on: a document to be scored.

use bytes::Bytes;
use sluice_schemas::record::TokenizedDocument;

use crate::ledger::Ticket;

/// A document to be scored, with its place in the ledger.
#[derive(Debug)]
pub struct Job {
    /// Its place in the ledger.
    pub ticket: Ticket,
    /// The record's key.
    pub key: Option<Bytes>,
    /// The payload, of which the document holds parts.
    pub payload: Bytes,
    /// The document.
    pub document: TokenizedDocument,
}
