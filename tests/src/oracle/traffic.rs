//! Documents that come, and a look at what becomes of them, for tests that run daemons of their own.

use std::path::Path;
use std::time::{Duration, Instant};

use super::check::{self, Findings};
use super::load::Load;
use super::options::Options;
use super::topics::Topics;
use super::watch::{Reader, Watch};
use crate::{Group, Kafka};

/// How long daemons may take for what is left.
const DRAIN: Duration = Duration::from_mins(2);

/// Documents on their way through topics of their own.
pub struct Traffic {
    topics: Topics,
    /// Tells how long each partition stands still, once it is told that partitions should move.
    pub watch: Watch,
    reader: Reader,
    load: Load,
}

impl Traffic {
    /// Begins to produce, for daemons that are still to come.
    pub fn start(kafka: &Kafka, model: &Path, options: &Options) -> Self {
        let topics = Topics::create(kafka, options.seed);
        let watch = Watch::default();
        watch.set_well(false);
        let reader = Reader::start(kafka, &topics.scored, &topics.dead_letters, watch.clone());
        let load = Load::start(kafka, &topics, model, options, watch.clone());
        Self { topics, watch, reader, load }
    }

    /// Ends of names and values of the variables by which a daemon takes part.
    pub fn variables(&self) -> [(&str, &str); 5] {
        [
            ("DELIVERY", "exactly-once"),
            ("GROUP_ID", &self.topics.group),
            ("DOCUMENTS_TOPIC", &self.topics.documents),
            ("SCORED_TOPIC", &self.topics.scored),
            ("DEAD_LETTER_TOPIC", &self.topics.dead_letters),
        ]
    }

    /// The same as flags.
    pub fn flags(&self) -> Vec<String> {
        let flag = |name: &str| format!("--kafka-{}", name.to_lowercase().replace('_', "-"));
        self.variables().iter().flat_map(|&(name, value)| [flag(name), value.to_owned()]).collect()
    }

    /// Records that the brokers have acknowledged so far.
    pub fn acknowledged(&self) -> usize {
        self.load.acknowledged()
    }

    /// Produces no more, waits until all is committed, and looks.
    pub fn finish(self, kafka: &Kafka, model: &Path) -> Findings {
        let obligations = self.load.stop();
        let group = Group::new(kafka, &self.topics.group, &self.topics.documents);
        let begun = Instant::now();
        loop {
            let lag = group.lag();
            if lag == Some(0) {
                break;
            }
            assert!(begun.elapsed() < DRAIN, "consumer lag is still {lag:?} after {DRAIN:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
        let stalls = self.watch.stalls();
        self.reader.stop();
        let mut findings = check::look(kafka, &self.topics, model, &obligations);
        findings.stalls = stalls;
        findings
    }
}
