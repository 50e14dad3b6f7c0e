//! Signs of life: whether each loop still turns, and whether the daemon can take work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

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
    /// Milliseconds after `started` of each loop's last turn.
    beats: [AtomicU64; 3],
    warm: AtomicBool,
    joined: AtomicBool,
    assigned: AtomicBool,
    broker_down: AtomicBool,
    leaving: AtomicBool,
    switching: AtomicBool,
    aborted: AtomicBool,
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
            beats: Default::default(),
            warm: AtomicBool::new(false),
            joined: AtomicBool::new(false),
            assigned: AtomicBool::new(false),
            broker_down: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            switching: AtomicBool::new(false),
            aborted: AtomicBool::new(false),
            stalled_after: AtomicU64::new(u64::MAX),
        }))
    }
}

impl Health {
    /// Notes that a loop has turned.
    pub fn beat(&self, of: Loop) {
        let now = self.0.started.elapsed().as_millis() as u64;
        self.0.beats[of as usize].store(now, Ordering::Relaxed);
    }

    /// Notes that the model is loaded and warm; from here on the loops must turn.
    pub fn set_warm(&self) {
        for (of, _) in LOOPS {
            self.beat(of);
        }
        self.0.warm.store(true, Ordering::Relaxed);
    }

    /// Notes an assignment of the group, and whether there are partitions in it.
    pub fn set_assigned(&self, assigned: bool) {
        self.0.assigned.store(assigned, Ordering::Relaxed);
        self.0.joined.store(true, Ordering::Relaxed);
    }

    /// Whether the start is over: the model is warm and the group's first assignment is in. A daemon beyond the number
    /// of partitions stands by with an empty one.
    pub fn has_started(&self) -> bool {
        self.0.warm.load(Ordering::Relaxed) && self.0.joined.load(Ordering::Relaxed)
    }

    /// Time since the daemon began: what [`Self::progressed_since`] counts in.
    pub fn now(&self) -> Duration {
        self.0.started.elapsed()
    }

    /// Whether every loop has turned since `then`.
    pub fn progressed_since(&self, then: Duration) -> bool {
        LOOPS.iter().all(|(of, _)| self.last_turn(*of) > then)
    }

    /// Time since the last turn of each loop, by name; none while the model loads, which may take minutes.
    pub fn ages(&self) -> [(&'static str, Duration); 3] {
        let (now, warm) = (self.now(), self.0.warm.load(Ordering::Relaxed));
        let age = |of| if warm { now.saturating_sub(self.last_turn(of)) } else { Duration::ZERO };
        LOOPS.map(|(of, name)| (name, age(of)))
    }

    fn last_turn(&self, of: Loop) -> Duration {
        Duration::from_millis(self.0.beats[of as usize].load(Ordering::Relaxed))
    }

    /// Notes whether the brokers answer; true where that is news.
    pub fn set_broker_down(&self, down: bool) -> bool {
        self.0.broker_down.swap(down, Ordering::Relaxed) != down
    }

    /// Whether the brokers were last heard to be down.
    pub fn is_broker_down(&self) -> bool {
        self.0.broker_down.load(Ordering::Relaxed)
    }

    /// Asks every loop to finish what it has and stop, for good.
    pub fn stop(&self) {
        self.0.leaving.store(true, Ordering::Relaxed);
    }

    /// Asks every loop to finish what it has and stop, so that others can begin with new settings.
    pub fn switch(&self) {
        self.0.switching.store(true, Ordering::Relaxed);
    }

    /// Notes that the loops have stopped and others may begin.
    pub fn set_switched(&self) {
        self.0.switching.store(false, Ordering::Relaxed);
        self.set_warm();
    }

    /// Whether the loops should finish what they have and stop.
    pub fn is_stopping(&self) -> bool {
        self.is_leaving() || self.0.switching.load(Ordering::Relaxed)
    }

    /// Whether the process is about to end: [`Self::stop`] was called.
    pub fn is_leaving(&self) -> bool {
        self.0.leaving.load(Ordering::Relaxed)
    }

    /// Asks every loop to give up at once: one of them has failed.
    pub fn abort(&self) {
        self.0.aborted.store(true, Ordering::Relaxed);
        self.stop();
    }

    /// Whether [`Self::abort`] was called.
    pub fn is_aborted(&self) -> bool {
        self.0.aborted.load(Ordering::Relaxed)
    }

    /// How long a loop may take for a turn before it counts as stalled.
    pub fn set_stalled_after(&self, stalled_after: Duration) {
        self.0.stalled_after.store(stalled_after.as_millis() as u64, Ordering::Relaxed);
    }

    /// Names of the loops that have not turned for so long; none while the model loads, which may take minutes.
    pub fn stalled(&self) -> Vec<&'static str> {
        let stalled = Duration::from_millis(self.0.stalled_after.load(Ordering::Relaxed));
        if !self.0.warm.load(Ordering::Relaxed) {
            return Vec::new();
        }
        self.ages().iter().filter(|(_, age)| *age >= stalled).map(|(name, _)| *name).collect()
    }

    /// Why no work can be taken; nothing where it can.
    pub fn not_ready(&self) -> Option<&'static str> {
        let inner = &self.0;
        if self.is_leaving() {
            Some("stopping")
        } else if inner.switching.load(Ordering::Relaxed) {
            Some("going over to new settings")
        } else if !inner.warm.load(Ordering::Relaxed) {
            Some("the model is loading")
        } else if inner.broker_down.load(Ordering::Relaxed) {
            Some("no broker answers")
        } else if !inner.assigned.load(Ordering::Relaxed) {
            Some("no partition is assigned yet")
        } else {
            None
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
        health.set_warm();
        assert_eq!(health.stalled(), ["source", "score", "sink"]);
        health.set_stalled_after(Duration::from_mins(1));
        assert!(health.stalled().is_empty());
    }

    #[test]
    fn progress_is_that_of_every_loop() {
        let health = Health::default();
        std::thread::sleep(Duration::from_millis(2));
        health.set_warm();
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
        health.set_warm();
        assert!(!health.has_started());
        health.set_assigned(false);
        assert!(health.has_started());
        assert_eq!(health.not_ready(), Some("no partition is assigned yet"));
    }

    #[test]
    fn readiness_names_what_is_missing() {
        let health = Health::default();
        assert_eq!(health.not_ready(), Some("the model is loading"));
        health.set_warm();
        assert_eq!(health.not_ready(), Some("no partition is assigned yet"));
        health.set_assigned(true);
        assert_eq!(health.not_ready(), None);
        assert!(health.set_broker_down(true) && !health.set_broker_down(true), "news only once");
        assert_eq!(health.not_ready(), Some("no broker answers"));
        assert!(health.set_broker_down(false));
        health.switch();
        assert_eq!(health.not_ready(), Some("going over to new settings"));
        assert!(health.is_stopping() && !health.is_leaving());
        health.set_switched();
        assert_eq!(health.not_ready(), None);
        health.stop();
        assert_eq!(health.not_ready(), Some("stopping"));
    }
}
