//! What is in flight, in the order it was read: the only place that knows which offsets may be committed.
//!
//! A record is *opened* when it is read, *completed* when its outcome is known, *taken* once everything before it in
//! its partition is complete, and *released* when it is published and its offset committed. Its tokens count against
//! the budget from open to release, which bounds every queue of the daemon at once.
//!
//! Records are told apart by the epoch of their partition's assignment, so that an outcome which arrives after the
//! partition was taken away is dropped and never committed.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A record in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// Partition of the documents topic.
    pub partition: i32,
    /// Offset in that partition.
    pub offset: i64,
    epoch: u64,
}

#[derive(Debug)]
struct Entry<T> {
    ticket: Ticket,
    tokens: usize,
    opened: Instant,
    outcome: Option<T>,
}

#[derive(Debug)]
struct Partition<T> {
    epoch: u64,
    /// Records not yet taken, in the order they were read.
    waiting: VecDeque<Entry<T>>,
    /// Records taken and not yet released.
    publishing: usize,
    /// Offset after the last record read.
    next: Option<i64>,
}

#[derive(Debug)]
struct State<T> {
    partitions: HashMap<i32, Partition<T>>,
    epochs: u64,
    tokens: usize,
}

/// An outcome on its way out.
#[derive(Debug)]
pub struct Taken<T> {
    /// Its place in the ledger.
    pub ticket: Ticket,
    /// What became of the record.
    pub outcome: T,
    tokens: usize,
}

/// Outcomes that may be published now, in order within each partition.
pub type Group<T> = Vec<Taken<T>>;

/// The ledger, shared by the thread that reads, the one that scores and the one that publishes.
#[derive(Debug)]
pub struct Ledger<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T> Default for Ledger<T> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State { partitions: HashMap::new(), epochs: 0, tokens: 0 }),
            changed: Condvar::new(),
        }
    }
}

