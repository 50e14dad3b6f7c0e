//! What happens in a feed, told to whoever counts it.

use std::fmt::Debug;
use std::sync::Arc;

/// Hears what happens in a feed. Calls come from the thread that reads the topic and from the one that takes
/// micro-batches, and must return at once.
#[allow(unused_variables, reason = "an observer hears what it cares for")]
pub trait Observer: Debug + Send + Sync {
    /// Records that wait to be decoded became more or, with a number below zero, fewer.
    fn fetched(&self, change: i64) {}

    /// Documents that wait decoded became more or fewer.
    fn queued(&self, change: i64) {}

    /// Records of the topic that are not read yet became more or fewer. Each reader adds and takes off its own.
    fn lag(&self, change: i64) {}

    /// A record without a payload was passed over.
    fn tombstone(&self) {}

    /// A record was refused, for a reason of [`crate::stream::StreamError::REJECTIONS`].
    fn rejected(&self, reason: &'static str) {}

    /// Retention has removed records that an earlier pass over the topic had read.
    fn removed(&self, records: u64) {}
}

/// Hears nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {}

/// An observer that several readers share.
pub type SharedObserver = Arc<dyn Observer>;
