//! Numbers and names as people read them.

use super::estimate::Estimate;

/// Most names in a sentence; a table has them all.
const NAMES_MAX: usize = 8;

/// A difference in nats with its interval, if it has one.
pub(super) fn with_interval(estimate: &Estimate) -> String {
    let mean = format!("{} nats", signed(estimate.mean));
    interval(estimate).map_or(mean.clone(), |interval| format!("{mean}, 95 % {interval}"))
}

/// The ends of an interval in nats.
pub(super) fn interval(estimate: &Estimate) -> Option<String> {
    Some(format!("{} to {}", signed(estimate.low?), signed(estimate.high?)))
}

/// Names, the first of them if they are many.
pub(super) fn list(names: &[&str]) -> String {
    let shown = &names[..names.len().min(NAMES_MAX)];
    match names.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// A number, or a dash.
pub(super) fn optional(number: Option<f64>, shown: impl Fn(f64) -> String) -> String {
    number.map_or("–".to_owned(), shown)
}

/// A loss in nats.
pub(super) fn nats(loss: f64) -> String {
    format!("{loss:.3}")
}

/// A difference in nats.
pub(super) fn signed(difference: f64) -> String {
    format!("{difference:+.3}")
}

/// A share, as `61.2 %`.
pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A ratio of the map.
pub(super) fn ratio(ratio: Option<f64>) -> String {
    ratio.map_or("never".to_owned(), |ratio| format!("{ratio:.2}"))
}
