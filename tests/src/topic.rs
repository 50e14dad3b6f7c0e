//! Writing to topics and reading them whole.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList, TopicPartitionListElem};
use rdkafka::types::RDKafkaErrorCode;

const PATIENCE: Duration = Duration::from_mins(1);

/// A record as it stands in a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its key.
    pub key: Option<Bytes>,
    /// Its payload; nothing for a tombstone.
    pub payload: Option<Bytes>,
    /// Its headers.
    pub headers: BTreeMap<String, String>,
}

/// Publishes records of key and payload, and waits until the broker has them.
pub fn produce(bootstrap_servers: &str, topic: &str, records: &[(&str, Option<Bytes>)]) {
    produce_to(bootstrap_servers, topic, None, records);
}

/// The same to one partition, whatever the keys.
pub fn produce_to(
    bootstrap_servers: &str,
    topic: &str,
    partition: Option<i32>,
    records: &[(&str, Option<Bytes>)],
) {
    let producer: ThreadedProducer<rdkafka::producer::DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", bootstrap_servers)
        .set("message.max.bytes", "10000000")
        // As the daemon does, so that a document's two partitions have the same number.
        .set("partitioner", "murmur2_random")
        .create()
        .unwrap();
    for (key, payload) in records {
        let mut record = BaseRecord::<str, [u8]>::to(topic).key(key);
        if let Some(payload) = payload {
            record = record.payload(payload.as_ref());
        }
        record.partition = partition;
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(PATIENCE).unwrap();
}

/// Publishes one record without a key, and waits until the broker has it.
pub fn produce_keyless(bootstrap_servers: &str, topic: &str, payload: &[u8]) {
    let producer: ThreadedProducer<rdkafka::producer::DefaultProducerContext> =
        ClientConfig::new().set("bootstrap.servers", bootstrap_servers).create().unwrap();
    producer.send(BaseRecord::<str, [u8]>::to(topic).payload(payload)).map_err(|(error, _)| error).unwrap();
    producer.flush(PATIENCE).unwrap();
}

/// Whether the client goes on by itself after an error.
fn is_passing(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{AllBrokersDown, BrokerTransportFailure, OperationTimedOut, Resolve};
    let code = error.rdkafka_error_code();
    matches!(code, Some(AllBrokersDown | BrokerTransportFailure | OperationTimedOut | Resolve))
}

/// Everything that stands in `topic` now, by partition and offset.
pub fn read_all(bootstrap_servers: &str, topic: &str) -> Vec<Record> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", bootstrap_servers)
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true")
        .create()
        .unwrap();
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE).unwrap();
    let mut assignment = TopicPartitionList::new();
    for partition in metadata.topics()[0].partitions() {
        assignment.add_partition_offset(topic, partition.id(), Offset::Beginning).unwrap();
    }
    consumer.assign(&assignment).unwrap();
    let mut records = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    let mut unread: HashSet<i32> =
        assignment.elements().iter().map(TopicPartitionListElem::partition).collect();
    while !unread.is_empty() {
        assert!(Instant::now() < deadline, "partitions {unread:?} of {topic} have no end");
        let message = match consumer.poll(Duration::from_millis(100)) {
            None => continue,
            // The end is told by the broker: offsets are not all records, some mark transactions.
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                unread.remove(&partition);
                continue;
            }
            // A broker that is gone is no end of what the others hold.
            Some(Err(error)) if is_passing(&error) => continue,
            Some(message) => message.unwrap(),
        };
        let headers = message.headers().map(|headers| {
            let text = |value: Option<&[u8]>| String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
            headers.iter().map(|header| (header.key.to_owned(), text(header.value))).collect()
        });
        records.push(Record {
            partition: message.partition(),
            offset: message.offset(),
            key: message.key().map(Bytes::copy_from_slice),
            payload: message.payload().map(Bytes::copy_from_slice),
            headers: headers.unwrap_or_default(),
        });
    }
    records.sort_by_key(|record| (record.partition, record.offset));
    records
}
