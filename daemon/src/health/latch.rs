//! What work waits for, told by whoever it waits for: a component holds a latch until it is up, and drops it then.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a daemon that serves may wait for before it can take work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A broker that answers.
    Broker,
    /// The group's first word on which partitions are this daemon's.
    Group,
    /// A partition to read.
    Partition,
    /// A partition whose committed offset is known.
    Offset,
    /// A coordinator that takes this daemon's transactions.
    Coordinator,
    /// Brokers that take what is published.
    Publishing,
}

/// In the order in which they are named.
const WAITS: [Wait; 6] =
    [Wait::Broker, Wait::Group, Wait::Partition, Wait::Offset, Wait::Coordinator, Wait::Publishing];

impl Wait {
    /// What is waited for, in words.
    pub fn why(self) -> &'static str {
        match self {
            Self::Broker => "no broker answers",
            Self::Group | Self::Partition => "no partition is assigned yet",
            Self::Offset => "no assigned partition can be read yet: their offsets are not settled",
            Self::Coordinator => "the transactions coordinator does not answer",
            Self::Publishing => "what is published is refused again and again: the log says why",
        }
    }
}

/// How many latches are held of each kind. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub(super) struct Latches(Arc<[AtomicUsize; WAITS.len()]>);

impl Latches {
    pub(super) fn hold(&self, wait: Wait) -> Latch {
        self.0[wait as usize].fetch_add(1, Ordering::SeqCst);
        Latch { latches: self.clone(), wait }
    }

    pub(super) fn is_held(&self, wait: Wait) -> bool {
        self.0[wait as usize].load(Ordering::SeqCst) > 0
    }

    pub(super) fn first_held(&self) -> Option<Wait> {
        WAITS.into_iter().find(|&wait| self.is_held(wait))
    }
}

/// Held by a component that is not up yet. Dropping it says that it is.
#[derive(Debug)]
#[must_use = "dropping a latch says that what it stands for is up"]
pub struct Latch {
    latches: Latches,
    wait: Wait,
}

impl Drop for Latch {
    fn drop(&mut self) {
        self.latches.0[self.wait as usize].fetch_sub(1, Ordering::SeqCst);
    }
}

/// Something that may go down again once it was up: a latch is held while it is down.
#[derive(Debug)]
pub struct Condition {
    latches: Latches,
    wait: Wait,
    held: Mutex<Option<Latch>>,
}

impl Condition {
    pub(super) fn new(latches: &Latches, wait: Wait) -> Self {
        Self { latches: latches.clone(), wait, held: Mutex::new(None) }
    }

    /// Notes whether it is down; true where that is news.
    pub fn set_down(&self, down: bool) -> bool {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = held.is_some() != down;
        if is_news {
            *held = down.then(|| self.latches.hold(self.wait));
        }
        is_news
    }

    /// Whether it is down.
    pub fn is_down(&self) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_is_whose_latch_is_held() {
        let latches = Latches::default();
        let (one, other, broker) =
            (latches.hold(Wait::Partition), latches.hold(Wait::Partition), latches.hold(Wait::Broker));
        assert_eq!(latches.first_held(), Some(Wait::Broker));
        drop((one, broker));
        assert_eq!(latches.first_held(), Some(Wait::Partition), "the other is not up yet");
        drop(other);
        assert_eq!(latches.first_held(), None);
    }

    #[test]
    fn a_condition_holds_one_latch_while_it_is_down() {
        let latches = Latches::default();
        let broker = Condition::new(&latches, Wait::Broker);
        assert!(broker.set_down(true) && !broker.set_down(true), "news only once");
        assert!(broker.is_down() && latches.is_held(Wait::Broker));
        assert!(broker.set_down(false) && !broker.set_down(false));
        assert!(!broker.is_down() && !latches.is_held(Wait::Broker));
    }
}
