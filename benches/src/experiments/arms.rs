//! An arm of an experiment, which is one kind of student with several seeds, and two of them compared.

use serde::Serialize;
use sluice_trainer::model::cost::Cost;
use sluice_trainer::run::learning_curve::{LearningCurve, Point};
use sluice_trainer::run::recorded::RecordedRun;

use super::group::{BATCH_SIZE, SEQUENCE_LENGTH};
use super::templates::TemplateEval;

/// What something took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Effort {
    /// Tokens: predictions of a run, tokens of scored documents.
    pub tokens: u64,
    /// Floating point operations, from the shapes.
    pub flops: f64,
    /// Wall time.
    pub seconds: f64,
    /// CPU time.
    pub cpu_seconds: f64,
}

impl Effort {
    /// What a run took, by its metrics and the shape of its model.
    pub fn of(run: &RecordedRun, cost: Cost) -> Self {
        Spent::of(run, cost).steps.last().copied().unwrap_or_default()
    }

    /// FLOPs, CPU time and wall time, each times a factor.
    fn resources(self, factor: f64) -> [f64; 3] {
        [self.flops, self.cpu_seconds, self.seconds].map(|value| value * factor)
    }
}

/// What a run had taken after each of its steps, so that nothing is assumed of how its cost is spread: an adaptive rule keeps
/// less and less.
#[derive(Clone, Debug)]
pub(super) struct Spent {
    steps: Vec<Effort>,
}

impl Spent {
    /// Counted step by step: what was kept is known of each.
    pub fn of(run: &RecordedRun, cost: Cost) -> Self {
        let backward = run.record.backward();
        let mut so_far = Effort::default();
        let mut positions = 0;
        let mut after = |step: &sluice_trainer::run::metrics::StepMetric| {
            positions += (BATCH_SIZE * SEQUENCE_LENGTH) as u64;
            so_far = Effort {
                tokens: step.tokens,
                flops: cost.training(positions, step.tokens, step.tokens_kept, backward),
                seconds: so_far.seconds + step.seconds,
                cpu_seconds: so_far.cpu_seconds + step.cpu_seconds,
            };
            so_far
        };
        Self { steps: run.steps().map(&mut after).collect() }
    }

    /// FLOPs, CPU time and wall time until so many tokens were seen, on a straight line within a step.
    pub fn until(&self, tokens: f64) -> [f64; 3] {
        let next = self.steps.partition_point(|step| (step.tokens as f64) < tokens);
        let before = next.checked_sub(1).map_or(Effort::default(), |index| self.steps[index]);
        let Some(after) = self.steps.get(next) else { return before.resources(1.0) };
        let share = (tokens - before.tokens as f64) / (after.tokens - before.tokens).max(1) as f64;
        let (from, to) = (before.resources(1.0 - share), after.resources(share));
        [from[0] + to[0], from[1] + to[1], from[2] + to[2]]
    }
}

/// One run of an arm.
#[derive(Clone, Debug)]
pub(super) struct ArmRun {
    /// Its evaluations on the target.
    pub evals: Vec<TemplateEval>,
    /// What it had taken when.
    pub spent: Spent,
}

/// One kind of student at one learning rate.
#[derive(Clone, Debug)]
pub(super) struct Arm {
    /// By seed, in the order of the plain arm's; one run stands for all seeds.
    pub runs: Vec<ArmRun>,
    /// Scoring of the text that it reads; nothing where it looks at no score.
    pub scoring: Effort,
}

/// Which runs and templates a comparison is made of: all of them, or as they were drawn.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// Indices of seeds.
    pub seeds: Vec<usize>,
    /// Indices of the plain arm's seeds: the same, but for plain against plain.
    pub plain_seeds: Vec<usize>,
    /// Weight of each template: its tokens, times how often it was drawn.
    pub weights: Vec<f64>,
}

