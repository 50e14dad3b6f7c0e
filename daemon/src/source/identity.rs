//! Whether the documents topic is still the one whose records were read, and whose offsets were committed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::topic_partition_list::Offset;
use sluice_kafka::{MadeAnew, TopicIds};

use super::offsets::Committed;

/// How long the offsets of a topic that was deleted may outlive it: the group's coordinator hears of that a little later.
const LINGER: Duration = Duration::from_secs(5);

/// The id of the documents topic, where the brokers tell one, and what follows from it.
#[derive(Debug)]
pub(super) struct Identity {
    topic: String,
    ids: TopicIds,
    was_made_anew: AtomicBool,
    /// Partitions with an offset of another topic: since when, and what of it in words.
    foreign: Mutex<BTreeMap<i32, (Instant, String)>>,
    /// Partitions with an offset below which everything was published to the scored topic of this id.
    published: Mutex<BTreeMap<i32, String>>,
}

impl Identity {
    /// Of a topic whose id is not heard of yet.
    pub(super) fn new(topic: String) -> Self {
        let (ids, was_made_anew, foreign) = (TopicIds::default(), AtomicBool::new(false), Mutex::default());
        Self { topic, ids, was_made_anew, foreign, published: Mutex::default() }
    }

    /// Takes a line of the client's log.
    pub(super) fn hear(&self, facility: &str, message: &str) {
        self.ids.hear(facility, message);
    }

    /// The id of the topic whose records are read.
    pub(super) fn id(&self) -> Option<String> {
        self.ids.id(&self.topic)
    }

    /// Whether the name stands for another topic by now.
    pub(super) fn made_anew(&self) -> Option<MadeAnew> {
        self.ids.made_anew(&self.topic)
    }

    /// From here on the new topic's records are read.
    pub(super) fn take(&self) {
        self.was_made_anew.store(true, Ordering::SeqCst);
        self.ids.take(&self.topic);
    }

    /// Whether what is committed of `partition` is an offset in another topic of this name. One without an id was
    /// committed by an earlier version, or by a person, and is believed unless the topic was made anew meanwhile.
    pub(super) fn is_foreign(&self, partition: i32, committed: &Committed) -> bool {
        let Some(id) = self.id() else { return false };
        let is_foreign = match (committed.offset, &committed.mark.documents) {
            (Offset::Offset(_), Some(other)) => *other != id,
            (Offset::Offset(_), None) => self.was_made_anew.load(Ordering::SeqCst),
            _ => false,
        };
        let mut foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        if is_foreign {
            let offset = committed.offset.to_raw().unwrap_or_default();
            let (topic, other) = (&self.topic, committed.mark.documents.as_deref().unwrap_or("unknown"));
            let words = format!(
                "the group has committed offset {offset} of partition {partition} in another topic `{topic}` (id {other}) than \
                 the one that has the name now (id {id}): it was deleted and made anew, or is on another cluster; decide where \
                 to begin and set that partition alone, with all daemons of the group stopped: kafka-consumer-groups.sh \
                 --reset-offsets --topic {topic}:{partition} --to-earliest for all of its records, or --to-offset {offset}"
            );
            foreign.entry(partition).or_insert_with(|| (Instant::now(), words));
        } else {
            foreign.remove(&partition);
        }
        is_foreign
    }

    /// What is wrong with committed offsets for longer than it may be, in words.
    pub(super) fn complaint(&self) -> Option<String> {
        let foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        foreign.values().find(|(since, _)| since.elapsed() > LINGER).map(|(_, words)| words.clone())
    }

    /// Notes which scored topic a partition's records were published to.
    pub(super) fn note_published(&self, partition: i32, committed: &Committed) {
        let mut published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        match &committed.mark.scored {
            Some(id) => published.insert(partition, id.clone()),
            None => published.remove(&partition),
        };
    }

    /// A partition whose records were published to another scored topic than that of this id, and the id of that one.
    pub(super) fn published_elsewhere(&self, scored: &str) -> Option<(i32, String)> {
        let published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        let (&partition, other) = published.iter().find(|(_, id)| *id != scored)?;
        Some((partition, other.clone()))
    }

    /// Forgets about partitions that are another daemon's now.
    pub(super) fn give_up(&self, partitions: &[i32]) {
        self.published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|partition, _| !partitions.contains(partition));
        let mut foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        foreign.retain(|partition, _| !partitions.contains(partition));
    }
}
