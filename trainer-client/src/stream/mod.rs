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
    /// Pass over the data that the last document belongs to, counted from 1.
    pub epoch: u64,
    /// How far each partition has been read; empty for documents held in memory.
    pub partitions: BTreeMap<i32, PartitionPosition>,
    /// The partition whose turn is next, if it is not the first one's.
    pub next_partition: Option<i32>,
    /// Documents handed out since the start of the run.
    pub documents: u64,
}

/// A place in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionPosition {
    /// Pass over the partition, counted from 1.
    pub epoch: u64,
    /// Offset of the next record to read in this pass.
    pub next_offset: i64,
    /// Offset that each pass ends before, fixed when the run began; none for a topic that is followed.
    pub end: Option<i64>,
}

impl Position {
    /// The places of several shards of one topic as one place, from which other shards can go on. Whose turn it is gets
    /// lost where there are several.
    pub fn merged(shards: &[Self]) -> Self {
        match shards {
            [alone] => alone.clone(),
            _ => Self {
                epoch: shards.iter().map(|shard| shard.epoch).max().unwrap_or(0),
                partitions: shards.iter().flat_map(|shard| shard.partitions.clone()).collect(),
                next_partition: None,
                documents: shards.iter().map(|shard| shard.documents).sum(),
            },
        }
    }
}

/// One of several equal parts of a topic: partition `p` belongs to rank `p % world_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which part, from 0.
    pub rank: usize,
    /// Number of parts.
    pub world_size: usize,
}

impl Shard {
    /// The whole topic.
    pub const WHOLE: Self = Self { rank: 0, world_size: 1 };

    /// Whether a partition belongs to this part.
    pub fn owns(self, partition: i32) -> bool {
        usize::try_from(partition).is_ok_and(|partition| partition % self.world_size == self.rank)
    }
}
