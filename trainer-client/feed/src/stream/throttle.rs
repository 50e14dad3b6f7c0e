//! Back-pressure to the broker.

use std::collections::BTreeSet;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::TopicPartitionList;

use super::connection::Listener;
use super::track::{Progress, Track};

/// Pauses partitions whose buffers are full; resumes them with wide hysteresis, because a pause drops what
/// librdkafka had fetched ahead. Its state cannot be asked for, so it is kept here.
pub(super) struct Throttle {
    bytes_max: usize,
    paused: BTreeSet<i32>,
}

impl Throttle {
    /// Lets each partition buffer `bytes_max` bytes, and one fetch more.
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, paused: BTreeSet::new() }
    }

    /// Pauses and resumes according to what waits; a partition that has ended stays paused.
    pub fn apply(
        &mut self,
        consumer: &BaseConsumer<Listener>,
        topic: &str,
        tracks: &[Track],
    ) -> Result<(), KafkaError> {
        for track in tracks {
            let is_paused = self.paused.contains(&track.partition());
            let bytes_max = if is_paused { self.bytes_max / 4 } else { self.bytes_max };
            let has_ended = track.progress() == Progress::Ended;
            let is_full = has_ended || track.buffered_bytes() > bytes_max;
            if is_full && !is_paused {
                consumer.pause(&only(topic, track.partition()))?;
                self.paused.insert(track.partition());
            } else if !is_full {
                self.resume(consumer, topic, track)?;
            }
        }
        Ok(())
    }

    /// Resumes a partition if it is paused.
    pub fn resume(
        &mut self,
        consumer: &BaseConsumer<Listener>,
        topic: &str,
        track: &Track,
    ) -> Result<(), KafkaError> {
        if self.paused.remove(&track.partition()) {
            consumer.resume(&only(topic, track.partition()))?;
        }
        Ok(())
    }
}

fn only(topic: &str, partition: i32) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, partition);
    list
}
