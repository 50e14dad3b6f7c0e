//! A value that several threads use in the order in which they ask for it.
//!
//! A mutex is given to whoever is there first: a warm-up that asks again at once would keep it from the batches of the
//! stream for as long as it runs.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The next number to be drawn, and the one whose turn it is.
#[derive(Debug, Default)]
struct Numbers {
    next: u64,
    turn: u64,
}

/// A value for one thread after the other.
#[derive(Debug)]
pub struct InTurns<T> {
    numbers: Mutex<Numbers>,
    passed_on: Condvar,
    value: Mutex<T>,
}

impl<T> InTurns<T> {
    /// One that nobody has asked for.
    pub fn new(value: T) -> Self {
        Self { numbers: Mutex::default(), passed_on: Condvar::new(), value: Mutex::new(value) }
    }

    /// Uses the value once all have that asked before.
    pub fn with<R>(&self, use_it: impl FnOnce(&mut T) -> R) -> R {
        let mut numbers = self.lock();
        let mine = numbers.next;
        numbers.next += 1;
        let waited = self.passed_on.wait_while(numbers, |numbers| numbers.turn != mine);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        let _turn = Turn(self);
        use_it(&mut self.value.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes the turn on, also where the thread that has it panics.
struct Turn<'a, T>(&'a InTurns<T>);

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        self.0.lock().turn += 1;
        self.0.passed_on.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const TURNS: usize = 100;

    /// What a warm-up beside a live stream does: it has the value, and asks for it again as soon as it has given it back.
    #[test]
    fn whoever_asks_again_comes_after_whoever_waits() {
        let value = InTurns::new(Vec::new());
        thread::scope(|scope| {
            let asked = |count: u64| {
                while value.lock().next < count {
                    thread::yield_now();
                }
            };
            value.with(|order| {
                order.push("greedy");
                scope.spawn(|| value.with(|order| order.push("patient")));
                asked(2);
            });
            for _ in 0..TURNS {
                value.with(|order| order.push("greedy"));
            }
        });
        let order = value.with(std::mem::take);
        assert_eq!(order[..3], ["greedy", "patient", "greedy"]);
        assert_eq!(order.len(), TURNS + 2);
    }

    #[test]
    fn a_thread_that_panics_passes_its_turn_on() {
        let value = InTurns::new(0);
        thread::scope(|scope| {
            let panicked = scope.spawn(|| value.with(|_| panic!("as it should"))).join();
            assert!(panicked.is_err());
        });
        assert_eq!(value.with(|value| *value), 0);
    }
}
