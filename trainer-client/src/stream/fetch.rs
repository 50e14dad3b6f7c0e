//! A Kafka topic as a stream of documents: one thread polls, buffers and decodes, a bounded channel hands over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use rdkafka::Message;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Headers;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names;

use super::connection::{Broker, Listener, is_unknown_topic};
use super::decode::{Decoder, TopicKind};
use super::error::{Origin, StreamError};
use super::rotation::{Range, Record, Rotation, Turn};
use super::throttle::{Stall, Throttle};
use super::{DocumentStream, Position};
use crate::document::Document;

/// Documents that may wait decoded for the trainer.
const QUEUE_DOCUMENTS_MAX: usize = 1024;
/// Tokens that may wait decoded for the trainer; one document more may exceed it.
const QUEUE_TOKENS_MAX: usize = 1 << 20;
/// Payload bytes that may wait over all partitions before they are paused.
const BUFFER_BYTES_MAX: usize = 64 << 20;
/// Longest silence between looks at the broker, and at whether the run was asked to stop.
const POLL: Duration = Duration::from_millis(50);

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

/// What the reader thread hands over.
struct Delivery {
    document: Document,
    epoch: u64,
    partition: i32,
    next_offset: i64,
    reference_model: Option<Fingerprint>,
}

/// A topic's documents in strict rotation over its partitions.
#[derive(Debug)]
pub struct KafkaStream {
    topic: String,
    deliveries: Receiver<Result<Delivery, StreamError>>,
    queued_tokens: Arc<AtomicUsize>,
    closed: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
    position: Position,
    reference_model: Option<Fingerprint>,
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
        let (consumer, partitions) = broker.connect(topic)?;
        let offsets = broker.offsets(&consumer, topic, &partitions)?;
        if extent != Extent::Follow && offsets.values().all(|(low, high)| low >= high) {
            return Err(StreamError::EmptyTopic(topic.to_owned()));
        }
        let (sender, deliveries) = mpsc::sync_channel(QUEUE_DOCUMENTS_MAX);
        let queued_tokens = Arc::new(AtomicUsize::new(0));
        let closed = Arc::new(AtomicBool::new(false));
        let position = Position {
            epoch: 1,
            offsets: offsets.iter().map(|(&partition, &(low, _))| (partition, low)).collect(),
            documents: 0,
        };
        let reader = Reader {
            broker,
            topic: topic.to_owned(),
            consumer,
            decoder,
            sender,
            queued_tokens: Arc::clone(&queued_tokens),
            closed: Arc::clone(&closed),
        };
        let thread = std::thread::Builder::new()
            .name("stream".into())
            .spawn(move || reader.run(extent, &offsets))
            .map_err(|_| StreamError::ReaderGone(topic.to_owned()))?;
        Ok(Self {
            topic: topic.to_owned(),
            deliveries,
            queued_tokens,
            closed,
            stop,
            reader: Some(thread),
            position,
            reference_model: None,
        })
    }
}

