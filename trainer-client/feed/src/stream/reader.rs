//! The thread that polls a topic, keeps what comes by partition, decodes it and hands it over as there is room.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::Message;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::connection::{Broker, Listener, is_transient};
use super::decode::Decoder;
use super::error::{Origin, StreamError};
use super::kind::kind_of;
use super::place::Extent;
use super::queue::{Delivery, Queues};
use super::throttle::Throttle;
use super::track::{Progress, Record, Track};

/// Tokens that may wait decoded, over all lanes; one document more in each may exceed it.
const QUEUE_TOKENS_MAX: usize = 1 << 20;
/// Payload bytes that may wait over all partitions before they are paused.
const BUFFER_BYTES_MAX: usize = 64 << 20;
/// Longest silence between looks at the broker, and at whether the stream was left.
const POLL: Duration = Duration::from_millis(50);
/// Between two questions where partitions end.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Longest time that a change of place may take.
const SEEK_MAX: Duration = Duration::from_secs(10);

/// The thread's side of a stream.
pub(super) struct Reader {
    pub broker: Broker,
    pub topic: String,
    pub extent: Extent,
    pub consumer: BaseConsumer<Listener>,
    pub decoder: Decoder,
    /// The rank's partitions, in the order of the queues.
    pub tracks: Vec<Track>,
    pub queues: Arc<Queues>,
}

impl Reader {
    /// Reads until everything has been handed over or the stream is left; an error is handed over too.
    pub fn run(mut self) {
        let read = self.read();
        let waiting: usize = self.tracks.iter().map(Track::buffered).sum();
        self.broker.observer().fetched(-(waiting as i64));
        self.queues.leave(read.err());
    }

