//! Held-out loss over the tokens of a run, and what it took to come down to another run's end.
//!
//! One evaluation is noisy: its neighbours differ by several hundredths of a nat, as much as some runs do. So a curve is the
//! mean of a few evaluations in a row, and its end is the mean of the last ones.

use super::metrics::EvalMetric;

/// Evaluations in a row that a point is the mean of.
pub const AVERAGED: usize = 3;

/// A point of a curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Mean of the tokens (predictions) seen in training.
    pub tokens: f64,
    /// Mean loss in nats.
    pub loss: f64,
}

/// The curve of a run on one evaluation set.
#[derive(Clone, Debug, PartialEq)]
pub struct LearningCurve {
    points: Vec<Point>,
}

impl LearningCurve {
    /// The curve through evaluations on one set, which are in order. Of fewer than [`AVERAGED`] there is one point.
    pub fn of<'a>(evals: impl IntoIterator<Item = &'a EvalMetric>) -> Self {
        let point = |eval: &EvalMetric| Point { tokens: eval.tokens as f64, loss: eval.loss };
        Self::through(evals.into_iter().map(point))
    }

    /// The same of evaluations that come from elsewhere, such as means over several runs.
    pub fn through(evaluations: impl IntoIterator<Item = Point>) -> Self {
        let evaluations: Vec<Point> = evaluations.into_iter().collect();
        let mean = |window: &[Point]| {
            let of = |value: fn(&Point) -> f64| window.iter().map(value).sum::<f64>() / window.len() as f64;
            Point { tokens: of(|point| point.tokens), loss: of(|point| point.loss) }
        };
        let width = AVERAGED.min(evaluations.len()).max(1);
        Self { points: evaluations.windows(width).map(mean).collect() }
    }

    /// Where the run ended.
    pub fn end(&self) -> Option<Point> {
        self.points.last().copied()
    }

    /// Tokens seen when the loss first came down to `goal`, on a straight line between points.
    pub fn tokens_to(&self, goal: f64) -> Option<f64> {
        let reached = self.points.iter().position(|point| point.loss <= goal)?;
        let after = self.points[reached];
        let Some(before) = reached.checked_sub(1).map(|index| self.points[index]) else {
            return Some(after.tokens);
        };
        let share = (before.loss - goal) / (before.loss - after.loss);
        Some(before.tokens + share * (after.tokens - before.tokens))
    }

    /// Loss after so many tokens, on a straight line between points; before the first and after the last point that point's.
    pub fn loss_at(&self, tokens: f64) -> Option<f64> {
        let Some(next) = self.points.iter().position(|point| point.tokens >= tokens) else {
            return self.end().map(|end| end.loss);
        };
        let after = self.points[next];
        let Some(before) = next.checked_sub(1).map(|index| self.points[index]) else {
            return Some(after.loss);
        };
        let share = (tokens - before.tokens) / (after.tokens - before.tokens);
        Some(before.loss + share * (after.loss - before.loss))
    }

    /// Tokens to the end of `other`, over the tokens that `other` took to it; 1 for the run itself, unless it was there before.
    pub fn tokens_to_end_of(&self, other: &Self) -> Option<f64> {
        let end = other.end()?;
        Some(self.tokens_to(end.loss)? / end.tokens)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::*;

    fn curve(losses: &[f64]) -> LearningCurve {
        let eval = |(index, &loss): (usize, &f64)| EvalMetric {
            step: index as u64,
            tokens: 100 * index as u64,
            set: "math".to_owned(),
            loss,
            predictions: 1,
            sure: None,
        };
        let evals: Vec<EvalMetric> = losses.iter().enumerate().map(eval).collect();
        LearningCurve::of(&evals)
    }

    #[test]
    fn a_point_is_the_mean_of_three_evaluations() {
        let end = curve(&[5.0, 4.0, 3.0, 4.0]).end().unwrap();
        assert!((end.tokens - 200.0).abs() < 1e-12);
        assert!((end.loss - 11.0 / 3.0).abs() < 1e-12);
        assert_eq!(curve(&[]).end(), None);
        assert_eq!(curve(&[5.0, 4.0]).end(), Some(Point { tokens: 50.0, loss: 4.5 }));
    }

    #[test]
    fn a_loss_lies_between_points_and_stays_at_the_ends() {
        // Points are 5 at 100 tokens and 3 at 200.
        let curve = curve(&[6.0, 5.0, 4.0, 0.0]);
        let expected = [(50.0, 5.0), (100.0, 5.0), (150.0, 4.0), (200.0, 3.0), (900.0, 3.0)];
        for (tokens, loss) in expected {
            assert_eq!(curve.loss_at(tokens), Some(loss), "after {tokens} tokens");
        }
        assert_eq!(LearningCurve::through([]).loss_at(1.0), None);
    }

    #[test]
    fn a_run_that_falls_twice_as_fast_needs_half_the_tokens() {
        let plain = curve(&[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]);
        let fast = curve(&[6.0, 4.0, 2.0, 0.0, 0.0, 0.0]);
        // Plain ends at a loss of 2 after 400 tokens. The other's points are 4 at 100, 2 at 200.
        assert_eq!(fast.tokens_to_end_of(&plain), Some(0.5));
        assert_eq!(plain.tokens_to_end_of(&plain), Some(1.0));
        assert_eq!(curve(&[6.0; 6]).tokens_to_end_of(&plain), None);
        // A single low evaluation is no arrival.
        let lucky = curve(&[6.0, 6.0, 1.0, 6.0, 6.0, 6.0]);
        assert_eq!(lucky.tokens_to_end_of(&plain), None);
    }
}
