//! What systemd is told: that the start is over, what the daemon is doing, and that it is alive.
//!
//! Without `NOTIFY_SOCKET` in the environment nobody wants to know, and nothing is sent.

use std::time::Duration;

use sd_notify::NotifyState;

use crate::health::Health;
use crate::metrics::Metrics;

/// How often the manager hears of the daemon; signs of life may be due more often.
const EVERY: Duration = Duration::from_secs(1);

/// Tells the manager what changes, until the process ends.
///
/// A sign of life is sent only when reading, scoring and publishing have all turned since the last one: a timer alone
/// would feed the watchdog of a daemon that hangs.
pub async fn keep_informed(health: Health, metrics: Metrics) {
    // Four chances within the time that the manager allows.
    let every = sd_notify::watchdog_enabled().map_or(EVERY, |allowed| EVERY.min(allowed / 4));
    let mut fed = Duration::ZERO;
    let mut said = String::new();
    let (mut ready, mut stopping) = (false, false);
    loop {
        // Asked before the status is made, and told after it: whoever waits for the start sees what came of it.
        let has_started = health.has_started();
        let status = status(&health, &metrics);
        if status != said {
            send(&[NotifyState::Status(&status)]);
            said = status;
        }
        if !ready && has_started {
            ready = true;
            send(&[NotifyState::Ready]);
        }
        if !stopping && health.is_leaving() {
            stopping = true;
            send(&[NotifyState::Stopping]);
        }
        if health.progressed_since(fed) {
            fed = health.now();
            send(&[NotifyState::Watchdog]);
        }
        tokio::time::sleep(every).await;
    }
}

/// Runs a reload between the two messages that `systemctl reload` waits for.
pub fn during_reload<T>(reload: impl FnOnce() -> T) -> T {
    let since = NotifyState::monotonic_usec_now();
    send(&[NotifyState::Reloading].into_iter().chain(since).collect::<Vec<_>>());
    let outcome = reload();
    send(&[NotifyState::Ready]);
    outcome
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "cannot notify systemd");
    }
}

/// One line for `systemctl status`.
fn status(health: &Health, metrics: &Metrics) -> String {
    let in_flight = metrics.in_flight_tokens.get();
    if health.is_leaving() {
        return format!("finishing {in_flight} tokens in flight");
    }
    match health.not_ready() {
        Some(why) => format!("waiting: {why}"),
        None => format!(
            "scoring {} partitions; {} records behind, {in_flight} tokens in flight",
            metrics.assigned_partitions.get(),
            metrics.consumer_lag.get(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::unwrap_used)]
    fn the_status_says_what_is_waited_for_and_then_what_is_done() {
        let (health, metrics) = (Health::default(), Metrics::new().unwrap());
        assert_eq!(status(&health, &metrics), "waiting: the model is loading");
        health.set_serving();
        metrics.assigned_partitions.set(3);
        metrics.consumer_lag.set(12);
        assert_eq!(status(&health, &metrics), "scoring 3 partitions; 12 records behind, 0 tokens in flight");
        metrics.in_flight_tokens.set(40);
        health.stop();
        assert_eq!(status(&health, &metrics), "finishing 40 tokens in flight");
    }
}
