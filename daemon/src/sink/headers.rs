//! The headers of what goes out.

use rdkafka::message::{Header, OwnedHeaders};
use sluice_schemas::names;

use crate::ledger::Ticket;
use crate::outcome::{Omitted, Outcome};

/// The headers of `outcome`, of the record that `ticket` stands for: its kind, or why it is a dead letter and where it
/// comes from.
pub fn headers(outcome: &Outcome, ticket: Ticket, documents_topic: &str) -> OwnedHeaders {
    let headers = OwnedHeaders::new();
    let header = |key, value| Header { key, value: Some(value) };
    match outcome {
        Outcome::Scored(_) => headers.insert(header(names::RECORD_HEADER, names::SCORED_DOCUMENT)),
        Outcome::DeadLetter(letter) => {
            let (partition, offset) = (ticket.partition.to_string(), ticket.offset.to_string());
            let headers = headers
                .insert(header(names::ERROR_HEADER, letter.reason))
                .insert(header(names::ERROR_DETAIL_HEADER, &letter.detail))
                .insert(header(names::ORIGIN_TOPIC_HEADER, documents_topic))
                .insert(header(names::ORIGIN_PARTITION_HEADER, &partition))
                .insert(header(names::ORIGIN_OFFSET_HEADER, &offset));
            match letter.omitted {
                Omitted::Nothing => headers,
                Omitted::Payload => headers.insert(header(names::OMITTED_HEADER, "payload")),
                Omitted::PayloadAndKey => headers.insert(header(names::OMITTED_HEADER, "payload, key")),
            }
        }
    }
}
