//! The two kinds of topics that documents are read from.

use rdkafka::message::{Headers, Message};
use sluice_schemas::names;

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
}

impl std::fmt::Display for TopicKind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Scored => "a scored document",
            Self::Documents => "a tokenized document",
        })
    }
}

/// What a record's header says that the record is.
pub(super) fn kind_of(message: &impl Message) -> Option<TopicKind> {
    let headers = message.headers()?;
    let header = headers.iter().find(|header| header.key == names::RECORD_HEADER)?;
    TopicKind::of_header(header.value?)
}
