//! What the brokers say of offsets, one partition at a time.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::config::Kafka;
use crate::kafka::{self, Mark, PlainContext};

/// How long an onlooker waits for an answer that nobody needs at once.
const CALL: Duration = Duration::from_secs(1);

/// What the group has committed of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Committed {
    /// Where to begin reading: at the beginning where nothing is committed.
    pub(super) offset: Offset,
    /// The topics that it speaks of, where whoever committed it said so.
    pub(super) mark: Mark,
}

/// What the group has committed of `partition`.
///
/// librdkafka (2.12) asks again and again while an open transaction holds up the offset of any partition of the question,
/// until `timeout`: hence one partition at a time, and no thread that has anything else to do.
pub(super) fn committed<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partition: i32,
    timeout: Duration,
) -> KafkaResult<Committed> {
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, partition);
    let committed = consumer.committed_offsets(list, timeout)?;
    let unknown = KafkaError::OffsetFetch(RDKafkaErrorCode::UnknownPartition);
    let element = committed.find_partition(topic, partition).ok_or(unknown)?;
    element.error()?;
    Ok(match element.offset() {
        Offset::Offset(offset) => {
            Committed { offset: Offset::Offset(offset), mark: Mark::parse(element.metadata()) }
        }
        _ => Committed { offset: Offset::Beginning, mark: Mark::default() },
    })
}

/// A client that is no member of the group, and sees what the group has committed so far even where an open transaction
/// holds it up: good enough to count by, not to read on from.
pub(super) struct Onlooker<'a> {
    settings: &'a Kafka,
    /// Made once it is needed.
    client: Option<BaseConsumer<PlainContext>>,
}

impl<'a> Onlooker<'a> {
    /// One that is not connected yet.
    pub(super) fn new(settings: &'a Kafka) -> Self {
        Self { settings, client: None }
    }

    /// Records of `partition` that the group has not committed.
    pub(super) fn behind(&mut self, partition: i32) -> KafkaResult<u64> {
        let topic = &self.settings.documents_topic;
        let client = match self.client.take() {
            Some(client) => client,
            None => kafka::client_config(&self.settings.bootstrap_servers, &self.settings.properties)
                .set("group.id", &self.settings.group_id)
                .set("isolation.level", "read_uncommitted")
                .create_with_context(PlainContext::default())?,
        };
        let client = self.client.insert(client);
        // Runs its callbacks, without which it gets no token.
        drop(client.poll(Duration::ZERO));
        let (begin, end) = client.fetch_watermarks(topic, partition, CALL)?;
        let done = match committed(client, topic, partition, CALL)?.offset {
            Offset::Offset(offset) => offset.max(begin),
            _ => begin,
        };
        Ok(u64::try_from(end - done).unwrap_or(0))
    }
}
