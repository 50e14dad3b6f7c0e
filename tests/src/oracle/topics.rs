//! Where the documents of one run come from and go to.

use std::time::Duration;

use crate::Kafka;

/// Brokers hear of a topic one after the other, and a daemon takes the word of any.
const HEARD: Duration = Duration::from_secs(1);

/// Partitions of the documents, and of what is scored of them, at the beginning and at most.
const PARTITIONS: i32 = 6;
pub(super) const PARTITIONS_MAX: usize = 12;

/// Names of one run's topics, and its group.
#[derive(Clone, Debug)]
pub(super) struct Topics {
    pub documents: String,
    pub scored: String,
    pub dead_letters: String,
    pub group: String,
}

impl Topics {
    /// The topics of a run, which no other run of this machine has.
    pub fn create(kafka: &Kafka, seed: u64) -> Self {
        let name = format!("soak-{seed}-{}", std::process::id());
        let topics = Self {
            documents: format!("{name}.documents"),
            scored: format!("{name}.scored"),
            dead_letters: format!("{name}.dead-letters"),
            group: name,
        };
        for (topic, partitions) in
            [(&topics.documents, PARTITIONS), (&topics.scored, PARTITIONS), (&topics.dead_letters, 1)]
        {
            kafka.create_topic(topic, partitions);
        }
        std::thread::sleep(HEARD);
        topics
    }
}
