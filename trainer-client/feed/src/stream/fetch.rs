//! A Kafka topic as a stream of documents: the trainer's side of a thread that reads ahead.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer as _;
use sluice_kafka::TopicIds;
use sluice_schemas::fingerprint::Fingerprint;

use super::connection::Broker;
use super::decode::Decoder;
use super::error::{Origin, StreamError};
use super::place::{Extent, Position, Shard};
use super::provenance::{Contexts, Provenance};
use super::queue::{Delivery, Queues, Waiting};
use super::reader::Reader;
use super::start::starting_position;
use super::track::Track;
use super::{DocumentStream, Next};
use crate::observer::SharedObserver;

/// Longest wait between looks at whether somebody asked to stop.
const POLL: Duration = Duration::from_millis(50);
/// A lane that has given nothing for longer than this is worth a line.
const STALL: Duration = Duration::from_secs(5);
/// Between two words about the same stall.
const AGAIN: Duration = Duration::from_secs(30);

/// A topic's documents, each partition a lane.
#[derive(Debug)]
pub struct KafkaStream {
    topic: String,
    extent: Extent,
    lanes: usize,
    /// The rank's lanes and where they stand, in the order of their queues.
    own: Vec<(usize, Position)>,
    queues: Arc<Queues>,
    observer: SharedObserver,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
    provenance: Provenance,
    takes_several_models: bool,
    topics: Arc<TopicIds>,
}

/// Which part of a topic is read, and from where on.
#[derive(Clone, Debug)]
pub struct Start {
    /// The rank's lanes.
    pub shard: Shard,
    /// The topic's id before this place, where the broker told it.
    pub topic_id: Option<String>,
    /// Where lanes stand; one without a place is read from its first record.
    pub places: BTreeMap<usize, Position>,
    /// The reference model that documents before this place have shown.
    pub reference_model: Option<Fingerprint>,
    /// How each reference model saw the documents before this place.
    pub contexts: Contexts,
}

impl Start {
    /// The whole topic from its first records on.
    pub fn whole() -> Self {
        Self::of(Shard::WHOLE)
    }

    /// A rank's lanes from their first records on.
    pub fn of(shard: Shard) -> Self {
        Self {
            shard,
            topic_id: None,
            places: BTreeMap::new(),
            reference_model: None,
            contexts: Contexts::new(),
        }
    }
}

impl KafkaStream {
    /// Connects and starts reading a part of a topic. Ends early once `stop` is set.
    ///
    /// Fails within seconds where no broker answers, the topic does not exist, it is empty and not followed, retention has
    /// removed what was to be read next, or the topic has fewer partitions than the shard's group has ranks.
    pub fn open(
        broker: Broker,
        topic: &str,
        extent: Extent,
        start: Start,
        decoder: Decoder,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, StreamError> {
        let Start { shard, topic_id, places, reference_model, contexts } = start;
        let (consumer, partitions) = broker.connect(topic, extent)?;
        let topics = Arc::clone(consumer.context().topics());
        if let Some(id) = topic_id {
            topics.expect(topic, id);
        }
        let lanes = partitions.len();
        let mut own = Vec::new();
        let mut is_empty = true;
        for (lane, &partition) in partitions.iter().enumerate() {
            if !shard.owns(lane) {
                continue;
            }
            let offsets = broker.watermarks(&consumer, topic, partition)?;
            is_empty &= offsets.0 >= offsets.1;
            own.push((lane, starting_position((topic, partition), extent, offsets, places.get(&lane))?));
        }
        if extent != Extent::Follow && places.is_empty() && is_empty && shard == Shard::WHOLE {
            return Err(StreamError::EmptyTopic(topic.to_owned()));
        }
        let provenance = Provenance::new(!decoder.allowed().is_empty(), reference_model, contexts);
        let takes_several_models = decoder.allowed().len() > 1;
        let queues = Arc::new(Queues::new(own.len()));
        let observer = broker.observer().clone();
        let reader = Reader {
            broker,
            topic: topic.to_owned(),
            extent,
            consumer,
            decoder,
            tracks: own.iter().map(|(lane, position)| Track::new(partitions[*lane], position)).collect(),
            queues: Arc::clone(&queues),
        };
        let thread = std::thread::Builder::new()
            .name("stream".into())
            .spawn(move || reader.run())
            .map_err(|_| StreamError::ReaderGone(topic.to_owned()))?;
        Ok(Self {
            topic: topic.to_owned(),
            extent,
            lanes,
            own,
            queues,
            observer,
            stop,
            reader: Some(thread),
            provenance,
            takes_several_models,
            topics,
        })
    }

    /// Index of a lane's queue.
    fn queue_of(&self, lane: usize) -> usize {
        let index = self.own.iter().position(|(own, _)| *own == lane);
        index.unwrap_or_else(|| panic!("lane {lane} is one of this rank's"))
    }
}

impl DocumentStream for KafkaStream {
    fn lanes(&self) -> usize {
        self.lanes
    }

    fn next_document(&mut self, lane: usize) -> Result<Next, StreamError> {
        let queue = self.queue_of(lane);
        let mut stall = Stall::default();
        while !self.stop.load(Ordering::Relaxed) {
            match self.queues.take(queue, POLL) {
                Waiting::Delivery(Delivery { document, epoch, offset, reference_model }) => {
                    self.observer.queued(-1);
                    if let (Some(model), Some(context)) = (reference_model, document.context()) {
                        let topic = &self.topic;
                        let origin = || Origin { topic: topic.clone(), partition: lane as i32, offset };
                        self.provenance.admit(model, context, origin).inspect_err(|error| {
                            error.rejection().into_iter().for_each(|reason| self.observer.rejected(reason));
                        })?;
                    }
                    let position = &mut self.own[queue].1;
                    (position.epoch, position.next_offset) = (epoch, offset + 1);
                    position.documents += 1;
                    return Ok(Next::Document(document));
                }
                Waiting::Ended => return Ok(Next::Ended),
                Waiting::Failed(error) => return Err(error),
                Waiting::Gone => return Err(StreamError::ReaderGone(self.topic.clone())),
                Waiting::Nothing => stall.waiting(&self.topic, lane, self.extent),
            }
        }
        Ok(Next::Stopped)
    }

    fn position(&self, lane: usize) -> Position {
        self.own[self.queue_of(lane)].1
    }

    fn contexts(&self) -> Contexts {
        self.provenance.contexts().clone()
    }

    fn reference_model(&self) -> Option<Fingerprint> {
        self.provenance.reference_model()
    }

    fn takes_several_models(&self) -> bool {
        self.takes_several_models
    }

    fn topic_id(&self) -> Option<String> {
        self.topics.id(&self.topic)
    }
}

impl Drop for KafkaStream {
    fn drop(&mut self) {
        // The reader waits for nobody here, so it sees this within a poll.
        self.queues.close();
        if let Some(reader) = self.reader.take() {
            // A panic there has nothing to add to what this side already reports.
            let _ = reader.join();
        }
        self.observer.queued(-(self.queues.waiting() as i64));
    }
}

/// Says now and then that a lane keeps the stream waiting.
#[derive(Default)]
struct Stall {
    since: Option<Instant>,
    said: u32,
}

impl Stall {
    fn waiting(&mut self, topic: &str, lane: usize, extent: Extent) {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() > STALL + AGAIN * self.said {
            self.said += 1;
            let hint = if extent == Extent::Follow {
                "; micro-batches come from all partitions in turn"
            } else {
                ""
            };
            tracing::info!(
                topic,
                "waiting for partition {lane}: it is its turn, and it holds no new record{hint}"
            );
        }
    }
}
