//! The oracle: documents with known ids and known losses, daemons on a real Kafka, a seeded schedule of faults, and
//! afterwards a look at what a `read_committed` reader finds.
//!
//! Every document that the broker has acknowledged is an obligation: exactly once in the union of the scored and the
//! dead-letter topic, with the losses of a clean run to the last bit, in the order of its key.

mod check;
mod fault;
mod load;
mod options;
mod slot;
mod topics;

use std::path::Path;
use std::time::Instant;

use crate::Kafka;
pub use check::Findings;
use fault::Faults;
use load::Load;
pub use options::Options;
use slot::{Counters, Slot};
use topics::Topics;

/// Runs one schedule against `kafka`; a line of progress for every fault goes to standard error.
pub fn run(kafka: &Kafka, model: &Path, options: &Options) -> Findings {
    let started = Instant::now();
    let topics = Topics::create(kafka, options.seed);
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
