//! What a `read_committed` reader finds afterwards, against what it should.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use sluice_daemon::batch::{Batch, Ladder, windows};
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_daemon::score::{Score as _, Scorer};
use sluice_schemas::record::{Bos, ContextPolicy, ScoredDocument};

use super::load::{Obligations, id, key, poison_key, tokens};
use super::slot::{Counters, Slot};
use super::topics::{PARTITIONS, Topics};
use crate::{Kafka, Record, onnxruntime, read_all};

const DRAIN: Duration = Duration::from_mins(3);
const CALL: Duration = Duration::from_secs(10);
/// Window and stride that the daemon chooses for the test model.
const CONTEXT: ContextPolicy = ContextPolicy { window: 64, stride: 32, bos: Bos::None };

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// The run's seed.
    pub seed: u64,
    /// Faults injected.
    pub faults: usize,
    /// Documents and poison records that were acknowledged.
    pub obligations: usize,
    /// Those found nowhere.
    pub lost: Vec<String>,
    /// Those found more than once.
    pub doubled: Vec<String>,
    /// Documents that came before an earlier one of their key.
    pub reordered: Vec<String>,
    /// Documents whose losses are not those of a clean run.
    pub changed: Vec<String>,
    /// Records found that nobody sent.
    pub unknown: Vec<String>,
    /// Times that a daemon ended by itself.
    pub exits: usize,
    /// Times that a loop of a daemon stood still.
    pub hangs: usize,
    /// What the surviving daemons have counted.
    pub counters: Counters,
    /// How long it took.
    pub seconds: f64,
}

impl Findings {
    /// Whether every obligation was met.
    pub fn is_clean(&self) -> bool {
        [&self.lost, &self.doubled, &self.reordered, &self.changed, &self.unknown]
            .iter()
            .all(|list| list.is_empty())
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {} faults, {} records: {} lost, {} doubled, {} reordered, {} changed, {} unknown; {} exits, {} hangs, \
             {} commits, {} aborts, {} rebalances, {} producers replaced; {:.0} s",
            self.seed,
            self.faults,
            self.obligations,
            self.lost.len(),
            self.doubled.len(),
            self.reordered.len(),
            self.changed.len(),
            self.unknown.len(),
            self.exits,
            self.hangs,
            self.counters.commits,
            self.counters.aborts,
            self.counters.rebalances,
            self.counters.replaced,
            self.seconds
        )
    }
}

/// Waits until the group has committed the end of every partition.
pub(super) fn drain(kafka: &Kafka, topics: &Topics, slots: &mut [Slot]) {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &kafka.bootstrap_servers)
        .set("group.id", &topics.group)
        .set("isolation.level", "read_committed")
        .create()
        .unwrap();
    let deadline = Instant::now() + DRAIN;
    loop {
        for slot in slots.iter_mut() {
            slot.revive();
        }
        let lag = lag(&consumer, &topics.documents);
        if lag == Some(0) {
            return;
        }
        assert!(Instant::now() < deadline, "consumer lag is still {lag:?} after {DRAIN:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn lag(consumer: &BaseConsumer, topic: &str) -> Option<i64> {
    let mut wanted = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        wanted.add_partition(topic, partition);
    }
    let committed = consumer.committed_offsets(wanted, CALL).ok()?;
    let mut lag = 0;
    for partition in committed.elements() {
        let (_, end) = consumer.fetch_watermarks(topic, partition.partition(), CALL).ok()?;
        lag += end - if let Offset::Offset(offset) = partition.offset() { offset } else { 0 };
    }
    Some(lag)
}

/// Reads both topics and compares.
pub(super) fn look(kafka: &Kafka, topics: &Topics, model: &Path, obligations: &Obligations) -> Findings {
    let mut findings =
        Findings { obligations: obligations.documents + obligations.poison, ..Findings::default() };
    let scored = read_all(&kafka.bootstrap_servers, &topics.scored);
    let letters = read_all(&kafka.bootstrap_servers, &topics.dead_letters);

    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut clean = CleanRun::new(model);
    let mut last_of_key: HashMap<String, usize> = HashMap::new();
    for record in &scored {
        let document = ScoredDocument::decode(record.payload.clone().unwrap()).unwrap();
        let name = document.document.id.clone();
        *seen.entry(name.clone()).or_default() += 1;
        let number = name.strip_prefix("document-").and_then(|number| number.parse::<usize>().ok());
        let Some(number) = number.filter(|&number| number < obligations.documents) else {
            findings.unknown.push(name);
            continue;
        };
        if last_of_key.insert(key(number), number).is_some_and(|last| last > number) {
            findings.reordered.push(name.clone());
        }
        let losses = document.reference_losses.to_vec();
        let expected = clean.losses(&tokens(obligations.seed, number));
        if losses.iter().map(|loss| loss.to_bits()).ne(expected.iter().map(|loss| loss.to_bits())) {
            findings.changed.push(name);
        }
    }
    for letter in &letters {
        *seen.entry(poison_name(letter)).or_default() += 1;
    }
    let expected = (0..obligations.documents).map(id).chain((0..obligations.poison).map(poison_key));
    for name in expected {
        match seen.remove(&name) {
            None => findings.lost.push(name),
            Some(1) => {}
            Some(_) => findings.doubled.push(name),
        }
    }
    findings.unknown.extend(seen.into_keys());
    findings
}

fn poison_name(letter: &Record) -> String {
    String::from_utf8_lossy(letter.key.as_deref().unwrap_or_default()).into_owned()
}

/// The scorer alone, one document at a time.
struct CleanRun(Scorer);

impl CleanRun {
    fn new(model: &Path) -> Self {
        let model = Model::load(model, Device::Cpu, false).unwrap();
        let options = SessionOptions {
            library: onnxruntime(),
            device: Device::Cpu,
            threads: 1,
            device_memory_bytes: 0,
        };
        Self(Scorer::new(&model, &options, false).unwrap())
    }

    fn losses(&mut self, tokens: &[u32]) -> Vec<f32> {
        let mut losses = vec![f32::NAN; tokens.len()];
        let tokens: Arc<[u32]> = tokens.into();
        for window in windows(0, &tokens, CONTEXT) {
            let scored = window.scored();
            losses[scored].copy_from_slice(
                &self.0.score(&Batch::new(vec![window], Ladder::new(64, 16))).unwrap().losses,
            );
        }
        losses
    }
}
