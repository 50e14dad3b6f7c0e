//! One kind of student over its seeds, and which of the rules is chosen.

use std::collections::BTreeMap;

use serde::Serialize;

use super::arms::Sample;
use super::bootstrap::{self, Estimates};
use super::kind::Kind;
use super::tried::{RunResults, Tried};

/// A mean over seeds, and the standard deviation of a sample; absent without a value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Stat {
    pub mean: f64,
    /// Absent of one value.
    pub deviation: Option<f64>,
    pub values: usize,
}

/// One kind of student, over the seeds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub kind: String,
    /// Share asked for, if it is `slm` with exact gradients.
    pub slm_keep: Option<f64>,
    /// Whether it is a rule that chooses tokens by scores.
    pub is_scored: bool,
    /// Whether it reads another text than the stream: a control, or the reference.
    pub has_own_text: bool,
    /// The learning rate that it is reported at.
    pub learning_rate: f64,
    /// Share of the tokens that were kept.
    pub kept: Option<Stat>,
    pub runs: usize,
    /// Seeds with which it came down to the end of the plain run of the seed, on the reporting half.
    pub reached: usize,
    /// Final loss by evaluation set, nats.
    pub losses: BTreeMap<String, Stat>,
    /// Share of held-out answers of which it is sure at the end.
    pub sure: Option<Stat>,
    pub unselected_loss: Option<Stat>,
    /// Against plain training, on the templates that choose.
    pub choosing: Estimates,
    /// The same on those that report.
    pub reporting: Estimates,
}

/// The rules with the lowest ratios on the templates that choose.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Chosen {
    /// By the tokens that it takes to plain training's end.
    pub by_tokens: Option<String>,
    /// By the FLOPs, scoring counted.
    pub by_flops: Option<String>,
}

impl Row {
    /// `weights` are those of the templates that choose and of those that report.
    pub fn of(tried: &Tried, plain: &Tried, weights: &[Vec<f64>; 2]) -> Self {
        let runs = &tried.runs;
        let last = |run: &RunResults, set: &str| run.curve.iter().rfind(|eval| eval.set == set).cloned();
        let mut losses = BTreeMap::new();
        for eval in runs.iter().flat_map(|run| &run.curve) {
            if !losses.contains_key(&eval.set) {
                let finals = runs.iter().filter_map(|run| Some(last(run, &eval.set)?.loss));
                losses.extend(stat(finals).map(|stat| (eval.set.clone(), stat)));
            }
        }
        let [choosing, reporting] =
            weights.each_ref().map(|weights| bootstrap::estimates(&tried.arm, &plain.arm, weights));
        let reached = (0..plain.runs.len()).filter(|&seed| {
            let found = tried.arm.against(&plain.arm, &Sample::of_seed(seed, &weights[1]));
            found.is_some_and(|found| found.ratios.is_some())
        });
        Self {
            kind: tried.kind.clone(),
            slm_keep: match tried.asked {
                Some(Kind::Slm(keep, sluice_trainer::model::Backward::Exact)) => Some(keep),
                _ => None,
            },
            is_scored: tried.asked.is_some_and(Kind::is_scored),
            has_own_text: tried.asked.is_none_or(Kind::has_own_text),
            learning_rate: tried.learning_rate,
            kept: stat(runs.iter().map(|run| run.tokens_kept as f64 / run.effort.tokens as f64)),
            runs: runs.len(),
            reached: reached.count(),
            losses,
            sure: stat(runs.iter().filter_map(|run| last(run, "answers")?.sure)),
            unselected_loss: stat(runs.iter().filter_map(|run| run.unselected_loss)),
            choosing,
            reporting,
        }
    }
}

impl Chosen {
    /// The best of the rules; none where none came down to plain training's end.
    pub fn among(rows: &[Row]) -> Self {
        let best = |of: fn(&Estimates) -> Option<f64>| {
            let rules = rows.iter().filter(|row| row.is_scored);
            let ratios = rules.filter_map(|row| Some((of(&row.choosing)?, &row.kind)));
            ratios.min_by(|left, right| left.0.total_cmp(&right.0)).map(|(_, kind)| kind.clone())
        };
        Self {
            by_tokens: best(|estimates| estimates.tokens.value),
            by_flops: best(|estimates| estimates.flops_with_scoring.value),
        }
    }
}

/// Mean and spread of what there is.
pub(super) fn stat(values: impl Iterator<Item = f64>) -> Option<Stat> {
    let values: Vec<f64> = values.collect();
    let count = values.len() as f64;
    if values.is_empty() {
        return None;
    }
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt());
    Some(Stat { mean, deviation, values: values.len() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::super::bootstrap::{Estimate, Estimates};
    use super::{Chosen, Row, stat};

    #[test]
    fn spread_is_that_of_a_sample() {
        let stat3 = stat([1.0, 2.0, 6.0].into_iter()).unwrap();
        // Mean 3, squares 4 + 1 + 9 = 14, over 2.
        assert!((stat3.mean - 3.0).abs() < 1e-12 && (stat3.deviation.unwrap() - 7f64.sqrt()).abs() < 1e-12);
        assert_eq!(stat([5.0].into_iter()).unwrap().deviation, None);
        assert_eq!(stat(std::iter::empty()), None);
    }

    fn row(kind: &str, is_scored: bool, choosing: [Option<f64>; 2], reporting: f64) -> Row {
        let estimate = |value| Estimate { value, low: None, high: None };
        let estimates = |tokens, flops| Estimates {
            tokens: estimate(tokens),
            flops_with_scoring: estimate(flops),
            ..Estimates::default()
        };
        Row {
            kind: kind.to_owned(),
            slm_keep: None,
            is_scored,
            has_own_text: false,
            learning_rate: 1e-3,
            kept: None,
            runs: 2,
            reached: 2,
            losses: [].into(),
            sure: None,
            unselected_loss: None,
            choosing: estimates(choosing[0], choosing[1]),
            reporting: estimates(Some(reporting), Some(reporting)),
        }
    }

    #[test]
    fn the_half_that_chooses_is_not_the_one_that_reports() {
        let rows = [
            row("plain", false, [Some(1.0), Some(1.0)], 1.0),
            // No rule, however good.
            row("oracle", false, [Some(0.1), Some(0.1)], 0.1),
            // The best by what is reported.
            row("slm-30", true, [Some(0.5), Some(0.7)], 0.2),
            row("adaptive", true, [Some(0.4), Some(0.8)], 0.6),
            row("slm-30-kept", true, [Some(0.6), Some(0.3)], 0.9),
            row("slm-10", true, [None, None], 0.1),
        ];
        let chosen = Chosen::among(&rows);
        assert_eq!(chosen.by_tokens.as_deref(), Some("adaptive"));
        assert_eq!(chosen.by_flops.as_deref(), Some("slm-30-kept"));
        assert_eq!(Chosen::among(&rows[..2]), Chosen::default());
    }
}
