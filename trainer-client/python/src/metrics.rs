//! Counts of what happens in the stream.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sluice_feed::observer::Observer;
use sluice_feed::stream::StreamError;

/// What an observer has heard so far.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    fetched: AtomicI64,
    queued: AtomicI64,
    lag: AtomicI64,
    tombstones: AtomicU64,
    removed: AtomicU64,
    rejected: Mutex<[u64; StreamError::REJECTIONS.len()]>,
}

impl Observer for Counts {
    fn fetched(&self, change: i64) {
        self.fetched.fetch_add(change, Ordering::Relaxed);
    }

    fn queued(&self, change: i64) {
        self.queued.fetch_add(change, Ordering::Relaxed);
    }

    fn lag(&self, change: i64) {
        self.lag.fetch_add(change, Ordering::Relaxed);
    }

    fn tombstone(&self) {
        self.tombstones.fetch_add(1, Ordering::Relaxed);
    }

    fn rejected(&self, reason: &'static str) {
        let mut rejected = self.rejected.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = StreamError::REJECTIONS.iter().position(|name| *name == reason) {
            rejected[index] += 1;
        }
    }

    fn removed(&self, records: u64) {
        self.removed.fetch_add(records, Ordering::Relaxed);
    }
}

impl Counts {
    /// The counts by name. Gauges (`records_fetched`, `documents_queued`, `lag_records`) are never below zero.
    pub(crate) fn put_into(&self, dictionary: &Bound<'_, PyDict>) -> PyResult<()> {
        let gauge = |value: &AtomicI64| value.load(Ordering::Relaxed).max(0);
        dictionary.set_item("records_fetched", gauge(&self.fetched))?;
        dictionary.set_item("documents_queued", gauge(&self.queued))?;
        dictionary.set_item("lag_records", gauge(&self.lag))?;
        dictionary.set_item("tombstones_total", self.tombstones.load(Ordering::Relaxed))?;
        dictionary.set_item("records_removed_total", self.removed.load(Ordering::Relaxed))?;
        let by_reason = PyDict::new(dictionary.py());
        let rejected = *self.rejected.lock().unwrap_or_else(PoisonError::into_inner);
        for (reason, count) in StreamError::REJECTIONS.iter().zip(rejected) {
            by_reason.set_item(reason, count)?;
        }
        dictionary.set_item("records_rejected_total", by_reason)
    }
}
