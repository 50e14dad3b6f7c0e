//! What a `read_committed` reader finds afterwards, against what it should.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_daemon::batch::{Batch, Ladder, windows};
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_daemon::score::{Score as _, Scorer};
use sluice_schemas::record::{Bos, ContextPolicy, ScoredDocument};

use super::crew::Crew;
use super::load::{Obligations, key, name, number, tokens};
use super::slot::Counters;
use super::topics::Topics;
use super::watch::{Stall, longest, name_of};
use crate::{Group, Kafka, onnxruntime, read_all};

const DRAIN: Duration = Duration::from_mins(3);
const TURN: Duration = Duration::from_millis(500);
/// Window and stride that the daemon chooses for the test model.
const CONTEXT: ContextPolicy = ContextPolicy { window: 64, stride: 32, bos: Bos::None };

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// The run's seed.
    pub seed: u64,
    /// Faults injected.
    pub faults: usize,
    /// How many of each kind.
    pub kinds: BTreeMap<String, usize>,
    /// Documents and poison records that were acknowledged and not removed before they were read.
    pub obligations: usize,
    /// Those that were removed before they were read.
    pub trimmed: usize,
    /// Those that the producer was not told the fate of.
    pub doubtful: usize,
    /// Times that records were removed before they were read.
    pub gaps: usize,
    /// Those of which no daemon has said how many records of which partition are gone.
    pub unsaid: Vec<String>,
    /// Those found nowhere.
    pub lost: Vec<String>,
    /// Those found more than once.
    pub doubled: Vec<String>,
    /// Those that lie more than once in the documents topic, and were found as often.
    pub repeated: Vec<String>,
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
    /// The longest time that each partition stood still with records to read, while the brokers and the way to them were
    /// well; and the longest of that after a member of the group had last gone, come or fallen silent.
    pub stalls: Vec<(Stall, Stall)>,
    /// How long it took.
    pub seconds: f64,
}

impl Findings {
    /// Whether every obligation was met.
    pub fn is_clean(&self) -> bool {
        [&self.lost, &self.doubled, &self.reordered, &self.changed, &self.unknown, &self.unsaid]
            .iter()
            .all(|list| list.is_empty())
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {} faults, {} records: {} lost, {} doubled, {} reordered, {} changed, {} unknown; {} stored twice; {} removed before they \
             were read in {} gaps, {} of them unsaid; longest stall {}, {} after the \
             last loss of a daemon; {} exits, {} hangs, {} commits, {} aborts, \
             {} rebalances, {} producers replaced; {:.0} s",
            self.seed,
            self.faults,
            self.obligations,
            self.lost.len(),
            self.doubled.len(),
            self.reordered.len(),
            self.changed.len(),
            self.unknown.len(),
            self.repeated.len(),
            self.trimmed,
            self.gaps,
            self.unsaid.len(),
            longest(&self.stalls).0,
            longest(&self.stalls).1,
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
pub(super) fn drain(kafka: &Kafka, topics: &Topics, crew: &mut Crew) {
    let group = Group::new(kafka, &topics.group, &topics.documents);
    let deadline = Instant::now() + DRAIN;
    loop {
        crew.wait(TURN);
        let lag = group.lag();
        if lag == Some(0) {
            return;
        }
        assert!(Instant::now() < deadline, "consumer lag is still {lag:?} after {DRAIN:?}");
    }
}

/// Reads both topics and compares.
pub(super) fn look(kafka: &Kafka, topics: &Topics, model: &Path, obligations: &Obligations) -> Findings {
    let mut findings = Findings {
        obligations: obligations.expected().count(),
        trimmed: obligations.trimmed.len(),
        doubtful: obligations.doubtful.len(),
        ..Findings::default()
    };
    let scored = read_all(&kafka.bootstrap_servers, &topics.scored);
    let letters = read_all(&kafka.bootstrap_servers, &topics.dead_letters);

    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut clean = CleanRun::new(model);
    let mut last: HashMap<(String, i32, i32), usize> = HashMap::new();
    for record in &scored {
        let document = ScoredDocument::decode(record.payload.clone().unwrap()).unwrap();
        let id = document.document.id.clone();
        *seen.entry(id.clone()).or_default() += 1;
        let Some(number) = number(&id) else { continue };
        // Of one key, as it lay in one partition, and lies in one: a topic that grows has its keys move.
        if let Some(&origin) = obligations.acknowledged.get(&id) {
            let key = (key(number), origin, record.partition);
            if last.insert(key, number).is_some_and(|last| last > number) {
                findings.reordered.push(id.clone());
            }
        }
        let losses = document.reference_losses.to_vec();
        let expected = clean.losses(&tokens(obligations.seed, number));
        if losses.iter().map(|loss| loss.to_bits()).ne(expected.iter().map(|loss| loss.to_bits())) {
            findings.changed.push(id);
        }
    }
    for letter in &letters {
        *seen.entry(name_of(false, letter.key.as_deref(), None)).or_default() += 1;
    }
    let mut stored: HashMap<String, usize> = HashMap::new();
    for document in read_all(&kafka.bootstrap_servers, &topics.documents) {
        *stored.entry(name(document.key.as_deref(), document.payload)).or_default() += 1;
    }
    for name in obligations.expected() {
        match seen.remove(name) {
            None => findings.lost.push(name.clone()),
            Some(1) => {}
            // The brokers have kept twice what its producer sent once: both are documents, and both are scored.
            Some(times) if stored.get(name) == Some(&times) => findings.repeated.push(name.clone()),
            Some(_) => findings.doubled.push(name.clone()),
        }
    }
    for name in &obligations.doubtful {
        if seen.remove(name).is_some_and(|times| times > 1) {
            findings.doubled.push(name.clone());
        }
    }
    // What was removed before it was read is among them, where it came out nevertheless.
    findings.unknown.extend(seen.into_keys());
    findings
}

/// The scorer alone, one document at a time.
struct CleanRun(Scorer);

impl CleanRun {
    fn new(model: &Path) -> Self {
        let mut model = Model::load(model, Device::Cpu, false).unwrap();
        // As the daemon does, whose losses are compared with these.
        model.fuse_attention(&onnxruntime()).unwrap();
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
