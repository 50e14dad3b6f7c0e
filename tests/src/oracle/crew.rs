//! All daemons of a run, and the service manager that starts them again while the faults act.

use std::path::Path;
use std::time::{Duration, Instant};

use super::options::Options;
use super::slot::{Counters, Slot};
use super::topics::Topics;

/// How often it is looked whether one has ended.
const TURN: Duration = Duration::from_millis(100);

/// Daemons of one group.
pub struct Crew {
    slots: Vec<Slot>,
    /// What further daemons, which have left again, have done by themselves.
    strangers: (usize, usize),
    strangers_counted: Counters,
}

impl Crew {
    /// Starts them; they reach the brokers at `bootstrap_servers`.
    pub(super) fn start(bootstrap_servers: &str, topics: &Topics, model: &Path, options: &Options) -> Self {
        let slots =
            (0..options.daemons).map(|index| Slot::new(index, bootstrap_servers, topics, model, options));
        Self { slots: slots.collect(), strangers: (0, 0), strangers_counted: Counters::default() }
    }

    /// One of them.
    pub fn slot(&mut self, index: usize) -> &mut Slot {
        &mut self.slots[index]
    }

    /// All of them.
    pub fn slots(&mut self) -> &mut [Slot] {
        &mut self.slots
    }

    /// Starts again what has ended.
    pub fn revive(&mut self) {
        for slot in &mut self.slots {
            slot.revive();
        }
    }

    /// Lets time go by.
    pub fn wait(&mut self, length: Duration) {
        let until = Instant::now() + length;
        loop {
            self.revive();
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(TURN));
        }
    }

    /// Waits until `act` is over.
    pub fn during<T: Send>(&mut self, act: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let acting = scope.spawn(act);
            while !acting.is_finished() {
                self.wait(TURN);
            }
            acting.join().unwrap()
        })
    }

    /// Waits until nobody is away.
    pub fn settle(&mut self) {
        while self.slots.iter().any(Slot::is_away) {
            self.wait(TURN);
        }
    }

    /// The same of one alone.
    pub fn settle_one(&mut self, index: usize) {
        while self.slots[index].is_away() {
            self.wait(TURN);
        }
    }

    /// A further daemon, under a name that none of them has.
    pub fn stranger(&self, number: usize) -> Slot {
        self.slots[0].sibling(self.slots.len() + number)
    }

    /// A further daemon leaves.
    pub fn take_leave(&mut self, mut stranger: Slot) {
        let stranger = self.during(move || {
            stranger.terminate();
            stranger
        });
        self.strangers.0 += stranger.exits;
        self.strangers.1 += stranger.hangs;
        let mut stranger = stranger;
        self.strangers_counted = self.strangers_counted + stranger.counters();
    }

    /// Stops all of them, at the same time.
    pub fn stop(&mut self) {
        std::thread::scope(|scope| {
            for slot in &mut self.slots {
                scope.spawn(|| slot.terminate());
            }
        });
    }

    /// Times that one ended by itself, and that one hung.
    pub fn exits_and_hangs(&self) -> (usize, usize) {
        let (exits, hangs) = self.strangers;
        let of_slots = |count: fn(&Slot) -> usize| self.slots.iter().map(count).sum::<usize>();
        (exits + of_slots(|slot| slot.exits), hangs + of_slots(|slot| slot.hangs))
    }

    /// What they have counted, as far as they could be asked.
    pub fn counters(&mut self) -> Counters {
        self.slots.iter_mut().map(Slot::counters).fold(self.strangers_counted, |sum, one| sum + one)
    }
}
