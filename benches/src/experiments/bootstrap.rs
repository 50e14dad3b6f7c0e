//! How far chance alone moves a comparison: intervals by the bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap,
//! 1993, chapter 13: percentiles). Seeds and held-out templates are drawn with replacement, the same of an arm and of plain
//! training, so that differences stay paired.

use serde::Serialize;
use sluice_feed::random::SplitMix64;

use super::arms::{Arm, Comparison, Ratios, Sample};

/// Key of all draws: the same runs give the same intervals.
pub(super) const SEED: u64 = 13;
/// How often is drawn.
pub(super) const DRAWS: usize = 2000;
/// Share of the draws that lie within an interval.
pub(super) const COVERAGE: f64 = 0.95;

/// A number and its interval. Of what never happened there is none: no `high` says that in some draws the loss never came
/// down to plain training's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Estimate {
    /// Of all runs and templates.
    pub value: Option<f64>,
    /// Lower end of the interval.
    pub low: Option<f64>,
    /// Upper end of the interval.
    pub high: Option<f64>,
}

/// A comparison with plain training, with intervals; what [`Comparison`] and [`Ratios`] hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Estimates {
    pub difference: Estimate,
    pub tokens: Estimate,
    pub flops: Estimate,
    pub flops_with_scoring: Estimate,
    pub cpu: Estimate,
    pub cpu_with_scoring: Estimate,
    pub wall: Estimate,
    pub wall_with_scoring: Estimate,
}

/// An arm against plain training on templates with these weights; those without weight are left out.
pub(super) fn estimates(arm: &Arm, plain: &Arm, weights: &[f64]) -> Estimates {
    of(arm, plain, weights, true)
}

/// Plain training against itself, each time with other seeds drawn: what of a ratio is chance.
pub(super) fn null(plain: &Arm, weights: &[f64]) -> Estimates {
    of(plain, plain, weights, false)
}

fn of(arm: &Arm, plain: &Arm, weights: &[f64], is_paired: bool) -> Estimates {
    let seeds: Vec<usize> = (0..plain.runs.len()).collect();
    let whole = Sample { seeds: seeds.clone(), plain_seeds: seeds, weights: weights.to_vec() };
    let found = arm.against(plain, &whole);
    let draws: Vec<Comparison> = (0..DRAWS)
        .filter_map(|draw| arm.against(plain, &sample(draw, plain.runs.len(), weights, is_paired)))
        .collect();
    let estimate = |of: &dyn Fn(&Comparison) -> Option<f64>| {
        let drawn = draws.iter().map(of).collect();
        let (low, high) = interval(drawn);
        Estimate { value: found.as_ref().and_then(of), low, high }
    };
    let ratio = |of: fn(&Ratios) -> f64| estimate(&|found| found.ratios.as_ref().map(of));
    Estimates {
        difference: estimate(&|found| Some(found.difference)),
        tokens: ratio(|ratios| ratios.tokens),
        flops: ratio(|ratios| ratios.flops),
        flops_with_scoring: ratio(|ratios| ratios.flops_with_scoring),
        cpu: ratio(|ratios| ratios.cpu),
        cpu_with_scoring: ratio(|ratios| ratios.cpu_with_scoring),
        wall: ratio(|ratios| ratios.wall),
        wall_with_scoring: ratio(|ratios| ratios.wall_with_scoring),
    }
}

/// Seeds and templates of one draw, the same for every arm.
fn sample(draw: usize, seeds: usize, weights: &[f64], is_paired: bool) -> Sample {
    let mut random = SplitMix64::keyed(SEED, draw as u64);
    let mut draw_seeds = || (0..seeds).map(|_| random.below(seeds)).collect::<Vec<usize>>();
    let drawn = draw_seeds();
    let plain_seeds = if is_paired { drawn.clone() } else { draw_seeds() };
    let templates: Vec<usize> = (0..weights.len()).filter(|&index| weights[index] > 0.0).collect();
    let mut drawn_weights = vec![0.0; weights.len()];
    for _ in 0..templates.len() {
        let template = templates[random.below(templates.len())];
        drawn_weights[template] += weights[template];
    }
    Sample { seeds: drawn, plain_seeds, weights: drawn_weights }
}

