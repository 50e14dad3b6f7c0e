//! What a run of the oracle is asked for.

use std::time::Duration;

/// A group's member that is not heard of for so long is thrown out: the least that brokers allow unless told otherwise.
pub const SESSION: Duration = Duration::from_secs(6);
/// A transaction that is open for so long is given up. A partition that it holds up is read again within twice the session.
pub const TRANSACTION: Duration = Duration::from_secs(7);

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

impl Options {
    /// One run of `faults` faults, of the shape that the tests have.
    pub fn of(seed: u64, faults: usize) -> Self {
        Self { seed, faults, daemons: 2, exactly_once: true, documents_per_second: 40 }
    }
}
