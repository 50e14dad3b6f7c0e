//! Numbers as the cells of a table.

use super::bootstrap::Estimate;
use super::rows::Stat;

/// A ratio with its interval.
pub(super) fn ratio(estimate: Estimate) -> String {
    let text = |value: Option<f64>| value.map_or("never".to_owned(), |value| format!("{value:.2}"));
    match estimate {
        Estimate { value: None, low: None, high: None } => "never".to_owned(),
        Estimate { value, low, high } => format!("{} [{}, {}]", text(value), text(low), text(high)),
    }
}

/// A difference of losses with its interval.
pub(super) fn difference(estimate: Estimate) -> String {
    let text = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:+.3}"));
    format!("{} [{}, {}]", text(estimate.value), text(estimate.low), text(estimate.high))
}

pub(super) fn shown(stat: Option<Stat>, decimals: usize) -> String {
    match stat {
        None => "–".to_owned(),
        Some(Stat { mean, deviation: Some(deviation), .. }) => {
            format!("{mean:.decimals$} ± {deviation:.decimals$}")
        }
        Some(Stat { mean, .. }) => format!("{mean:.decimals$}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Estimate, difference, ratio};

    #[test]
    fn what_never_happened_is_said_so() {
        let estimate = |value, low, high| Estimate { value, low, high };
        assert_eq!(ratio(estimate(Some(0.414), Some(0.3), Some(0.5))), "0.41 [0.30, 0.50]");
        assert_eq!(ratio(estimate(Some(0.9), Some(0.75), None)), "0.90 [0.75, never]");
        assert_eq!(ratio(Estimate::default()), "never");
        assert_eq!(difference(estimate(Some(-0.2), Some(-0.25), Some(0.01))), "-0.200 [-0.250, +0.010]");
    }
}