/// Ends of the middle part of what was drawn; what never happened is above all numbers.
fn interval(drawn: Vec<Option<f64>>) -> (Option<f64>, Option<f64>) {
    let mut sorted: Vec<f64> = drawn.into_iter().map(|value| value.unwrap_or(f64::INFINITY)).collect();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return (None, None) };
    let outside = (1.0 - COVERAGE) / 2.0;
    // Outwards, so that the interval is rather too wide than too narrow.
    let low = (outside * last as f64).floor() as usize;
    let number = |index: usize| Some(sorted[index]).filter(|value| value.is_finite());
    (number(low), number(last - low))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::super::arms::tests::run;
    use super::super::arms::{Arm, ArmRun, Effort};
    use super::{estimates, interval, null};

    /// Five evaluations on four templates: a line down from 6, moved by `seed`, and each template by its own part of `shift`.
    fn falling(by: f64, seed: f64, shift: f64) -> ArmRun {
        let losses: Vec<Vec<f64>> = (0..7)
            .map(|step| {
                let loss = 6.0 - by * f64::from(step) + seed;
                (0..4).map(|template| loss + shift * f64::from(template)).collect()
            })
            .collect();
        run(&losses, 1.0)
    }

    fn arm(by: f64, seeds: &[f64], shift: f64) -> Arm {
        Arm { runs: seeds.iter().map(|&seed| falling(by, seed, shift)).collect(), scoring: Effort::default() }
    }

    #[test]
    fn an_interval_is_the_middle_of_what_was_drawn_and_never_is_above_all() {
        let numbers: Vec<Option<f64>> = (0..=1000).rev().map(|number| Some(f64::from(number))).collect();
        assert_eq!(interval(numbers), (Some(25.0), Some(975.0)));
        let mut some = vec![Some(1.0); 90];
        some.extend([None; 10]);
        assert_eq!(interval(some), (Some(1.0), None));
        assert_eq!(interval(vec![None; 10]), (None, None));
    }

    #[test]
    fn what_moves_both_alike_moves_no_paired_difference() {
        // Seeds and templates differ by much more than the arms do.
        let seeds = [0.5, -0.5, 0.1, 0.9, -1.0];
        let (plain, arm) = (arm(0.3, &seeds, 0.7), arm(0.4, &seeds, 0.7));
        let weights = [10.0, 20.0, 10.0, 0.0];
        let found = estimates(&arm, &plain, &weights);
        for value in [found.difference.value, found.difference.low, found.difference.high] {
            assert!((value.unwrap() + 0.5).abs() < 1e-9, "{found:?}");
        }
        // Plain ends 1.5 below its beginning, and the other is there after three quarters.
        for value in [found.tokens.value, found.tokens.low, found.tokens.high] {
            assert!((value.unwrap() - 0.75).abs() < 1e-9, "{found:?}");
        }
        // Against other seeds it is not so: that is what the null says.
        let null = null(&plain, &weights);
        assert_eq!(null.tokens.value, Some(1.0));
        assert!(null.difference.low.unwrap() < -0.2 && null.difference.high.unwrap() > 0.2, "{null:?}");
        assert_eq!(found, estimates(&arm, &plain, &weights), "the same draws");
    }

    #[test]
    fn an_interval_covers_what_differs_by_seed() {
        let plain = arm(0.3, &[0.0; 5], 0.0);
        // 0.1 to 0.5 nats lower, by seed.
        let lower: Vec<f64> = (1..=5).map(|seed| -0.1 * f64::from(seed)).collect();
        let found = estimates(&arm(0.3, &lower, 0.0), &plain, &[1.0; 4]).difference;
        let (low, high) = (found.low.unwrap(), found.high.unwrap());
        assert!((found.value.unwrap() + 0.3).abs() < 1e-9);
        // The mean of five draws of five values has a deviation of 0.14 / sqrt(5) = 0.063: two of them on each side.
        assert!((-0.46..=-0.38).contains(&low) && (-0.22..=-0.14).contains(&high), "{found:?}");
    }
}
