//! Signs of life: which phase the process is in, whether each loop still turns, and what work waits for.

mod latch;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use latch::Latches;
pub use latch::{Condition, Latch, Wait};

/// What the process as a whole is about. The later ones are never left for an earlier one, but for a switch, after which
/// it serves again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The model is read, opened and warmed up, which may take minutes.
    Loading,
    /// Records are read, scored and published.
    Serving,
    /// The loops finish what they have, so that others can begin with new settings.
    Switching,
    /// The loops finish what they have, and the process ends.
    Leaving,
    /// A loop has failed, the others give up at once, and the process ends.
    Aborted,
}

const PHASES: [Phase; 5] = [Phase::Loading, Phase::Serving, Phase::Switching, Phase::Leaving, Phase::Aborted];

/// A loop that must keep turning.
#[derive(Clone, Copy, Debug)]
pub enum Loop {
    /// Polls Kafka.
    Source,
    /// Runs the model.
    Score,
    /// Publishes and commits.
    Sink,
}

const LOOPS: [(Loop, &str); 3] = [(Loop::Source, "source"), (Loop::Score, "score"), (Loop::Sink, "sink")];

#[derive(Debug)]
struct Inner {
    started: Instant,
    phase: AtomicU8,
    /// Milliseconds after `started` of each loop's last turn; 0 before the first.
    beats: [AtomicU64; 3],
    latches: Latches,
    /// Milliseconds without a turn after which a loop counts as stalled.
    stalled_after: AtomicU64,
}

/// The daemon's health. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Health(Arc<Inner>);

impl Default for Health {
    fn default() -> Self {
        Self(Arc::new(Inner {
            started: Instant::now(),
            phase: AtomicU8::new(Phase::Loading as u8),
            beats: Default::default(),
            latches: Latches::default(),
            stalled_after: AtomicU64::new(u64::MAX),
        }))
    }
}

impl Health {
    /// What the process as a whole is about.
    pub fn phase(&self) -> Phase {
        PHASES[usize::from(self.0.phase.load(Ordering::SeqCst))]
    }

    /// Goes from one of `from` to `to`; where the process is in another phase, that one stands.
    fn change_phase(&self, from: &[Phase], to: Phase) {
        let allowed = |phase: u8| from.contains(&PHASES[usize::from(phase)]).then_some(to as u8);
        // The error is the phase that stands.
        let _ = self.0.phase.fetch_update(Ordering::SeqCst, Ordering::SeqCst, allowed);
    }

    /// Notes that the loops begin, the model being warm; from here on they must turn. What they wait for is known by the
    /// latches that are held.
    pub fn set_serving(&self) {
        for (of, _) in LOOPS {
            self.beat(of);
        }
        self.change_phase(&[Phase::Loading, Phase::Switching], Phase::Serving);
    }

    /// Asks every loop to finish what it has and stop, so that others can begin with new settings.
    pub fn switch(&self) {
        self.change_phase(&[Phase::Serving], Phase::Switching);
    }

    /// Asks every loop to finish what it has and stop, for good.
    pub fn stop(&self) {
        self.0.phase.fetch_max(Phase::Leaving as u8, Ordering::SeqCst);
    }

    /// Asks every loop to give up at once: one of them has failed.
    pub fn abort(&self) {
        self.0.phase.fetch_max(Phase::Aborted as u8, Ordering::SeqCst);
    }

    /// Whether the loops should finish what they have and stop.
    pub fn is_stopping(&self) -> bool {
        self.phase() >= Phase::Switching
    }

    /// Whether the process is about to end.
    pub fn is_leaving(&self) -> bool {
        self.phase() >= Phase::Leaving
    }

    /// Whether a loop has failed, so that the others should give up.
    pub fn is_aborted(&self) -> bool {
        self.phase() == Phase::Aborted
    }

    /// A latch for a component that is not up yet, to be dropped when it is.
    pub fn latch(&self, wait: Wait) -> Latch {
        self.0.latches.hold(wait)
    }

    /// Something that may go down again once it was up, and is up now.
    pub fn condition(&self, wait: Wait) -> Condition {
        Condition::new(&self.0.latches, wait)
    }

    /// Whether anything holds a latch of this kind.
    pub fn waits_for(&self, wait: Wait) -> bool {
        self.0.latches.is_held(wait)
    }

    /// Whether the start is over: the model is warm and the group's first assignment is in. A daemon beyond the number
    /// of partitions stands by with an empty one.
    pub fn has_started(&self) -> bool {
        self.progressed_since(Duration::ZERO) && !self.waits_for(Wait::Group)
    }

