//! What a run of the oracle is asked for.

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
