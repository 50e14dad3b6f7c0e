//! Whether the brokers answer, said once each time it changes.

use crate::health::{Condition, Health, Wait};

/// What was last heard of the brokers.
#[derive(Debug)]
pub(super) struct Broker(Condition);

impl Broker {
    /// Nothing was heard of them yet, and they are taken to be up.
    pub(super) fn new(health: &Health) -> Self {
        Self(health.condition(Wait::Broker))
    }

    /// Notes that none answers.
    pub(super) fn set_down(&self, reason: &str) {
        if self.0.set_down(true) {
            tracing::warn!(reason, "no broker answers; waiting for one");
        }
    }

    /// Notes that one answers.
    pub(super) fn set_up(&self) {
        if self.0.set_down(false) {
            tracing::info!("a broker answers again");
        }
    }

    /// Whether none was last heard to answer.
    pub(super) fn is_down(&self) -> bool {
        self.0.is_down()
    }
}