impl<T> Ledger<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // A thread that panicked ends the process; until then the books are still good.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Partitions that this consumer now reads.
    pub fn assign(&self, partitions: impl IntoIterator<Item = i32>) {
        let mut state = self.lock();
        for partition in partitions {
            state.epochs += 1;
            let epoch = state.epochs;
            let fresh = Partition { epoch, waiting: VecDeque::new(), publishing: 0, next: None };
            if let Some(old) = state.partitions.insert(partition, fresh) {
                state.tokens -= old.waiting.iter().map(|entry| entry.tokens).sum::<usize>();
            }
        }
    }

    /// Partitions that this consumer no longer reads: what is in flight from them is forgotten.
    pub fn revoke(&self, partitions: impl IntoIterator<Item = i32>) {
        let mut state = self.lock();
        for partition in partitions {
            if let Some(old) = state.partitions.remove(&partition) {
                state.tokens -= old.waiting.iter().map(|entry| entry.tokens).sum::<usize>();
            }
        }
        self.changed.notify_all();
    }

    /// Enters a record of `tokens` tokens, or nothing where its partition is not assigned.
    pub fn open(&self, partition: i32, offset: i64, tokens: usize) -> Option<Ticket> {
        let mut state = self.lock();
        let books = state.partitions.get_mut(&partition)?;
        let ticket = Ticket { partition, offset, epoch: books.epoch };
        books.next = Some(offset + 1);
        books.waiting.push_back(Entry { ticket, tokens, opened: Instant::now(), outcome: None });
        state.tokens += tokens;
        Some(ticket)
    }

    /// Notes the outcome of a record; that of a partition taken away meanwhile is dropped.
    pub fn complete(&self, ticket: Ticket, outcome: T) {
        let mut state = self.lock();
        let Some(books) = state.partitions.get_mut(&ticket.partition) else { return };
        if let Ok(index) = books.waiting.binary_search_by_key(&ticket.offset, |entry| entry.ticket.offset)
            && books.waiting[index].ticket == ticket
        {
            books.waiting[index].outcome = Some(outcome);
            self.changed.notify_all();
        }
    }

    /// Takes outcomes that may be published, of at most about `tokens_max` tokens; waits up to `timeout` for the
    /// first. Outcomes of one partition come in the order in which their records were read.
    pub fn take(&self, tokens_max: usize, timeout: Duration) -> Group<T> {
        let mut state = self.lock();
        let ready = |state: &mut State<T>| {
            !state.partitions.values().any(|p| p.waiting.front().is_some_and(|entry| entry.outcome.is_some()))
        };
        state =
            self.changed.wait_timeout_while(state, timeout, ready).unwrap_or_else(PoisonError::into_inner).0;
        let mut group = Group::new();
        let mut tokens = 0;
        for books in state.partitions.values_mut() {
            while tokens < tokens_max && books.waiting.front().is_some_and(|entry| entry.outcome.is_some()) {
                let Some(entry) = books.waiting.pop_front() else { break };
                let Some(outcome) = entry.outcome else { break };
                books.publishing += 1;
                tokens += entry.tokens;
                group.push(Taken { ticket: entry.ticket, outcome, tokens: entry.tokens });
            }
        }
        group
    }

    /// The offset after the last of `group` in each partition: what to commit.
    ///
    /// Call [`Self::drop_revoked`] first.
    pub fn commit_points(group: &Group<T>) -> HashMap<i32, i64> {
        group.iter().map(|taken| (taken.ticket.partition, taken.ticket.offset + 1)).collect()
    }

    /// Removes from `group` what came from partitions that are no longer assigned as they were: it belongs to
    /// another consumer now.
    pub fn drop_revoked(&self, group: &mut Group<T>) {
        let mut state = self.lock();
        let dropped: Vec<_> = group
            .extract_if(.., |taken| {
                state
                    .partitions
                    .get(&taken.ticket.partition)
                    .is_none_or(|books| books.epoch != taken.ticket.epoch)
            })
            .collect();
        state.tokens -= dropped.iter().map(|taken| taken.tokens).sum::<usize>();
    }

    /// Frees the budget that `group` holds, once it is published and committed.
    pub fn release(&self, group: &Group<T>) {
        let mut state = self.lock();
        for taken in group {
            state.tokens -= taken.tokens;
            if let Some(books) = state.partitions.get_mut(&taken.ticket.partition)
                && books.epoch == taken.ticket.epoch
            {
                books.publishing -= 1;
            }
        }
        self.changed.notify_all();
    }

    /// Tokens in flight.
    pub fn tokens(&self) -> usize {
        self.lock().tokens
    }

    /// Waits until fewer than `tokens_max` tokens are in flight; false where `timeout` passed first.
    pub fn wait_below(&self, tokens_max: usize, timeout: Duration) -> bool {
        let full = |state: &mut State<T>| state.tokens >= tokens_max;
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, full);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Whether any partition is assigned.
    pub fn is_assigned(&self) -> bool {
        !self.lock().partitions.is_empty()
    }

    /// Number of assigned partitions.
    pub fn assigned_partitions(&self) -> usize {
        self.lock().partitions.len()
    }

    /// Records between what was read of `partition` and published, and `end`, where nothing was read yet counted
    /// from `committed`; nothing where the partition is not assigned.
    pub fn lag(&self, partition: i32, committed: i64, end: i64) -> Option<u64> {
        let state = self.lock();
        let books = state.partitions.get(&partition)?;
        let oldest = books.waiting.front().map(|entry| entry.ticket.offset);
        let done = oldest.or(books.next).unwrap_or(committed.max(0));
        Some(u64::try_from(end - done).unwrap_or(0))
    }

    /// Age of the oldest record in flight that was not yet taken.
    pub fn oldest_age(&self) -> Duration {
        let state = self.lock();
        let oldest =
            state.partitions.values().filter_map(|books| books.waiting.front()).map(|e| e.opened).min();
        oldest.map_or(Duration::ZERO, |opened| opened.elapsed())
    }

    /// Waits until nothing of `partitions` is in flight; false where `timeout` passed first.
    pub fn wait_drained(&self, partitions: &[i32], timeout: Duration) -> bool {
        let busy = |state: &mut State<T>| {
            partitions.iter().any(|partition| {
                state.partitions.get(partition).is_some_and(|p| !p.waiting.is_empty() || p.publishing > 0)
            })
        };
        let (_state, result) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, busy)
            .unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }

    /// Whether nothing is in flight.
    pub fn is_drained(&self) -> bool {
        let state = self.lock();
        state.tokens == 0 && state.partitions.values().all(|p| p.waiting.is_empty() && p.publishing == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn offsets(group: &Group<&str>) -> Vec<(i32, i64)> {
        let mut offsets: Vec<_> =
            group.iter().map(|taken| (taken.ticket.partition, taken.ticket.offset)).collect();
        offsets.sort_unstable();
        offsets
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn only_contiguous_outcomes_are_published() {
        let ledger = Ledger::default();
        ledger.assign([0, 1]);
        let tickets: Vec<_> = [5, 6, 9].map(|offset| ledger.open(0, offset, 10).unwrap()).into();
        let other = ledger.open(1, 3, 10).unwrap();
        ledger.complete(tickets[2], "late");
        ledger.complete(tickets[1], "middle");
        assert!(ledger.take(1000, NOW).is_empty());
        ledger.complete(other, "other");
        ledger.complete(tickets[0], "first");
        let group = ledger.take(1000, NOW);
        assert_eq!(offsets(&group), [(0, 5), (0, 6), (0, 9), (1, 3)]);
        assert_eq!(Ledger::commit_points(&group), HashMap::from([(0, 10), (1, 4)]));
        assert_eq!(ledger.tokens(), 40);
        assert!(!ledger.is_drained());
        ledger.release(&group);
        assert_eq!(ledger.tokens(), 0);
        assert!(ledger.is_drained());
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn a_partition_that_comes_back_does_not_take_old_outcomes() {
        let ledger = Ledger::default();
        ledger.assign([0]);
        let old = ledger.open(0, 5, 10).unwrap();
        ledger.revoke([0]);
        assert_eq!(ledger.tokens(), 0);
        assert_eq!(ledger.open(0, 6, 10), None);
        ledger.assign([0]);
        let new = ledger.open(0, 5, 10).unwrap();
        ledger.complete(old, "stale");
        assert!(ledger.take(1000, NOW).is_empty());
        ledger.complete(new, "fresh");
        assert_eq!(ledger.take(1000, NOW)[0].outcome, "fresh");
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn what_was_taken_away_while_publishing_is_not_committed() {
        let ledger = Ledger::default();
        ledger.assign([0, 1]);
        for partition in [0, 1] {
            let ticket = ledger.open(partition, 0, 7).unwrap();
            ledger.complete(ticket, "x");
        }
        let mut group = ledger.take(1000, NOW);
        ledger.revoke([0]);
        ledger.assign([0]);
        ledger.drop_revoked(&mut group);
        assert_eq!(Ledger::commit_points(&group), HashMap::from([(1, 1)]));
        assert_eq!(ledger.tokens(), 7);
        ledger.release(&group);
        assert!(ledger.is_drained());
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn lag_counts_what_is_not_published_yet() {
        let ledger = Ledger::default();
        assert_eq!(ledger.lag(0, 10, 30), None);
        ledger.assign([0]);
        assert_eq!(ledger.lag(0, 10, 30), Some(20), "from the committed offset");
        assert_eq!(ledger.lag(0, -1001, 30), Some(30), "from the start where nothing was committed");
        let ticket = ledger.open(0, 10, 1).unwrap();
        ledger.open(0, 11, 1).unwrap();
        assert_eq!(ledger.lag(0, 10, 30), Some(20), "what is read is not published");
        ledger.complete(ticket, "x");
        assert_eq!(ledger.take(1000, NOW).len(), 1);
        assert_eq!(ledger.lag(0, 10, 30), Some(19));
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn groups_are_cut_at_about_the_size_asked_for() {
        let ledger = Ledger::default();
        ledger.assign([0]);
        for offset in 0..10 {
            let ticket = ledger.open(0, offset, 10).unwrap();
            ledger.complete(ticket, "x");
        }
        assert_eq!(ledger.take(25, NOW).len(), 3);
        assert!(!ledger.wait_drained(&[0], Duration::from_millis(1)));
    }
}
