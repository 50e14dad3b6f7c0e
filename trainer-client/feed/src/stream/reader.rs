//! The thread that polls a topic, buffers what comes, takes it in turn, decodes it and hands it over through a bounded channel.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
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
use super::fetch::Extent;
use super::place::{PartitionPosition, Position};
use super::rotation::{Range, Record, Rotation, Turn};
use super::throttle::{Stall, Throttle};
use crate::document::Document;

/// Documents that may wait decoded for the trainer.
pub(super) const QUEUE_DOCUMENTS_MAX: usize = 1024;
/// Tokens that may wait decoded for the trainer; one document more may exceed it.
const QUEUE_TOKENS_MAX: usize = 1 << 20;
/// Payload bytes that may wait over all partitions before they are paused.
const BUFFER_BYTES_MAX: usize = 64 << 20;
/// Longest silence between looks at the broker, and at whether the run was asked to stop.
pub(super) const POLL: Duration = Duration::from_millis(50);

/// What the reader thread hands over.
pub(super) struct Delivery {
    pub document: Document,
    pub epoch: u64,
    pub partition: i32,
    pub next_offset: i64,
    pub reference_model: Option<Fingerprint>,
}

/// The thread's side of the stream.
pub(super) struct Reader {
    pub broker: Broker,
    pub topic: String,
    pub consumer: BaseConsumer<Listener>,
    pub decoder: Decoder,
    pub sender: SyncSender<Result<Delivery, StreamError>>,
    pub queued_tokens: Arc<AtomicUsize>,
    pub closed: Arc<AtomicBool>,
}

impl Reader {
    /// Reads until everything has been handed over or the stream is closed; an error is handed over too.
    pub fn run(mut self, extent: Extent, start: &Position, lows: BTreeMap<i32, i64>) {
        if let Err(error) = self.read(extent, start, lows) {
            self.broker.telemetry().stream_failed(&error);
            // Nobody is left to hear it when this fails.
            let _ = self.sender.send(Err(error));
        }
    }

    /// Reads every pass from `start` on; `lows` are the first offsets that the partitions have.
    fn read(
        &mut self,
        extent: Extent,
        start: &Position,
        mut lows: BTreeMap<i32, i64>,
    ) -> Result<(), StreamError> {
        let Position { partitions, next_partition, .. } = start.clone();
        let Extent::UntilEnd { epochs } = extent else {
            let range = |at: PartitionPosition| Range { start: at.next_offset, end: None };
            let ranges = partitions.into_iter().map(|(partition, at)| (partition, range(at))).collect();
            return self.read_pass(1, &ranges, next_partition);
        };
        let own: Vec<i32> = partitions.keys().copied().collect();
        let mut is_assigned = false;
        // Partitions may be in different passes where other shards had read them.
        let first = partitions.values().map(|at| at.epoch).min().unwrap_or(1);
        for epoch in first..=epochs {
            if is_assigned {
                // A new consumer, because assigning the same partitions a second time and closing soon after trips an
                // assertion in librdkafka 2.12 (`rktp_started` in rd_kafka_assignment_partition_stopped).
                let (consumer, _) = self.broker.connect(&self.topic)?;
                // Retention may have moved the beginning while the last pass went on.
                let now = self.broker.offsets(&consumer, &self.topic, &own)?;
                lows.extend(now.into_iter().map(|(partition, (low, _))| (partition, low)));
                self.consumer = consumer;
                is_assigned = false;
            }
            let range = |(&partition, at): (&i32, &PartitionPosition)| {
                let start = match at.epoch.cmp(&epoch) {
                    std::cmp::Ordering::Less => lows[&partition],
                    std::cmp::Ordering::Equal => at.next_offset,
                    std::cmp::Ordering::Greater => at.end.unwrap_or(i64::MAX),
                };
                (partition, Range { start, end: at.end })
            };
            let ranges: BTreeMap<i32, Range> = partitions.iter().map(range).collect();
            if ranges.values().all(|range| range.end.is_some_and(|end| range.start >= end)) {
                continue;
            }
            is_assigned = true;
            // A turn belongs to the pass that it was left in; every other pass begins with the first partition.
            let turn = next_partition.filter(|_| epoch == start.epoch);
            self.read_pass(epoch, &ranges, turn)?;
            if self.closed.load(Ordering::Relaxed) {
                break;
            }
        }
        Ok(())
    }

    fn read_pass(
        &mut self,
        epoch: u64,
        ranges: &BTreeMap<i32, Range>,
        turn: Option<i32>,
    ) -> Result<(), StreamError> {
        self.assign(ranges)?;
        let mut rotation = Rotation::new(ranges).beginning_at(turn);
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
                None => match self.take(rotation) {
                    Turn::Done => return Ok(Handed::AllDone),
                    Turn::Waiting(partition) => {
                        stall.waiting(&self.topic, partition);
                        return Ok(Handed::Waiting);
                    }
                    // A tombstone holds no document; it only moves the offset.
                    Turn::Take(_, Record { payload: None, .. }) => {
                        self.broker.telemetry().skipped_tombstone();
                        continue;
                    }
                    Turn::Take(partition, Record { offset, payload: Some(payload), kind }) => {
                        stall.over();
                        self.decode(epoch, partition, offset, kind, payload)?
                    }
                },
            };
            let tokens = delivery.document.tokens().len();
            // Counted before it is sent, or the receiver could subtract first.
            self.queued_tokens.fetch_add(tokens, Ordering::Relaxed);
            self.broker.telemetry().queue(1);
            match self.sender.try_send(Ok(delivery)) {
                Ok(()) => {}
                Err(TrySendError::Full(Ok(delivery))) => {
                    self.queued_tokens.fetch_sub(tokens, Ordering::Relaxed);
                    self.broker.telemetry().queue(-1);
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

    /// The next record in the rotation.
    fn take(&self, rotation: &mut Rotation) -> Turn {
        let turn = rotation.take();
        if let Turn::Take(..) = turn {
            self.broker.telemetry().waiting_for_turn(-1);
        }
        turn
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
                    let record = Record { offset: message.offset(), payload, kind };
                    if rotation.arrive(message.partition(), record) {
                        self.broker.telemetry().waiting_for_turn(1);
                    }
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
