//! What the first document of a topic says of all of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rdkafka::Message as _;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use sluice_schemas::record::ContextPolicy;

use super::connection::{Broker, Listener, is_transient};
use super::decode::Decoder;
use super::error::{Origin, StreamError};
use super::kind::kind_of;
use super::place::Extent;

/// Longest wait between looks at whether somebody asked to stop.
const POLL: Duration = Duration::from_millis(50);

/// How the reference saw the first document of a scored topic: of the first partition that has one, so that the answer does
/// not depend on which answers first. Waits for a document where the topic is followed and holds none, and gives `None` where
/// it is not, or `stop` is set. A record that `decoder` refuses is an error.
pub fn first_context(
    broker: &Broker,
    topic: &str,
    extent: Extent,
    decoder: &Decoder,
    stop: &AtomicBool,
) -> Result<Option<ContextPolicy>, StreamError> {
    let (consumer, partitions) = broker.connect(topic, extent)?;
    for &partition in &partitions {
        let (low, high) = broker.watermarks(&consumer, topic, partition)?;
        if low < high {
            assign(broker, &consumer, topic, [(partition, low)])?;
            let found = wait_for_context(broker, &consumer, topic, Some(1), decoder, stop)?;
            if found.is_some() || stop.load(Ordering::Relaxed) {
                return Ok(found);
            }
        }
    }
    if extent != Extent::Follow {
        return Ok(None);
    }
    tracing::info!(topic, "waiting for the first document, which says how long the reference's windows are");
    // Another consumer: the same partitions assigned a second time would trip an assertion in librdkafka 2.12 (see `reader`).
    let (consumer, partitions) = broker.connect(topic, extent)?;
    let mut starts = Vec::with_capacity(partitions.len());
    for &partition in &partitions {
        starts.push((partition, broker.watermarks(&consumer, topic, partition)?.0));
    }
    assign(broker, &consumer, topic, starts)?;
    wait_for_context(broker, &consumer, topic, None, decoder, stop)
}

fn assign(
    broker: &Broker,
    consumer: &BaseConsumer<Listener>,
    topic: &str,
    starts: impl IntoIterator<Item = (i32, i64)>,
) -> Result<(), StreamError> {
    let mut assignment = TopicPartitionList::new();
    for (partition, offset) in starts {
        let added = assignment.add_partition_offset(topic, partition, Offset::Offset(offset));
        added.map_err(|error| broker.failed(topic, error, consumer.context().last_error()))?;
    }
    consumer.assign(&assignment).map_err(|error| broker.failed(topic, error, consumer.context().last_error()))
}

/// The context of the first document that arrives; `None` after so many ends of partitions, or where `stop` is set.
fn wait_for_context(
    broker: &Broker,
    consumer: &BaseConsumer<Listener>,
    topic: &str,
    ends: Option<usize>,
    decoder: &Decoder,
    stop: &AtomicBool,
) -> Result<Option<ContextPolicy>, StreamError> {
    let mut ended = 0;
    while !stop.load(Ordering::Relaxed) && ends != Some(ended) {
        match consumer.poll(POLL) {
            Some(Ok(message)) => {
                let Some(payload) = message.payload() else { continue };
                let (partition, offset) = (message.partition(), message.offset());
                let origin = || Origin { topic: topic.to_owned(), partition, offset };
                decoder.check_kind(kind_of(&message), origin)?;
                let (document, _) = decoder.decode(Bytes::copy_from_slice(payload), origin)?;
                return Ok(document.context());
            }
            Some(Err(KafkaError::PartitionEOF(_))) => ended += 1,
            Some(Err(error)) if is_transient(&error) => {
                tracing::warn!(topic, %error, "the broker has trouble; trying on");
            }
            Some(Err(error)) => return Err(broker.failed(topic, error, consumer.context().last_error())),
            None => {}
        }
    }
    Ok(None)
}
