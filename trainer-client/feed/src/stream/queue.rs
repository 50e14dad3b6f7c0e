//! Documents between the thread that reads a topic and the one that trains: a queue for each lane. Nobody waits for room
//! in them, so a stream can be left at any moment; the reader looks whether there is room before it decodes.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sluice_schemas::fingerprint::Fingerprint;

use super::error::StreamError;
use crate::document::Document;

/// A document, where it was read, and which model scored it.
#[derive(Debug)]
pub(super) struct Delivery {
    pub document: Document,
    pub epoch: u64,
    pub offset: i64,
    pub reference_model: Option<Fingerprint>,
}

/// What a lane's queue holds next.
pub(super) enum Waiting {
    Delivery(Delivery),
    /// The lane has ended.
    Ended,
    /// The lane, or the whole stream, ends with this error.
    Failed(StreamError),
    /// Nothing yet.
    Nothing,
    /// The reader is gone without a word.
    Gone,
}

/// The queues of a rank's lanes, by their order there.
#[derive(Debug)]
pub(super) struct Queues {
    state: Mutex<State>,
    filled: Condvar,
}

#[derive(Debug)]
struct State {
    lanes: Vec<Lane>,
    /// What ends all lanes, once they have given what they hold.
    failed: Option<StreamError>,
    is_closed: bool,
    is_reader_gone: bool,
}

#[derive(Debug, Default)]
struct Lane {
    deliveries: VecDeque<Delivery>,
    tokens: usize,
    has_ended: bool,
    failed: Option<StreamError>,
}

impl Queues {
    pub fn new(lanes: usize) -> Self {
        let lanes = std::iter::repeat_with(Lane::default).take(lanes).collect();
        let state = State { lanes, failed: None, is_closed: false, is_reader_gone: false };
        Self { state: Mutex::new(state), filled: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tokens that wait in a lane.
    pub fn tokens(&self, lane: usize) -> usize {
        self.state().lanes[lane].tokens
    }

    /// Documents that wait, over all lanes.
    pub fn waiting(&self) -> usize {
        self.state().lanes.iter().map(|lane| lane.deliveries.len()).sum()
    }

    /// Whether nobody takes documents any more.
    pub fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    /// Says that nobody takes documents any more.
    pub fn close(&self) {
        self.state().is_closed = true;
    }

    pub fn push(&self, lane: usize, delivery: Delivery) {
        let lane = &mut self.state().lanes[lane];
        lane.tokens += delivery.document.tokens().len();
        lane.deliveries.push_back(delivery);
        self.filled.notify_one();
    }

    /// Ends a lane after what it holds, with an error if that is why.
    pub fn end(&self, lane: usize, failed: Option<StreamError>) {
        let lane = &mut self.state().lanes[lane];
        if !lane.has_ended {
            (lane.has_ended, lane.failed) = (true, failed);
        }
        self.filled.notify_one();
    }

    /// Ends all lanes after what they hold; the reader says this last.
    pub fn leave(&self, failed: Option<StreamError>) {
        let mut state = self.state();
        (state.is_reader_gone, state.failed) = (true, failed);
        self.filled.notify_one();
    }

    /// Takes what a lane holds next, and waits for it for a moment.
    pub fn take(&self, lane: usize, patience: Duration) -> Waiting {
        let mut state = self.state();
        if state.lanes[lane].deliveries.is_empty() && !state.lanes[lane].has_ended && !state.is_reader_gone {
            let waited = self.filled.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
        }
        let is_gone = state.is_reader_gone;
        let own = &mut state.lanes[lane];
        if let Some(delivery) = own.deliveries.pop_front() {
            own.tokens -= delivery.document.tokens().len();
            return Waiting::Delivery(delivery);
        }
        if let Some(error) = own.failed.take() {
            return Waiting::Failed(error);
        }
        if own.has_ended {
            return Waiting::Ended;
        }
        match state.failed.take() {
            Some(error) => Waiting::Failed(error),
            None if is_gone => Waiting::Gone,
            None => Waiting::Nothing,
        }
    }
}
