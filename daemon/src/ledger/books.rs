//! The books of [`super::Ledger`]: which records are in flight, by partition, and how far each has come.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

/// A record in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// Partition of the documents topic.
    pub partition: i32,
    /// Offset in that partition.
    pub offset: i64,
    pub(super) epoch: u64,
}

/// How far a record has come.
#[derive(Debug)]
pub(super) enum Stage<T> {
    /// Something of it still waits for the model.
    Opened,
    /// The model has all of it.
    HandedOver,
    /// What became of it, and when that was known.
    Complete(T, Instant),
}

/// A record in flight, and its place in the books.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) ticket: Ticket,
    pub(super) tokens: usize,
    pub(super) opened: Instant,
    pub(super) stage: Stage<T>,
}

impl<T> Entry<T> {
    /// Whether its outcome is known.
    pub(super) fn is_complete(&self) -> bool {
        matches!(self.stage, Stage::Complete(..))
    }
}

/// What is in flight of one partition.
#[derive(Debug)]
pub(super) struct Partition<T> {
    pub(super) epoch: u64,
    /// Records not yet taken, in the order they were read.
    pub(super) waiting: VecDeque<Entry<T>>,
    /// Records taken and not yet released.
    pub(super) publishing: usize,
    /// Offset after the last record read.
    pub(super) next: Option<i64>,
}

/// All of it, with its sums.
#[derive(Debug)]
pub(super) struct State<T> {
    pub(super) partitions: HashMap<i32, Partition<T>>,
    pub(super) epochs: u64,
    /// Tokens in flight.
    pub(super) tokens: usize,
    /// Of these, tokens of records that are complete and not yet taken.
    pub(super) complete_tokens: usize,
    /// Records in flight that are not complete.
    pub(super) incomplete: usize,
    /// When the oldest record was opened that is taken and not yet released.
    pub(super) oldest_taken: Option<Instant>,
    /// Nothing is opened any more.
    pub(super) closed: bool,
}

impl<T> State<T> {
    /// Empty books.
    pub(super) fn new() -> Self {
        Self {
            partitions: HashMap::new(),
            epochs: 0,
            tokens: 0,
            complete_tokens: 0,
            incomplete: 0,
            oldest_taken: None,
            closed: false,
        }
    }

    /// Takes `entries`, which are in no partition any more, off the books.
    pub(super) fn forget(&mut self, entries: impl IntoIterator<Item = Entry<T>>) {
        for entry in entries {
            self.tokens -= entry.tokens;
            if entry.is_complete() {
                self.complete_tokens -= entry.tokens;
            } else {
                self.incomplete -= 1;
            }
        }
    }

    /// Forgets everything in `partition` from the first record on of which something still waits for the model.
    pub(super) fn forget_waiting(&mut self, partition: i32) {
        let Some(books) = self.partitions.get_mut(&partition) else { return };
        let Some(first) = books.waiting.iter().position(|entry| matches!(entry.stage, Stage::Opened)) else {
            return;
        };
        let forgotten = books.waiting.split_off(first);
        books.next = forgotten.front().map(|entry| entry.ticket.offset);
        self.forget(forgotten);
    }

    /// Whether nothing is in flight.
    pub(super) fn is_drained(&self) -> bool {
        self.tokens == 0 && self.partitions.values().all(|p| p.waiting.is_empty() && p.publishing == 0)
    }

    /// Whether the partition of `ticket` is assigned as it was when the record was read.
    pub(super) fn is_current(&self, ticket: Ticket) -> bool {
        self.partitions.get(&ticket.partition).is_some_and(|books| books.epoch == ticket.epoch)
    }

    /// The entry of `ticket`, unless it was forgotten.
    pub(super) fn entry(&mut self, ticket: Ticket) -> Option<&mut Entry<T>> {
        let books = self.partitions.get_mut(&ticket.partition)?;
        let index = books.waiting.binary_search_by_key(&ticket.offset, |entry| entry.ticket.offset).ok()?;
        Some(&mut books.waiting[index]).filter(|entry| entry.ticket == ticket)
    }
}