impl Sample {
    /// One seed by itself, and every template with its weight.
    pub fn of_seed(seed: usize, weights: &[f64]) -> Self {
        Self { seeds: vec![seed], plain_seeds: vec![seed], weights: weights.to_vec() }
    }
}

/// Shares of what plain training took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Ratios {
    /// Tokens.
    pub tokens: f64,
    /// Floating point operations without scoring.
    pub flops: f64,
    /// And with the scoring of as many tokens.
    pub flops_with_scoring: f64,
    /// CPU time without scoring.
    pub cpu: f64,
    /// And with it.
    pub cpu_with_scoring: f64,
    /// Wall time without scoring.
    pub wall: f64,
    /// And with it.
    pub wall_with_scoring: f64,
}

/// An arm against plain training.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comparison {
    /// Loss after as many tokens as plain training took to its end, less plain training's loss there, nats.
    pub difference: f64,
    /// What it took to come down to plain training's end; absent where it never did.
    pub ratios: Option<Ratios>,
}

impl Arm {
    /// The mean curve of the sampled seeds, over the sampled templates.
    fn curve(&self, seeds: &[usize], weights: &[f64]) -> LearningCurve {
        let runs = || seeds.iter().filter_map(|&seed| self.run(seed));
        let evaluations = runs().map(|run| run.evals.len()).min().unwrap_or(0);
        let all: f64 = weights.iter().sum();
        let loss = |eval: &TemplateEval| {
            let sum: f64 = eval.losses.iter().zip(weights).map(|(loss, weight)| loss * weight).sum();
            sum / all
        };
        let mean = |at: usize, of: &dyn Fn(&TemplateEval) -> f64| {
            runs().map(|run| of(&run.evals[at])).sum::<f64>() / seeds.len() as f64
        };
        LearningCurve::through(
            (0..evaluations)
                .map(|at| Point { tokens: mean(at, &|eval| eval.tokens as f64), loss: mean(at, &loss) }),
        )
    }

    /// Loss at the end of the mean curve over all seeds.
    pub fn end(&self, weights: &[f64]) -> Option<f64> {
        let seeds: Vec<usize> = (0..self.runs.len()).collect();
        self.curve(&seeds, weights).end().map(|end| end.loss)
    }

    fn run(&self, seed: usize) -> Option<&ArmRun> {
        if self.runs.len() == 1 { self.runs.first() } else { self.runs.get(seed) }
    }

    /// Mean FLOPs, CPU time and wall time of the sampled seeds until so many tokens were seen.
    fn spent(&self, seeds: &[usize], tokens: f64) -> [f64; 3] {
        let mut mean = [0.0; 3];
        for run in seeds.iter().filter_map(|&seed| self.run(seed)) {
            for (mean, spent) in mean.iter_mut().zip(run.spent.until(tokens)) {
                *mean += spent / seeds.len() as f64;
            }
        }
        mean
    }

