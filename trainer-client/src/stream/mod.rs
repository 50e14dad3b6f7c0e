//! Documents in, in an order that depends on the data alone: from a Kafka topic or from memory.

mod connection;
mod decode;
mod error;
mod fetch;
mod memory;
mod rotation;
mod throttle;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sluice_schemas::fingerprint::Fingerprint;

pub use connection::{Broker, PROPERTIES_OWNED};
pub use decode::{Decoder, TopicKind};
pub use error::{Origin, StreamError};
pub use fetch::{Extent, KafkaStream};
pub use memory::ShuffledDocuments;

use crate::document::Document;

/// Where documents come from, one after the other.
pub trait DocumentStream {
    /// The next document; `None` at the end of the stream, or once the run has been asked to stop.
    fn next_document(&mut self) -> Result<Option<Document>, StreamError>;

    /// How far the documents handed out so far reach: what a checkpoint must carry to go on from here.
    fn position(&self) -> Position;

    /// Fingerprint of the model that made the reference losses, once a document has shown it.
    fn reference_model(&self) -> Option<Fingerprint>;
}

/// A place in a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the data begun, counted from 1.
    pub epoch: u64,
    /// Next offset of each partition; empty for documents held in memory.
    pub offsets: BTreeMap<i32, i64>,
    /// Documents handed out since the start of the run.
    pub documents: u64,
}
