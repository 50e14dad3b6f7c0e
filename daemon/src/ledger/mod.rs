//! What is in flight, in the order it was read: the only place that knows which offsets may be committed.
//!
//! A record is *opened* when it is read, *handed over* once the model has all of it, *completed* when its outcome is
//! known, *taken* once everything before it in its partition is complete, and *released* when it is published and its
//! offset committed. Its tokens count against the budget from open to release, which bounds every queue of the daemon at
//! once.
//!
//! Records are told apart by the epoch of their partition's assignment, so that an outcome which arrives after the
//! partition was taken away is dropped and never committed.

mod books;

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use books::Ticket;
use books::{Entry, Partition, Stage, State};

/// An outcome on its way out.
#[derive(Debug)]
pub struct Taken<T> {
    /// Its place in the ledger.
    pub ticket: Ticket,
    /// What became of the record.
    pub outcome: T,
    /// When it was read.
    pub opened: Instant,
    /// When its outcome was known.
    pub completed: Instant,
    tokens: usize,
}

/// Tokens of the records that are not taken yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queued {
    /// Those without an outcome.
    pub unscored: usize,
    /// Those with one.
    pub unpublished: usize,
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
        Self { state: Mutex::new(State::new()), changed: Condvar::new() }
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
                state.forget(old.waiting);
            }
        }
    }

    /// Partitions that this consumer no longer reads: what is in flight from them is forgotten.
    pub fn revoke(&self, partitions: impl IntoIterator<Item = i32>) {
        let mut state = self.lock();
        for partition in partitions {
            if let Some(old) = state.partitions.remove(&partition) {
                state.forget(old.waiting);
            }
        }
        self.changed.notify_all();
    }

    /// Forgets, of each of `partitions`, everything from the first record on of which something still waits for the
    /// model: it is left for whoever reads the partition next, so that a daemon that gives one up need not score a long
    /// queue, or a long document.
    pub fn forget_waiting(&self, partitions: &[i32]) {
        let mut state = self.lock();
        for &partition in partitions {
            state.forget_waiting(partition);
        }
        self.changed.notify_all();
    }

    /// Opens nothing more, and forgets what still waits for the model: what is left is to be finished.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let assigned: Vec<i32> = state.partitions.keys().copied().collect();
        for partition in assigned {
            state.forget_waiting(partition);
        }
        self.changed.notify_all();
    }

    /// Whether the ledger is closed and nothing is in flight, so that nothing ever will be.
    pub fn is_finished(&self) -> bool {
        let state = self.lock();
        state.closed && state.is_drained()
    }

    /// Enters a record of `tokens` tokens, or nothing where the ledger is closed, its partition is not assigned, or
    /// the record was read before in this assignment.
    pub fn open(&self, partition: i32, offset: i64, tokens: usize) -> Option<Ticket> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        let books = state.partitions.get_mut(&partition)?;
        if books.next.is_some_and(|next| offset < next) {
            return None;
        }
        let ticket = Ticket { partition, offset, epoch: books.epoch };
        books.next = Some(offset + 1);
        books.waiting.push_back(Entry { ticket, tokens, opened: Instant::now(), stage: Stage::Opened });
        state.tokens += tokens;
        state.incomplete += 1;
        Some(ticket)
    }

    /// Whether a record is still to be scored, because it was not forgotten.
    pub fn is_wanted(&self, ticket: Ticket) -> bool {
        self.lock().entry(ticket).is_some()
    }

    /// Notes that the model has all of a record, whose outcome is worth waiting for from here on.
    pub fn hand_over(&self, ticket: Ticket) {
        if let Some(entry) = self.lock().entry(ticket) {
            entry.stage = Stage::HandedOver;
        }
    }

    /// Notes the outcome of a record; that of one that was forgotten is dropped.
    pub fn complete(&self, ticket: Ticket, outcome: T) {
        let mut state = self.lock();
        let Some(entry) = state.entry(ticket) else { return };
        entry.stage = Stage::Complete(outcome, Instant::now());
        let tokens = entry.tokens;
        state.complete_tokens += tokens;
        state.incomplete -= 1;
        self.changed.notify_all();
    }

    /// Takes outcomes that may be published, of at most about `tokens_max` tokens. Waits up to `timeout` for the
    /// first, and from then on up to `delay` for more, as long as any can come. Outcomes of one partition come in the
    /// order in which their records were read.
    pub fn take(&self, tokens_max: usize, timeout: Duration, delay: Duration) -> Group<T> {
        let none = |state: &mut State<T>| {
            !state.partitions.values().any(|p| p.waiting.front().is_some_and(Entry::is_complete))
        };
        let few = |state: &mut State<T>| state.incomplete > 0 && state.complete_tokens < tokens_max;
        let (state, waited) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, none)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Group::new();
        }
        let waited = self.changed.wait_timeout_while(state, delay, few);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;

        let mut group = Group::new();
        let mut tokens = 0;
        let mut oldest = Instant::now();
        for books in state.partitions.values_mut() {
            while tokens < tokens_max && books.waiting.front().is_some_and(Entry::is_complete) {
                let Some(Entry { ticket, tokens: size, opened, stage: Stage::Complete(outcome, completed) }) =
                    books.waiting.pop_front()
                else {
                    break;
                };
                books.publishing += 1;
                tokens += size;
                oldest = oldest.min(opened);
                group.push(Taken { ticket, outcome, opened, completed, tokens: size });
            }
        }
        state.complete_tokens -= tokens;
        state.oldest_taken = Some(oldest).filter(|_| !group.is_empty());
        group
    }

    /// The offset after the last of `group` in each partition: what to commit.
    ///
    /// Call [`Self::drop_revoked`] first.
    pub fn commit_points(group: &Group<T>) -> HashMap<i32, i64> {
        group.iter().map(|taken| (taken.ticket.partition, taken.ticket.offset + 1)).collect()
    }

    /// Whether everything in `group` came from partitions that are assigned as they were when it was read.
    pub fn is_current(&self, group: &Group<T>) -> bool {
        let state = self.lock();
        group.iter().all(|taken| state.is_current(taken.ticket))
    }

    /// Removes from `group` what came from partitions that are no longer assigned as they were: it belongs to
    /// another consumer now.
    pub fn drop_revoked(&self, group: &mut Group<T>) {
        let mut state = self.lock();
        let dropped: Vec<_> = group.extract_if(.., |taken| !state.is_current(taken.ticket)).collect();
        state.tokens -= dropped.iter().map(|taken| taken.tokens).sum::<usize>();
    }

    /// Frees the budget that `group` holds, once it is published and committed.
    pub fn release(&self, group: &Group<T>) {
        let mut state = self.lock();
        state.oldest_taken = None;
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

    /// Tokens that wait for the model, and those that wait to be published.
    pub fn queued(&self) -> Queued {
        let mut queued = Queued::default();
        for entry in self.lock().partitions.values().flat_map(|books| &books.waiting) {
            let queue = if entry.is_complete() { &mut queued.unpublished } else { &mut queued.unscored };
            *queue += entry.tokens;
        }
        queued
    }

    /// Waits until fewer than `tokens_max` tokens are in flight; false where `timeout` passed first.
    pub fn wait_below(&self, tokens_max: usize, timeout: Duration) -> bool {
        let full = |state: &mut State<T>| state.tokens >= tokens_max;
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, full);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Records between what was read of `partition` and published, and `end`, where nothing was read yet counted
    /// from `committed`; nothing where the partition is not assigned. Where nothing of it is in flight, what lies before
    /// `fetched` is done too, whether it held records or not.
    pub fn lag(&self, partition: i32, committed: i64, fetched: i64, end: i64) -> Option<u64> {
        let state = self.lock();
        let books = state.partitions.get(&partition)?;
        let oldest = books.waiting.front().map(|entry| entry.ticket.offset);
        let done = oldest.unwrap_or_else(|| books.next.unwrap_or(committed.max(0)).max(fetched));
        Some(u64::try_from(end - done).unwrap_or(0))
    }

    /// Age of the oldest record in flight.
    pub fn oldest_age(&self) -> Duration {
        let state = self.lock();
        let waiting = state.partitions.values().filter_map(|books| books.waiting.front()).map(|e| e.opened);
        waiting.chain(state.oldest_taken).min().map_or(Duration::ZERO, |opened| opened.elapsed())
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
        self.lock().is_drained()
    }
}

#[cfg(test)]
mod tests;
