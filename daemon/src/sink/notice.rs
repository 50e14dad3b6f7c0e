//! Warnings that say enough without flooding the log.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::record::DeadLetter;
use crate::ledger::Ticket;

/// Shortest time between two warnings about the same reason.
const EVERY: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Last {
    warned: Instant,
    unsaid: u64,
}

/// Remembers what was said about each reason.
#[derive(Debug, Default)]
pub struct Notices(Mutex<HashMap<&'static str, Last>>);

impl Notices {
    /// Warns of a dead letter: the first of its reason at once, later ones together, every half minute.
    pub fn dead_letter(&self, letter: &DeadLetter, ticket: Ticket) {
        if let Some(others) = self.others_since(letter.reason, Instant::now()) {
            tracing::warn!(
                reason = letter.reason,
                detail = letter.detail,
                partition = ticket.partition,
                offset = ticket.offset,
                others_since_last_warning = others,
                "dead letter"
            );
        }
    }

    /// How many of `reason` went unsaid, where it is time to say something.
    fn others_since(&self, reason: &'static str, now: Instant) -> Option<u64> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(last) = seen.get_mut(reason) else {
            seen.insert(reason, Last { warned: now, unsaid: 0 });
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
    fn the_first_of_a_reason_is_said_and_the_rest_are_counted() {
        let notices = Notices::default();
        let start = Instant::now();
        assert_eq!(notices.others_since("a", start), Some(0));
        assert_eq!(notices.others_since("a", start), None);
        assert_eq!(notices.others_since("a", start), None);
        assert_eq!(notices.others_since("b", start), Some(0));
        assert_eq!(notices.others_since("a", start + EVERY), Some(2));
        assert_eq!(notices.others_since("a", start + 2 * EVERY), Some(0));
    }
}
