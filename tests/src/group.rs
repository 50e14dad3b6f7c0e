//! The offsets of a consumer group, as a person looks at them and sets them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::Kafka;

const CALL: Duration = Duration::from_secs(10);
/// How long one waits whose members have just left.
const PATIENCE: Duration = Duration::from_secs(30);

/// A group's offsets in one topic.
pub struct Group {
    client: BaseConsumer,
    topic: String,
}

impl Group {
    /// Of the group `name` in `topic`.
    pub fn new(kafka: &Kafka, name: &str, topic: &str) -> Self {
        let client = ClientConfig::new()
            .set("bootstrap.servers", &kafka.bootstrap_servers)
            .set("group.id", name)
            .set("isolation.level", "read_committed")
            .create()
            .unwrap();
        Self { client, topic: topic.to_owned() }
    }

    /// Each partition's committed offset and the end of its log; nothing while the brokers do not tell all of it.
    pub fn places(&self) -> Option<BTreeMap<i32, Place>> {
        let metadata = self.client.fetch_metadata(Some(&self.topic), CALL).ok()?;
        let mut wanted = TopicPartitionList::new();
        for partition in metadata.topics().first()?.partitions() {
            wanted.add_partition(&self.topic, partition.id());
        }
        let committed = self.client.committed_offsets(wanted, CALL).ok()?;
        let elements = committed.elements();
        let places = elements.iter().map(|element| {
            let (begin, end) = self.client.fetch_watermarks(&self.topic, element.partition(), CALL).ok()?;
            let Offset::Offset(committed) = element.offset() else {
                let place = Place { begin, committed: begin, is_new: true, end };
                return Some((element.partition(), place));
            };
            Some((element.partition(), Place { begin, committed, is_new: false, end }))
        });
        places.collect()
    }

    /// Records that are not committed, in all partitions.
    pub fn lag(&self) -> Option<i64> {
        Some(self.places()?.values().map(|place| place.end - place.committed).sum())
    }

    /// Sets the offset of a partition, once the group has no members any more.
    pub fn set(&self, partition: i32, offset: i64) {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.topic, partition, Offset::Offset(offset)).unwrap();
        let begun = Instant::now();
        while let Err(error) = self.client.commit(&list, CommitMode::Sync) {
            assert!(begun.elapsed() < PATIENCE, "cannot set an offset: {error}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Where a partition stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The first record that is still there.
    pub begin: i64,
    /// Where the group goes on; the beginning where it has committed nothing.
    pub committed: i64,
    /// Whether it has committed nothing: then nothing is missed that is gone.
    pub is_new: bool,
    /// The end of what can be read.
    pub end: i64,
}