    fn read(&mut self) -> Result<(), StreamError> {
        for lane in 0..self.tracks.len() {
            self.pass_on(lane)?;
        }
        self.assign()?;
        let mut throttle = Throttle::new(BUFFER_BYTES_MAX / self.tracks.len().max(1));
        let mut asked = None;
        while !self.queues.is_closed() {
            self.hand_over();
            if self.is_done() {
                break;
            }
            throttle.apply(&self.consumer, &self.topic, &self.tracks).map_err(|error| self.failed(error))?;
            self.poll()?;
            self.consumer.context().check_topic(&self.topic)?;
            for lane in 0..self.tracks.len() {
                if self.pass_on(lane)? {
                    throttle
                        .resume(&self.consumer, &self.topic, &self.tracks[lane])
                        .map_err(|error| self.failed(error))?;
                    self.seek(lane)?;
                }
            }
            self.confirm_ends(&mut asked)?;
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.tracks.iter().all(|track| track.progress() == Progress::Ended && track.buffered() == 0)
    }

    /// Begins a lane's next pass where one is read; whether its reading goes on elsewhere now.
    fn pass_on(&mut self, lane: usize) -> Result<bool, StreamError> {
        let mut has_begun = false;
        while self.tracks[lane].progress() == Progress::PassRead {
            let track = &mut self.tracks[lane];
            if self.extent.epochs().is_none_or(|epochs| track.epoch() >= epochs) {
                track.finish();
                return Ok(false);
            }
            // Retention may have moved the beginning since the last pass began.
            let (low, _) = match self.broker.watermarks(&self.consumer, &self.topic, track.partition()) {
                Ok(offsets) => offsets,
                Err(error @ StreamError::Unreachable { .. }) => {
                    tracing::warn!(topic = self.topic, %error, "the broker has trouble; trying on");
                    return Ok(false);
                }
                Err(error) => return Err(error),
            };
            track.begin_pass(low);
            has_begun = true;
            let removed = low.min(track.end().unwrap_or(low)) - track.first_offset();
            if removed > 0 {
                tracing::warn!(
                    topic = self.topic,
                    partition = track.partition(),
                    pass = track.epoch(),
                    "retention has removed up to {removed} records that the first pass read; this pass goes without them"
                );
                self.broker.observer().removed(removed as u64);
            }
        }
        Ok(has_begun)
    }

    fn assign(&self) -> Result<(), StreamError> {
        let mut assignment = TopicPartitionList::new();
        for track in self.tracks.iter().filter(|track| track.progress() != Progress::Ended) {
            assignment
                .add_partition_offset(&self.topic, track.partition(), Offset::Offset(track.expected_offset()))
                .map_err(|error| self.failed(error))?;
        }
        self.consumer.assign(&assignment).map_err(|error| self.failed(error))
    }

    /// Goes on where the track does. A second assignment instead would trip an assertion in librdkafka 2.12
    /// (`rktp_started` in `rd_kafka_assignment_partition_stopped`) where the consumer is closed soon after.
    fn seek(&self, lane: usize) -> Result<(), StreamError> {
        let track = &self.tracks[lane];
        let offset = Offset::Offset(track.expected_offset());
        self.consumer
            .seek(&self.topic, track.partition(), offset, SEEK_MAX)
            .map_err(|error| self.failed(error))
    }

    /// Asks for the end of partitions that the broker ended before their pass does, and fetches the rest once more where
    /// the broker has all of it by now. What it had before may have been a replica that lags behind.
    fn confirm_ends(&mut self, asked: &mut Option<Instant>) -> Result<(), StreamError> {
        let early: Vec<usize> = (0..self.tracks.len())
            .filter(|&lane| self.tracks[lane].progress() == Progress::EndedEarly)
            .collect();
        if early.is_empty() || asked.is_some_and(|at| at.elapsed() < ASK_AGAIN) {
            return Ok(());
        }
        let mut is_short = false;
        for lane in early {
            let track = &mut self.tracks[lane];
            match self.broker.watermarks(&self.consumer, &self.topic, track.partition()) {
                Ok((_, high)) if track.end().is_none_or(|end| high >= end) => {
                    track.confirm();
                    self.seek(lane)?;
                }
                Ok(_) => is_short = true,
                Err(error @ StreamError::Unreachable { .. }) => {
                    tracing::warn!(topic = self.topic, %error, "the broker has trouble; trying on");
                    is_short = true;
                }
                Err(error) => return Err(error),
            }
        }
        // A partition that is complete need not wait; one that is short is asked for now and then.
        *asked = is_short.then(Instant::now);
        Ok(())
    }

    /// Decodes what waits, and hands over documents to the lanes that have room.
    fn hand_over(&mut self) {
        let tokens_max = QUEUE_TOKENS_MAX / self.tracks.len().max(1);
        for (lane, track) in self.tracks.iter_mut().enumerate() {
            while self.queues.tokens(lane) < tokens_max {
                let Some(record) = track.take() else {
                    if track.progress() == Progress::Ended {
                        self.queues.end(lane, None);
                    }
                    break;
                };
                self.broker.observer().fetched(-1);
                let Record { epoch, offset, payload, kind } = record;
                // A tombstone holds no document; it only moves the offset.
                let Some(payload) = payload else {
                    self.broker.observer().tombstone();
                    continue;
                };
                let origin = || Origin { topic: self.topic.clone(), partition: track.partition(), offset };
                let decoded =
                    self.decoder.check_kind(kind, origin).and_then(|()| self.decoder.decode(payload, origin));
                match decoded {
                    Ok((document, reference_model)) => {
                        self.broker.observer().queued(1);
                        self.queues.push(lane, Delivery { document, epoch, offset, reference_model });
                    }
                    Err(error) => {
                        if let Some(reason) = error.rejection() {
                            self.broker.observer().rejected(reason);
                        }
                        track.finish();
                        self.broker.observer().fetched(-(track.discard() as i64));
                        self.queues.end(lane, Some(error));
                        break;
                    }
                }
            }
        }
    }

    /// Waits a moment for the broker, then takes whatever else has been fetched.
    fn poll(&mut self) -> Result<(), StreamError> {
        let mut timeout = POLL;
        let mut bytes: usize = self.tracks.iter().map(Track::buffered_bytes).sum();
        while let Some(polled) = self.consumer.poll(timeout) {
            timeout = Duration::ZERO;
            // Before what was polled: the client tells of it before the first record of the new topic.
            self.consumer.context().check_topic(&self.topic)?;
            match polled {
                Ok(message) => {
                    let Some(track) = track_of(&mut self.tracks, message.partition()) else { continue };
                    let payload = message.payload().map(Bytes::copy_from_slice);
                    let size = payload.as_ref().map_or(0, Bytes::len);
                    if track.arrive(message.offset(), payload, kind_of(&message)) {
                        bytes += size;
                        self.broker.observer().fetched(1);
                    }
                    // Hand over early: a large fetch should not be copied whole before the trainer sees any of it.
                    if bytes >= BUFFER_BYTES_MAX {
                        return Ok(());
                    }
                }
                Err(KafkaError::PartitionEOF(partition)) => {
                    if let Some(track) = track_of(&mut self.tracks, partition) {
                        track.reached_end();
                    }
                }
                Err(error) if is_transient(&error) => {
                    tracing::warn!(topic = self.topic, %error, "the broker has trouble; trying on");
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    fn failed(&self, error: KafkaError) -> StreamError {
        self.broker.failed(&self.topic, error, self.consumer.context().last_error())
    }
}

fn track_of(tracks: &mut [Track], partition: i32) -> Option<&mut Track> {
    tracks.iter_mut().find(|track| track.partition() == partition)
}
