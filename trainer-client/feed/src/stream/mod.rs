//! Documents in, in an order that depends on the data alone: from a Kafka topic or from memory.

mod connection;
mod decode;
mod error;
mod fetch;
mod memory;
mod place;
mod reader;
mod rotation;
mod throttle;

use sluice_schemas::fingerprint::Fingerprint;

pub use connection::{Broker, PROPERTIES_OWNED};
pub use decode::{Contexts, Decoder, TopicKind};
pub use error::{Origin, StreamError};
pub use fetch::{Extent, KafkaStream};
pub use memory::ShuffledDocuments;
pub use place::{PartitionPosition, Position, Shard};

use crate::document::Document;

/// Where documents come from, one after the other.
pub trait DocumentStream {
    /// The next document; `None` at the end of the stream, or once the run has been asked to stop.
    fn next_document(&mut self) -> Result<Option<Document>, StreamError>;

    /// How far the documents handed out so far reach: what a checkpoint must carry to go on from here.
    fn position(&self) -> Position;

    /// Parts that documents come from in turn; a document of each shows whether all of them fit the run.
    fn parts(&self) -> usize {
        1
    }

    /// How each reference model saw the documents read so far; a checkpoint carries it, so that a run that goes on still
    /// knows a record whose losses are not to be compared with the others'.
    fn contexts(&self) -> Contexts {
        Contexts::new()
    }

    /// Fingerprint of the model that made the reference losses, once a document has shown it.
    fn reference_model(&self) -> Option<Fingerprint>;
}
