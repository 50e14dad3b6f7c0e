//! Whether anything comes out: a reader of committed records that runs while the faults act, and the longest time that a
//! partition with records to read stood still although the brokers and the way to them were well.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::metadata::MetadataTopic;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use sluice_schemas::record::ScoredDocument;

use crate::Kafka;

const POLL: Duration = Duration::from_millis(50);
/// How often the topics are asked for partitions that are new.
const LOOK: Duration = Duration::from_secs(1);
const CALL: Duration = Duration::from_secs(2);

/// A time in which nothing came out of a partition that had something.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    /// How long it was.
    pub length: Duration,
    /// Of the documents topic.
    pub partition: i32,
    /// When it ended, or was last looked at, after the watch began.
    pub until: Duration,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} s (partition {}, at {:.0} s)",
            self.length.as_secs_f64(),
            self.partition,
            self.until.as_secs_f64()
        )
    }
}

/// A partition of the documents topic.
#[derive(Debug)]
struct Lane {
    /// Records that are there and have not come out.
    waiting: HashSet<String>,
    /// When it was last empty, or something came out of it.
    moved: Instant,
    longest: Stall,
    /// The longest since a member of the group was last disturbed.
    recovery: Stall,
}

#[derive(Debug)]
struct State {
    begun: Instant,
    lanes: BTreeMap<i32, Lane>,
    partitions: HashMap<String, i32>,
    /// Came out before its own acknowledgement was heard.
    early: HashSet<String>,
    /// Since when a partition should move; nothing while it cannot.
    well_since: Option<Instant>,
    /// When a member of the group last went, came or fell silent.
    disturbed: Instant,
}

impl State {
    /// Notes how long each partition stands still by now.
    fn look(&mut self, now: Instant) {
        let Some(well_since) = self.well_since else { return };
        for (&partition, lane) in self.lanes.iter_mut().filter(|(_, lane)| !lane.waiting.is_empty()) {
            let length = now.saturating_duration_since(lane.moved.max(well_since));
            let until = now - self.begun;
            if length > lane.longest.length {
                lane.longest = Stall { length, partition, until };
            }
            let length = length.min(now.saturating_duration_since(self.disturbed));
            if length > lane.recovery.length {
                lane.recovery = Stall { length, partition, until };
            }
        }
    }

    fn move_on(&mut self, name: &str, now: Instant) {
        let Some(&partition) = self.partitions.get(name) else {
            self.early.insert(name.to_owned());
            return;
        };
        self.look(now);
        if let Some(lane) = self.lanes.get_mut(&partition) {
            lane.waiting.remove(name);
            lane.moved = now;
        }
    }
}

/// What is waited for, and since when.
#[derive(Clone, Debug)]
pub struct Watch(Arc<Mutex<State>>);

impl Default for Watch {
    /// Of partitions that should move from now on.
    fn default() -> Self {
        let now = Instant::now();
        Self(Arc::new(Mutex::new(State {
            begun: now,
            lanes: BTreeMap::new(),
            partitions: HashMap::new(),
            early: HashSet::new(),
            well_since: Some(now),
            disturbed: now,
        })))
    }
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A record is in a partition of the documents topic.
    pub fn acknowledged(&self, name: &str, partition: i32) {
        let mut state = self.lock();
        let now = Instant::now();
        state.partitions.insert(name.to_owned(), partition);
        let came_out = state.early.remove(name);
        let lane = state.lanes.entry(partition).or_insert_with(|| Lane {
            waiting: HashSet::new(),
            moved: now,
            longest: Stall { partition, ..Stall::default() },
            recovery: Stall { partition, ..Stall::default() },
        });
        if came_out || lane.waiting.is_empty() {
            lane.moved = now;
        }
        if !came_out {
            lane.waiting.insert(name.to_owned());
        }
    }

    /// A record came out, or will never.
    pub fn finished(&self, name: &str) {
        self.lock().move_on(name, Instant::now());
    }

    /// From now on partitions should move, or cannot.
    pub fn set_well(&self, well: bool) {
        let mut state = self.lock();
        let now = Instant::now();
        state.look(now);
        state.well_since = well.then_some(now);
    }

    /// A member of the group goes, comes or falls silent: its partitions may wait for the end of its session.
    pub fn disturb(&self) {
        let mut state = self.lock();
        let now = Instant::now();
        state.look(now);
        state.disturbed = now;
    }

    /// Runs `act` while partitions cannot move.
    pub fn unwell<T>(&self, act: impl FnOnce() -> T) -> T {
        self.set_well(false);
        let outcome = act();
        self.set_well(true);
        outcome
    }

    /// The longest time that each partition stood still, and the longest after members of the group were last disturbed.
    pub fn stalls(&self) -> Vec<(Stall, Stall)> {
        let mut state = self.lock();
        state.look(Instant::now());
        state.lanes.values().map(|lane| (lane.longest, lane.recovery)).collect()
    }

