//! Back-pressure to the broker, and a word to people when it is the broker who keeps us waiting.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::TopicPartitionList;

use super::connection::Listener;
use super::rotation::Rotation;

/// A partition waiting longer than this for its turn's record is worth a line.
const STALL: Duration = Duration::from_secs(5);
/// Between two words about the same stall.
const AGAIN: Duration = Duration::from_secs(30);

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

    /// Pauses and resumes according to what is buffered; a partition that has reached its end stays paused.
    pub fn apply(
        &mut self,
        consumer: &BaseConsumer<Listener>,
        topic: &str,
        rotation: &Rotation,
    ) -> Result<(), KafkaError> {
        for (partition, bytes, finished) in rotation.buffered() {
            let paused = self.paused.contains(&partition);
            let bytes_max = if paused { self.bytes_max / 4 } else { self.bytes_max };
            let full = finished || bytes > bytes_max;
            if full && !paused {
                consumer.pause(&only(topic, partition))?;
                self.paused.insert(partition);
            } else if paused && !full {
                consumer.resume(&only(topic, partition))?;
                self.paused.remove(&partition);
            }
        }
        Ok(())
    }
}

fn only(topic: &str, partition: i32) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, partition);
    list
}

/// Says now and then that a partition keeps the stream waiting.
#[derive(Default)]
pub(super) struct Stall {
    since: Option<Instant>,
    said: u32,
}

impl Stall {
    /// It is this partition's turn, and nothing has arrived.
    pub fn waiting(&mut self, topic: &str, partition: i32) {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() > STALL + AGAIN * self.said {
            self.said += 1;
            tracing::info!(
                topic,
                "waiting for partition {partition}: it is its turn, and it holds no new record; --until-end or --epochs \
                 would end here"
            );
        }
    }

    /// A record has arrived.
    pub fn over(&mut self) {
        *self = Self::default();
    }
}
