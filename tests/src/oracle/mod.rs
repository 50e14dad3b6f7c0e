//! The oracle: documents with known ids and known losses, daemons on a real Kafka, a seeded schedule of faults, and
//! afterwards a look at what a `read_committed` reader finds.
//!
//! Every document that the broker has acknowledged is an obligation: exactly once in the union of the scored and the
//! dead-letter topic, with the losses of a clean run to the last bit, in the order of its key.

mod check;
mod fault;
mod load;
mod slot;

use std::path::Path;
use std::time::Instant;

use crate::Kafka;
pub use check::Findings;
use fault::Faults;
use load::Load;
use slot::{Counters, Slot};

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Decides everything that is drawn.
    pub seed: u64,
    /// Faults to inject.
    pub faults: usize,
    /// Daemons that share the group.
    pub daemons: usize,
    /// Whether records and offsets are one transaction; without, doubles are to be expected.
    pub exactly_once: bool,
    /// Documents a second.
    pub documents_per_second: u64,
}

/// Names of one run's topics, and its group.
#[derive(Clone, Debug)]
pub(crate) struct Topics {
    documents: String,
    scored: String,
    dead_letters: String,
    group: String,
}

const PARTITIONS: i32 = 6;

/// Runs one schedule against `kafka`; a line of progress for every fault goes to standard error.
pub fn run(kafka: &Kafka, model: &Path, options: &Options) -> Findings {
    let started = Instant::now();
    let name = format!("soak-{}-{}", options.seed, std::process::id());
    let topics = Topics {
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
    let load = Load::start(kafka, &topics, model, options);
    let mut slots: Vec<Slot> =
        (0..options.daemons).map(|index| Slot::new(index, kafka, &topics, model, options)).collect();
    let mut faults = Faults::new(options.seed);
    for number in 1..=options.faults {
        let fault = faults.next(slots.len(), kafka.brokers);
        eprintln!(
            "[{:5.0} s] seed {} fault {number}/{}: {fault:?}, {} documents so far",
            started.elapsed().as_secs_f64(),
            options.seed,
            options.faults,
            load.acknowledged()
        );
        faults.inject(fault, kafka, &mut slots, &load);
        for slot in &mut slots {
            slot.revive();
        }
    }
    let obligations = load.stop();
    check::drain(kafka, &topics, &mut slots);
    let mut findings = check::look(kafka, &topics, model, &obligations);
    findings.seed = options.seed;
    findings.faults = options.faults;
    findings.exits = slots.iter().map(|slot| slot.exits).sum();
    findings.hangs = slots.iter().map(|slot| slot.hangs).sum();
    findings.counters = slots.iter_mut().map(Slot::counters).fold(Counters::default(), |sum, one| sum + one);
    findings.seconds = started.elapsed().as_secs_f64();
    for slot in &mut slots {
        slot.terminate();
    }
    findings
}
