//! Documents that retention removes before they were read, and the person who decides where to go on.

use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::Message as _;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::fault::Faults;
use super::inject::Scene;
use super::load::name;
use super::topics::Topics;
use crate::{Group, Kafka, Place};

/// How long a daemon may take to find out, start and rebalances included.
const SAID_WITHIN: Duration = Duration::from_secs(40);
const PATIENCE: Duration = Duration::from_secs(30);
const TURN: Duration = Duration::from_millis(100);

impl Scene<'_> {
    /// Stops the daemons, removes the first of what waits in a partition, and expects a daemon to end and to say how many
    /// records of which partition are gone. Then the offset is set as it says, and all go on. The removed are no loss of theirs.
    pub(super) fn make_gap(&mut self, faults: &mut Faults) {
        self.crew.settle();
        let group = Group::new(self.kafka, &self.topics.group, &self.topics.documents);
        // A group that has committed nothing begins with what is there, and misses nothing.
        let is_begun = |place: &Place| !place.is_new;
        let begun = Instant::now();
        while !group.places().is_some_and(|places| places.values().any(is_begun)) {
            assert!(begun.elapsed() < PATIENCE, "the group commits nothing");
            self.crew.wait(TURN);
        }
        self.watch.set_well(false);
        self.crew.stop();
        std::thread::sleep(faults.span(1000..2000));
        let begun = Instant::now();
        let places = loop {
            // What a killed daemon left open holds its offsets up until it is given up.
            if let Some(places) = group.places() {
                break places;
            }
            assert!(begun.elapsed() < PATIENCE, "nobody tells the group's offsets");
        };
        let begun = places.iter().filter(|(_, place)| is_begun(place));
        let fullest = begun.max_by_key(|(_, place)| place.end - place.committed);
        let Some((&partition, place)) = fullest.filter(|(_, place)| place.end > place.committed) else {
            self.watch.set_well(true);
            return;
        };
        let gone = 1 + (place.end - place.committed) / 2;
        let next = place.committed + gone;
        let names = read(self.kafka, self.topics, partition, place.committed, next);
        self.kafka.remove_records_of(&self.topics.documents, &[(partition, next)]);
        self.load.trim(names);
        self.gaps += 1;

        let words = [
            format!("partition {partition} of the topic `{}` has no record any more", self.topics.documents),
            format!("at offset {}", place.committed),
            format!("{gone} records were removed"),
            format!("--to-offset {next}"),
        ];
        let begun = Instant::now();
        let mut said = false;
        while !said && begun.elapsed() < SAID_WITHIN {
            for slot in self.crew.slots() {
                // A service manager does not start one again that ends for this.
                if !slot.has_gap() {
                    slot.revive();
                }
            }
            said = self.crew.slots().iter_mut().any(|slot| slot.told_gap(&words));
            std::thread::sleep(TURN);
        }
        self.crew.stop();
        if said {
            group.set(partition, next);
        } else {
            self.unsaid.push(words.join(", "));
        }
        self.crew.revive();
        self.watch.set_well(true);
    }
}

/// Names of the records of a partition from `first` to before `end`.
fn read(kafka: &Kafka, topics: &Topics, partition: i32, first: i64, end: i64) -> Vec<String> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &kafka.bootstrap_servers)
        .set("group.id", "gap")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&topics.documents, partition, Offset::Offset(first)).unwrap();
    consumer.assign(&list).unwrap();
    let begun = Instant::now();
    let mut names = Vec::new();
    loop {
        assert!(begun.elapsed() < PATIENCE, "partition {partition} cannot be read from {first} to {end}");
        let Some(Ok(message)) = consumer.poll(TURN) else { continue };
        let payload = message.payload().map(|payload| payload.to_vec().into());
        names.push(name(message.key(), payload));
        if message.offset() + 1 == end {
            return names;
        }
    }
}