    /// Notes that a loop has turned.
    pub fn beat(&self, of: Loop) {
        let now = self.0.started.elapsed().as_millis() as u64;
        self.0.beats[of as usize].store(now.max(1), Ordering::Relaxed);
    }

    /// Time since the daemon began: what [`Self::progressed_since`] counts in.
    pub fn now(&self) -> Duration {
        self.0.started.elapsed()
    }

    /// Whether every loop has turned since `then`.
    pub fn progressed_since(&self, then: Duration) -> bool {
        LOOPS.iter().all(|(of, _)| self.last_turn(*of) > then)
    }

    /// Time since the last turn of each loop, by name; none before the loops have begun.
    pub fn ages(&self) -> [(&'static str, Duration); 3] {
        LOOPS.map(|(of, name)| (name, self.age(of).unwrap_or_default()))
    }

    /// Names of the loops that have not turned for so long; none before they have begun.
    pub fn stalled(&self) -> Vec<&'static str> {
        let stalled = Duration::from_millis(self.0.stalled_after.load(Ordering::Relaxed));
        let is_stalled = |of| self.age(of).is_some_and(|age| age >= stalled);
        LOOPS.into_iter().filter(|&(of, _)| is_stalled(of)).map(|(_, name)| name).collect()
    }

    /// How long a loop may take for a turn before it counts as stalled.
    pub fn set_stalled_after(&self, stalled_after: Duration) {
        self.0.stalled_after.store(stalled_after.as_millis() as u64, Ordering::Relaxed);
    }

    fn last_turn(&self, of: Loop) -> Duration {
        Duration::from_millis(self.0.beats[of as usize].load(Ordering::Relaxed))
    }

    /// Time since the last turn of a loop that has begun.
    fn age(&self, of: Loop) -> Option<Duration> {
        let last = Some(self.last_turn(of)).filter(|last| !last.is_zero())?;
        Some(self.now().saturating_sub(last))
    }

    /// Why no work can be taken; nothing where it can.
    pub fn not_ready(&self) -> Option<&'static str> {
        match self.phase() {
            Phase::Loading => Some("the model is loading"),
            Phase::Serving => self.0.latches.first_held().map(Wait::why),
            Phase::Switching => Some("going over to new settings"),
            Phase::Leaving | Phase::Aborted => Some("stopping"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_stands_still_is_named_once_the_model_is_warm() {
        let health = Health::default();
        health.set_stalled_after(Duration::ZERO);
        assert!(health.stalled().is_empty());
        health.set_serving();
        assert_eq!(health.stalled(), ["source", "score", "sink"]);
        health.set_stalled_after(Duration::from_mins(1));
        assert!(health.stalled().is_empty());
    }

    #[test]
    fn progress_is_that_of_every_loop() {
        let health = Health::default();
        std::thread::sleep(Duration::from_millis(2));
        health.set_serving();
        assert!(health.progressed_since(Duration::ZERO));
        let then = health.now();
        std::thread::sleep(Duration::from_millis(2));
        health.beat(Loop::Source);
        health.beat(Loop::Score);
        assert!(!health.progressed_since(then), "the sink has not turned");
        health.beat(Loop::Sink);
        assert!(health.progressed_since(then));
    }

    #[test]
    fn a_daemon_without_partitions_has_started_and_is_not_ready() {
        let health = Health::default();
        assert!(!health.has_started());
        let (group, _partition) = (health.latch(Wait::Group), health.latch(Wait::Partition));
        health.set_serving();
        assert!(!health.has_started());
        drop(group);
        assert!(health.has_started());
        assert_eq!(health.not_ready(), Some("no partition is assigned yet"));
    }

    #[test]
    fn readiness_names_what_is_missing() {
        let health = Health::default();
        assert_eq!(health.not_ready(), Some("the model is loading"));
        let partition = health.latch(Wait::Partition);
        health.set_serving();
        assert_eq!(health.not_ready(), Some("no partition is assigned yet"));
        drop(partition);
        assert_eq!(health.not_ready(), None);
        let broker = health.condition(Wait::Broker);
        broker.set_down(true);
        assert_eq!(health.not_ready(), Some("no broker answers"));
        broker.set_down(false);
        health.switch();
        assert_eq!(health.not_ready(), Some("going over to new settings"));
        assert!(health.is_stopping() && !health.is_leaving());
        health.set_serving();
        assert_eq!(health.not_ready(), None);
        health.stop();
        assert_eq!(health.not_ready(), Some("stopping"));
    }

    #[test]
    fn a_process_that_leaves_does_nothing_else_any_more() {
        let health = Health::default();
        health.stop();
        health.set_serving();
        health.switch();
        assert_eq!(health.phase(), Phase::Leaving);
        health.abort();
        health.stop();
        assert!(health.is_aborted() && health.is_leaving());
    }
}
