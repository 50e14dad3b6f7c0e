//! A Kafka topic as a stream of documents: the trainer's side of a thread that reads ahead.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;

use sluice_schemas::fingerprint::Fingerprint;

use super::DocumentStream;
use super::connection::Broker;
use super::decode::{Contexts, Decoder};
use super::error::StreamError;
use super::place::{Position, Shard, starting_position};
use super::reader::{Delivery, POLL, QUEUE_DOCUMENTS_MAX, Reader};
use crate::document::Document;
use crate::telemetry::Telemetry;

/// How much of a topic to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Up to the end it has when the stream opens, this many times over.
    UntilEnd {
        /// Passes over the topic.
        epochs: u64,
    },
    /// For ever.
    Follow,
}

/// A topic's documents in strict rotation over its partitions.
#[derive(Debug)]
pub struct KafkaStream {
    topic: String,
    deliveries: Receiver<Result<Delivery, StreamError>>,
    queued_tokens: Arc<AtomicUsize>,
    telemetry: Telemetry,
    closed: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
    position: Position,
    reference_model: Option<Fingerprint>,
    /// Shares what it has seen with the reader's.
    decoder: Decoder,
}

impl KafkaStream {
    /// Connects and starts reading from the first retained record; ends early once `stop` is set.
    ///
    /// Fails within seconds where no broker answers, the topic does not exist, or it is empty and not followed.
    pub fn open(
        broker: Broker,
        topic: &str,
        extent: Extent,
        decoder: Decoder,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, StreamError> {
        Self::open_at(broker, topic, extent, (Shard::WHOLE, None), decoder, stop)
    }

    /// As [`KafkaStream::open`], for one shard of the topic, from a place on that this or other shards had reached.
    ///
    /// Fails where retention has removed what was to be read next, or the shard has no partition.
    pub fn open_at(
        broker: Broker,
        topic: &str,
        extent: Extent,
        (shard, place): (Shard, Option<&Position>),
        decoder: Decoder,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, StreamError> {
        let (consumer, all) = broker.connect(topic)?;
        let partitions: Vec<i32> = all.iter().copied().filter(|&partition| shard.owns(partition)).collect();
        if partitions.is_empty() {
            let world_size = shard.world_size;
            return Err(StreamError::NoPartitions {
                topic: topic.to_owned(),
                partitions: all.len(),
                world_size,
            });
        }
        let offsets = broker.offsets(&consumer, topic, &partitions)?;
        let is_empty = shard == Shard::WHOLE && offsets.values().all(|(low, high)| low >= high);
        if extent != Extent::Follow && place.is_none() && is_empty {
            return Err(StreamError::EmptyTopic(topic.to_owned()));
        }
        let position = starting_position(topic, extent, &offsets, place)?;
        let (sender, deliveries) = mpsc::sync_channel(QUEUE_DOCUMENTS_MAX);
        let queued_tokens = Arc::new(AtomicUsize::new(0));
        let closed = Arc::new(AtomicBool::new(false));
        let telemetry = broker.telemetry().clone();
        let start = position.clone();
        let lows = offsets.iter().map(|(&partition, &(low, _))| (partition, low)).collect();
        let reader = Reader {
            broker,
            topic: topic.to_owned(),
            consumer,
            decoder: decoder.clone(),
            sender,
            queued_tokens: Arc::clone(&queued_tokens),
            closed: Arc::clone(&closed),
        };
        let thread = std::thread::Builder::new()
            .name("stream".into())
            .spawn(move || reader.run(extent, &start, lows))
            .map_err(|_| StreamError::ReaderGone(topic.to_owned()))?;
        Ok(Self {
            topic: topic.to_owned(),
            deliveries,
            queued_tokens,
            telemetry,
            closed,
            stop,
            reader: Some(thread),
            position,
            reference_model: None,
            decoder,
        })
    }
}

impl KafkaStream {
    fn advance(&mut self, delivery: &Delivery) {
        let Position { epoch, partitions, next_partition, documents } = &mut self.position;
        *epoch = delivery.epoch;
        *documents += 1;
        if let Some(place) = partitions.get_mut(&delivery.partition) {
            (place.epoch, place.next_offset) = (delivery.epoch, delivery.next_offset);
        }
        // None after the last partition, when the first one's turn comes.
        *next_partition = partitions.range(delivery.partition + 1..).next().map(|(&partition, _)| partition);
    }
}

impl DocumentStream for KafkaStream {
    fn next_document(&mut self) -> Result<Option<Document>, StreamError> {
        while !self.stop.load(Ordering::Relaxed) {
            match self.deliveries.recv_timeout(POLL) {
                Ok(Ok(delivery)) => {
                    self.queued_tokens.fetch_sub(delivery.document.tokens().len(), Ordering::Relaxed);
                    self.telemetry.queue(-1);
                    self.advance(&delivery);
                    self.reference_model = delivery.reference_model;
                    return Ok(Some(delivery.document));
                }
                Ok(Err(error)) => return Err(error),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let panicked = self.reader.take().is_some_and(|reader| reader.join().is_err());
                    return if panicked {
                        Err(StreamError::ReaderGone(self.topic.clone()))
                    } else {
                        Ok(None)
                    };
                }
            }
        }
        Ok(None)
    }

    fn position(&self) -> Position {
        self.position.clone()
    }

    fn parts(&self) -> usize {
        self.position.partitions.len()
    }

    fn contexts(&self) -> Contexts {
        self.decoder.contexts()
    }

    fn reference_model(&self) -> Option<Fingerprint> {
        self.reference_model
    }
}

impl Drop for KafkaStream {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            // A panic there has nothing to add to what this side already reports.
            let _ = reader.join();
        }
    }
}