    /// This arm against the plain one; `None` where one of them was not evaluated.
    pub fn against(&self, plain: &Self, sample: &Sample) -> Option<Comparison> {
        let Sample { seeds, plain_seeds, weights } = sample;
        let end = plain.curve(plain_seeds, weights).end()?;
        let curve = self.curve(seeds, weights);
        let ratios = curve.tokens_to(end.loss).map(|tokens| {
            let own = self.spent(seeds, tokens);
            let of_plain = plain.spent(plain_seeds, end.tokens);
            let scored = match self.scoring.tokens {
                0 => [0.0; 3],
                // Each token once, however often it is read.
                all => self.scoring.resources((tokens / all as f64).min(1.0)),
            };
            let ratio = |index: usize| own[index] / of_plain[index];
            let with_scoring = |index: usize| (own[index] + scored[index]) / of_plain[index];
            Ratios {
                tokens: tokens / end.tokens,
                flops: ratio(0),
                flops_with_scoring: with_scoring(0),
                cpu: ratio(1),
                cpu_with_scoring: with_scoring(1),
                wall: ratio(2),
                wall_with_scoring: with_scoring(2),
            }
        });
        Some(Comparison { difference: curve.loss_at(end.tokens)? - end.loss, ratios })
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::{Arm, ArmRun, Effort, Sample, Spent, TemplateEval};

    /// A run that sees 100 tokens between evaluations, and takes so many FLOPs for a token.
    pub fn run(losses: &[impl AsRef<[f64]>], flops: f64) -> ArmRun {
        let eval = |(step, losses): (u64, &[f64])| TemplateEval {
            step,
            tokens: 100 * step,
            losses: losses.to_vec(),
        };
        let spent = |step: u64| Effort {
            tokens: 100 * step,
            flops: flops * 100.0 * step as f64,
            seconds: 2.0 * step as f64,
            cpu_seconds: 4.0 * step as f64,
        };
        ArmRun {
            evals: (0..).zip(losses.iter().map(AsRef::as_ref)).map(eval).collect(),
            spent: Spent { steps: (1..losses.len() as u64).map(spent).collect() },
        }
    }

    /// Two templates with the same losses, in steps of `by` from 6.
    fn falling(by: f64, flops: f64) -> ArmRun {
        let losses: Vec<[f64; 2]> = (0..6).map(|step| [6.0 - by * f64::from(step); 2]).collect();
        run(&losses, flops)
    }

    fn sample() -> Sample {
        Sample { seeds: vec![0, 0, 1], plain_seeds: vec![0, 0, 1], weights: vec![1.0, 3.0] }
    }

    #[test]
    fn an_arm_that_falls_twice_as_fast_takes_half_and_its_scoring_is_counted_for_what_it_read() {
        let plain = Arm { runs: vec![falling(1.0, 10.0), falling(1.0, 10.0)], scoring: Effort::default() };
        let scoring = Effort { tokens: 1000, flops: 2000.0, seconds: 5.0, cpu_seconds: 10.0 };
        let fast = Arm { runs: vec![falling(2.0, 8.0), falling(2.0, 8.0)], scoring };
        let found = fast.against(&plain, &sample()).unwrap();
        // Plain ends at 2 after 400 tokens, which took 4,000 FLOPs; the other is there after 200, at 8 and 2 a token.
        let ratios = found.ratios.unwrap();
        let pairs = [
            (found.difference, -4.0),
            (ratios.tokens, 0.5),
            (ratios.flops, 0.4),
            (ratios.flops_with_scoring, 0.5),
            (ratios.cpu, 0.5),
            (ratios.cpu_with_scoring, 10.0 / 16.0),
            (ratios.wall, 0.5),
            (ratios.wall_with_scoring, 5.0 / 8.0),
        ];
        for (found, expected) in pairs {
            assert!((found - expected).abs() < 1e-12, "{found} and not {expected}: {ratios:?}");
        }
        let slow = Arm { runs: vec![falling(0.5, 8.0)], scoring };
        let slow = slow.against(&plain, &sample()).unwrap();
        assert!(slow.ratios.is_none() && (slow.difference - 2.0).abs() < 1e-12);
    }

    #[test]
    fn templates_count_by_their_weights() {
        let arm = Arm { runs: vec![run(&[[1.0, 5.0]; 3], 1.0)], scoring: Effort::default() };
        assert_eq!(arm.end(&[1.0, 3.0]), Some(4.0));
        assert_eq!(arm.end(&[1.0, 0.0]), Some(1.0));
    }

    #[test]
    fn what_was_spent_is_counted_within_a_step() {
        let spent = falling(1.0, 10.0).spent;
        let rounded = |tokens: f64| spent.until(tokens).map(|amount| amount.round() as u64);
        assert_eq!(rounded(0.0), [0; 3]);
        assert_eq!(rounded(150.0), [1500, 6, 3]);
        assert_eq!(rounded(9999.0), rounded(500.0));
    }
}