    /// The longest of all, of both.
    pub fn longest(&self) -> (Stall, Stall) {
        longest(&self.stalls())
    }
}

/// The longest of all, of both.
pub(super) fn longest(stalls: &[(Stall, Stall)]) -> (Stall, Stall) {
    let of = |part: fn(&(Stall, Stall)) -> Stall| {
        stalls.iter().map(part).max_by_key(|stall| stall.length).unwrap_or_default()
    };
    (of(|both| both.0), of(|both| both.1))
}

/// The name of what came out: a document's id, or the key of a dead letter.
pub(super) fn name_of(scored: bool, key: Option<&[u8]>, payload: Option<&[u8]>) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !scored {
        return text(key.unwrap_or_default());
    }
    let payload = payload.unwrap_or_default().to_vec();
    ScoredDocument::decode(payload.into()).map_or_else(|error| format!("({error})"), |it| it.document.id)
}

/// A thread that reads what comes out, until it is told to end.
pub struct Reader {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Reader {
    /// Reads `scored` and `dead_letters` from their beginning, and tells `watch`.
    pub fn start(kafka: &Kafka, scored: &str, dead_letters: &str, watch: Watch) -> Self {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &kafka.bootstrap_servers)
            .set("group.id", "watch")
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_committed")
            // It must not be what a broker that is back waits for.
            .set("reconnect.backoff.max.ms", "200")
            .set("topic.metadata.refresh.interval.ms", "1000")
            .create()
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (stop, topics) = (Arc::clone(&stop), [scored.to_owned(), dead_letters.to_owned()]);
            move || {
                let mut assigned = HashSet::new();
                let mut looked = None::<Instant>;
                while !stop.load(Ordering::Relaxed) {
                    if looked.is_none_or(|at| at.elapsed() > LOOK) {
                        looked = Some(Instant::now());
                        assign_new(&consumer, &topics, &mut assigned);
                    }
                    if let Some(Ok(message)) = consumer.poll(POLL) {
                        watch.finished(&name(&message, &topics[0]));
                    }
                    watch.lock().look(Instant::now());
                }
            }
        });
        Self { stop, thread }
    }

    /// Ends it.
    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

fn name(message: &BorrowedMessage<'_>, scored: &str) -> String {
    name_of(message.topic() == scored, message.key(), message.payload())
}

/// Takes up the partitions that are new.
fn assign_new(consumer: &BaseConsumer, topics: &[String], assigned: &mut HashSet<(String, i32)>) {
    let mut new = TopicPartitionList::new();
    for topic in topics {
        let Ok(metadata) = consumer.fetch_metadata(Some(topic), CALL) else { continue };
        for partition in metadata.topics().iter().flat_map(MetadataTopic::partitions) {
            if assigned.insert((topic.clone(), partition.id())) {
                new.add_partition_offset(topic, partition.id(), Offset::Beginning).unwrap();
            }
        }
    }
    if new.count() > 0 {
        consumer.incremental_assign(&new).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_stands_still_while_it_has_something_and_the_brokers_are_well() {
        let watch = Watch::default();
        let begun = watch.lock().begun;
        let at = |seconds| begun + Duration::from_secs(seconds);
        watch.acknowledged("a", 3);
        watch.acknowledged("b", 3);
        {
            let mut state = watch.lock();
            state.lanes.get_mut(&3).unwrap().moved = begun;
            state.move_on("a", at(4));
            assert_eq!(state.lanes[&3].longest.length, Duration::from_secs(4));
            // An outage, in which nothing is to be expected, and after which the time is counted anew.
            state.look(at(6));
            state.well_since = None;
            state.look(at(30));
            state.well_since = Some(at(30));
            state.move_on("b", at(35));
            assert_eq!(state.lanes[&3].longest.length, Duration::from_secs(5));
            // Nothing waits.
            state.look(at(90));
        }
        assert_eq!(watch.longest().0.length, Duration::from_secs(5));
        assert_eq!(watch.longest().0.partition, 3);
    }

    #[test]
    fn the_time_in_which_a_group_recovers_is_counted_from_its_last_loss() {
        let watch = Watch::default();
        watch.acknowledged("a", 0);
        let mut state = watch.lock();
        let begun = state.lanes[&0].moved;
        state.look(begun + Duration::from_secs(6));
        state.disturbed = begun + Duration::from_secs(6);
        state.move_on("a", begun + Duration::from_secs(13));
        let lane = &state.lanes[&0];
        assert_eq!(lane.longest.length, Duration::from_secs(13));
        assert_eq!(lane.recovery.length, Duration::from_secs(7));
    }

    #[test]
    fn what_came_out_before_it_was_acknowledged_is_not_waited_for() {
        let watch = Watch::default();
        watch.finished("a");
        watch.acknowledged("a", 0);
        assert!(watch.lock().lanes[&0].waiting.is_empty());
    }
}