impl DocumentStream for KafkaStream {
    fn next_document(&mut self) -> Result<Option<Document>, StreamError> {
        while !self.stop.load(Ordering::Relaxed) {
            match self.deliveries.recv_timeout(POLL) {
                Ok(Ok(delivery)) => {
                    self.queued_tokens.fetch_sub(delivery.document.tokens().len(), Ordering::Relaxed);
                    self.position.epoch = delivery.epoch;
                    self.position.offsets.insert(delivery.partition, delivery.next_offset);
                    self.position.documents += 1;
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

/// The thread's side of the stream.
struct Reader {
    broker: Broker,
    topic: String,
    consumer: BaseConsumer<Listener>,
    decoder: Decoder,
    sender: SyncSender<Result<Delivery, StreamError>>,
    queued_tokens: Arc<AtomicUsize>,
    closed: Arc<AtomicBool>,
}

impl Reader {
    fn run(mut self, extent: Extent, offsets: &BTreeMap<i32, (i64, i64)>) {
        if let Err(error) = self.read(extent, offsets) {
            // Nobody is left to hear it when this fails.
            let _ = self.sender.send(Err(error));
        }
    }

    fn read(&mut self, extent: Extent, offsets: &BTreeMap<i32, (i64, i64)>) -> Result<(), StreamError> {
        let Extent::UntilEnd { epochs } = extent else {
            let ranges = offsets.iter().map(|(&p, &(low, _))| (p, Range { start: low, end: None })).collect();
            return self.read_pass(1, &ranges);
        };
        let mut starts: BTreeMap<i32, i64> = offsets.iter().map(|(&p, &(low, _))| (p, low)).collect();
        for epoch in 1..=epochs {
            let ranges = offsets
                .iter()
                .map(|(&p, &(_, high))| (p, Range { start: starts[&p], end: Some(high) }))
                .collect();
            self.read_pass(epoch, &ranges)?;
            if epoch == epochs || self.closed.load(Ordering::Relaxed) {
                break;
            }
            // A new consumer, because assigning the same partitions a second time and closing soon after trips an
            // assertion in librdkafka 2.12 (`rktp_started` in rd_kafka_assignment_partition_stopped).
            let (consumer, partitions) = self.broker.connect(&self.topic)?;
            // Retention may have moved the beginning while the last pass went on.
            let now = self.broker.offsets(&consumer, &self.topic, &partitions)?;
            starts.extend(now.into_iter().map(|(partition, (low, _))| (partition, low)));
            self.consumer = consumer;
        }
        Ok(())
    }

    fn read_pass(&mut self, epoch: u64, ranges: &BTreeMap<i32, Range>) -> Result<(), StreamError> {
        self.assign(ranges)?;
        let mut rotation = Rotation::new(ranges);
        let mut throttle = Throttle::new(BUFFER_BYTES_MAX / ranges.len().max(1));
        let mut stall = Stall::default();
        let mut refused = None;
        while !self.closed.load(Ordering::Relaxed) {
            let room = self.hand_over(epoch, &mut rotation, &mut refused, &mut stall)?;
            if room == Handed::AllDone {
                break;
            }
            throttle.apply(&self.consumer, &self.topic, &rotation).map_err(|error| self.failed(error))?;
            self.poll(&mut rotation)?;
        }
        Ok(())
    }

    fn assign(&self, ranges: &BTreeMap<i32, Range>) -> Result<(), StreamError> {
        let mut assignment = TopicPartitionList::new();
        for (&partition, range) in ranges {
            assignment
                .add_partition_offset(&self.topic, partition, Offset::Offset(range.start))
                .map_err(|error| self.failed(error))?;
        }
        self.consumer.assign(&assignment).map_err(|error| self.failed(error))
    }

    /// Hands documents over in rotation until the queue is full or the next one has not arrived.
    fn hand_over(
        &mut self,
        epoch: u64,
        rotation: &mut Rotation,
        refused: &mut Option<Delivery>,
        stall: &mut Stall,
    ) -> Result<Handed, StreamError> {
        loop {
            if self.queued_tokens.load(Ordering::Relaxed) >= QUEUE_TOKENS_MAX {
                return Ok(Handed::QueueFull);
            }
            let delivery = match refused.take() {
                Some(delivery) => delivery,
                None => match rotation.take() {
                    Turn::Done => return Ok(Handed::AllDone),
                    Turn::Waiting(partition) => {
                        stall.waiting(&self.topic, partition);
                        return Ok(Handed::Waiting);
                    }
                    // A tombstone holds no document; it only moves the offset.
                    Turn::Take(_, Record { payload: None, .. }) => continue,
                    Turn::Take(partition, Record { offset, payload: Some(payload), kind }) => {
                        stall.over();
                        self.decode(epoch, partition, offset, kind, payload)?
                    }
                },
            };
            let tokens = delivery.document.tokens().len();
            // Counted before it is sent, or the receiver could subtract first.
            self.queued_tokens.fetch_add(tokens, Ordering::Relaxed);
            match self.sender.try_send(Ok(delivery)) {
                Ok(()) => {}
                Err(TrySendError::Full(Ok(delivery))) => {
                    self.queued_tokens.fetch_sub(tokens, Ordering::Relaxed);
                    *refused = Some(delivery);
                    return Ok(Handed::QueueFull);
                }
                Err(_) => {
                    self.closed.store(true, Ordering::Relaxed);
                    return Ok(Handed::QueueFull);
                }
            }
        }
    }

    fn decode(
        &mut self,
        epoch: u64,
        partition: i32,
        offset: i64,
        kind: Option<TopicKind>,
        payload: Bytes,
    ) -> Result<Delivery, StreamError> {
        let origin = || Origin { topic: self.topic.clone(), partition, offset };
        self.decoder.check_kind(kind, origin)?;
        let document = self.decoder.decode(payload, origin)?;
        let reference_model = self.decoder.reference_model();
        Ok(Delivery { document, epoch, partition, next_offset: offset + 1, reference_model })
    }

    /// Waits a moment for the broker, then takes whatever else has been fetched.
    fn poll(&self, rotation: &mut Rotation) -> Result<(), StreamError> {
        let mut timeout = POLL;
        while let Some(polled) = self.consumer.poll(timeout) {
            timeout = Duration::ZERO;
            match polled {
                Ok(message) => {
                    let payload = message.payload().map(Bytes::copy_from_slice);
                    let kind = kind_of(&message);
                    rotation.arrive(message.partition(), Record { offset: message.offset(), payload, kind });
                    // Hand over early: a large fetch should not be copied whole before the trainer sees any of it.
                    if rotation.buffered().map(|(_, bytes, _)| bytes).sum::<usize>() >= BUFFER_BYTES_MAX {
                        return Ok(());
                    }
                }
                Err(KafkaError::PartitionEOF(partition)) => rotation.reached_end(partition),
                Err(error) if is_transient(&error) => {
                    tracing::warn!(topic = self.topic, %error, "the broker has trouble; trying on");
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    fn failed(&self, error: KafkaError) -> StreamError {
        if is_unknown_topic(&error) {
            return StreamError::NoSuchTopic {
                topic: self.topic.clone(),
                servers: self.broker.servers().to_owned(),
            };
        }
        StreamError::Broker {
            topic: self.topic.clone(),
            error: Box::new(error),
            reason: self.consumer.context().last_error(),
        }
    }
}

/// Why [`Reader::hand_over`] stopped.
#[derive(PartialEq, Eq)]
enum Handed {
    QueueFull,
    Waiting,
    AllDone,
}

/// What a record's header says that the record is.
fn kind_of(message: &impl Message) -> Option<TopicKind> {
    let headers = message.headers()?;
    let header = headers.iter().find(|header| header.key == names::RECORD_HEADER)?;
    TopicKind::of_header(header.value?)
}

/// Errors that librdkafka recovers from by itself.
fn is_transient(error: &KafkaError) -> bool {
    !matches!(error, KafkaError::MessageConsumptionFatal(_))
        && !matches!(
            error.rdkafka_error_code(),
            Some(
                RDKafkaErrorCode::AutoOffsetReset
                    | RDKafkaErrorCode::OffsetOutOfRange
                    | RDKafkaErrorCode::UnknownTopic
                    | RDKafkaErrorCode::UnknownTopicOrPartition
                    | RDKafkaErrorCode::UnknownPartition
                    | RDKafkaErrorCode::TopicAuthorizationFailed
                    | RDKafkaErrorCode::Authentication
                    | RDKafkaErrorCode::SaslAuthenticationFailed
            )
        )
}
