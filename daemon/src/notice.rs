//! Warnings that say enough without flooding the log.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shortest time between two warnings about the same thing.
const EVERY: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Last {
    warned: Instant,
    unsaid: u64,
}

/// Remembers what was said about each thing. Things are few: they are named by the code, never by what comes in.
#[derive(Debug, Default)]
pub struct Notices(Mutex<HashMap<&'static str, Last>>);

impl Notices {
    /// Whether it is time to warn of `what`, the first time at once and later every half minute, and then how many
    /// warnings of it went unsaid.
    pub fn due(&self, what: &'static str) -> Option<u64> {
        self.due_at(what, Instant::now())
    }

    fn due_at(&self, what: &'static str, now: Instant) -> Option<u64> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(last) = seen.get_mut(what) else {
            seen.insert(what, Last { warned: now, unsaid: 0 });
            return Some(0);
        };
        if now.duration_since(last.warned) < EVERY {
            last.unsaid += 1;
            return None;
        }
        last.warned = now;
        Some(std::mem::take(&mut last.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_a_kind_is_said_and_the_rest_are_counted() {
        let notices = Notices::default();
        let start = Instant::now();
        assert_eq!(notices.due_at("a", start), Some(0));
        assert_eq!(notices.due_at("a", start), None);
        assert_eq!(notices.due_at("a", start), None);
        assert_eq!(notices.due_at("b", start), Some(0));
        assert_eq!(notices.due_at("a", start + EVERY), Some(2));
        assert_eq!(notices.due_at("a", start + 2 * EVERY), Some(0));
    }
}
