//! Documents in, by lanes: from a Kafka topic, whose partitions are lanes, or from memory.

mod connection;
mod decode;
mod error;
mod fetch;
mod first;
mod kind;
mod memory;
mod place;
mod provenance;
mod queue;
mod reader;
mod start;
mod throttle;
mod track;

use sluice_schemas::fingerprint::Fingerprint;

pub use connection::{Broker, PROPERTIES_OWNED};
pub use decode::Decoder;
pub use error::{Origin, StreamError};
pub use fetch::{KafkaStream, Start};
pub use first::first_context;
pub use kind::TopicKind;
pub use memory::ShuffledDocuments;
pub use place::{Extent, Position, Shard, ShardError};
pub use provenance::{Contexts, Provenance};

use crate::document::Document;

/// What comes next in a lane.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// A document.
    Document(Document),
    /// The lane has ended.
    Ended,
    /// Somebody has asked to stop; the lane stays where it is.
    Stopped,
}

/// Where documents come from: lanes, each of them in an order of its own that depends on the data alone. In Kafka a lane
/// is a partition, and has its number.
pub trait DocumentStream: Send {
    /// Lanes of the whole stream, those of other ranks included.
    fn lanes(&self) -> usize;

    /// The next document of a lane.
    ///
    /// # Panics
    /// When the lane is not one of this rank's.
    fn next_document(&mut self, lane: usize) -> Result<Next, StreamError>;

    /// How far the documents handed out so far reach: what a checkpoint must carry to go on from here.
    ///
    /// # Panics
    /// When the lane is not one of this rank's.
    fn position(&self, lane: usize) -> Position;

    /// How each reference model saw the documents read so far; a checkpoint carries it, so that a run that goes on still
    /// knows a record whose losses are not to be compared with the others'.
    fn contexts(&self) -> Contexts {
        Contexts::new()
    }

    /// Fingerprint of the model that made the reference losses, once a document has shown it; the first one of several.
    fn reference_model(&self) -> Option<Fingerprint>;

    /// The topic's id, where documents come from one and the broker has told it: a topic that is deleted and made anew has
    /// another.
    fn topic_id(&self) -> Option<String> {
        None
    }

    /// Whether losses of more than one reference model are taken.
    fn takes_several_models(&self) -> bool {
        false
    }
}
