//! A kind of student at one learning rate: its runs, read out of their folders.

use anyhow::Result;
use serde::Serialize;
use sluice_trainer::model::cost::Cost;
use sluice_trainer::run::metrics::EvalMetric;
use sluice_trainer::run::recorded::RecordedRun;

use super::arms::{Arm, ArmRun, Effort, Ratios, Spent};
use super::kind::Kind;
use super::templates::{TemplateEval, Templates};
use super::tokens::{self, TokenDynamics};

/// One run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RunResults {
    /// What it learnt from.
    pub kind: String,
    /// Its seed.
    pub seed: u64,
    /// Its highest learning rate.
    pub learning_rate: f64,
    /// Training.
    pub effort: Effort,
    /// Tokens that it learnt from.
    pub tokens_kept: u64,
    /// Losses on each evaluation set.
    pub curve: Vec<EvalMetric>,
    /// Losses on held-out mathematics by template.
    pub templates: Vec<TemplateEval>,
    /// FLOPs of training until each of these evaluations.
    pub flops: Vec<f64>,
    /// How single tokens of held-out mathematics fared, where that is asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<TokenDynamics>,
    /// Training loss of unselected tokens over the last quarter of the steps, nats.
    pub unselected_loss: Option<f64>,
    /// What it took on the reporting half to come down to the end of the plain run of its seed, over what that took; absent
    /// where it never did.
    pub to_plain: Option<Ratios>,
}

/// A kind of student at one learning rate, with its runs.
pub(super) struct Tried {
    pub kind: String,
    /// Absent of the reference.
    pub asked: Option<Kind>,
    pub learning_rate: f64,
    pub arm: Arm,
    /// In the order of the seeds.
    pub runs: Vec<RunResults>,
}

impl Tried {
    /// Reads the runs of a kind by seed; scoring its stream took what is given. Where it is known which held-out tokens
    /// selection would keep, single tokens are looked at too.
    pub fn of(
        (kind, asked, learning_rate): (String, Option<Kind>, f64),
        recorded: &[(u64, RecordedRun)],
        (cost, scoring): (Cost, Effort),
        (templates, selected): (&Templates, Option<&[bool]>),
    ) -> Result<Self> {
        let (mut arms, mut runs) = (Vec::new(), Vec::new());
        for (seed, run) in recorded {
            let evals = templates.evaluations(run)?;
            let spent = Spent::of(run, cost);
            runs.push(RunResults {
                kind: kind.clone(),
                seed: *seed,
                learning_rate,
                effort: Effort::of(run, cost),
                tokens_kept: run.steps().last().map_or(0, |step| step.tokens_kept),
                curve: run.all_evals().cloned().collect(),
                templates: evals.clone(),
                flops: evals.iter().map(|eval| spent.until(eval.tokens as f64)[0]).collect(),
                tokens: selected.map(|selected| tokens::of(run, selected)).transpose()?,
                unselected_loss: last_quarter(run),
                to_plain: None,
            });
            arms.push(ArmRun { evals, spent });
        }
        Ok(Self { kind, asked, learning_rate, arm: Arm { runs: arms, scoring }, runs })
    }
}

/// The mean training loss of unselected tokens over the last quarter of the steps; nothing where none was unselected.
fn last_quarter(run: &RecordedRun) -> Option<f64> {
    let steps: Vec<_> = run.steps().collect();
    let last = &steps[steps.len() - steps.len().div_ceil(4)..];
    let losses: Vec<f64> = last.iter().filter_map(|step| step.loss_unselected).collect();
    (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64)
}

/// Of each kind the learning rate with the lowest end on the half that chooses, as indices of what was tried.
pub(super) fn best_rates(tried: &[Tried], choosing: &[f64]) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::new();
    let end = |index: usize| tried[index].arm.end(choosing).unwrap_or(f64::INFINITY);
    for (index, one) in tried.iter().enumerate() {
        match best.iter_mut().find(|other| tried[**other].kind == one.kind) {
            Some(other) if end(index) < end(*other) => *other = index,
            Some(_) => {}
            None => best.push(index),
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::super::arms::tests::run;
    use super::{Arm, Effort, Tried, best_rates};

    #[test]
    fn each_kind_is_reported_at_the_learning_rate_that_ends_lowest_on_the_choosing_half() {
        let tried = |kind: &str, ends: [f64; 2]| Tried {
            kind: kind.to_owned(),
            asked: None,
            learning_rate: 1e-3,
            arm: Arm { runs: vec![run(&[ends; 3], 1.0)], scoring: Effort::default() },
            runs: vec![],
        };
        // The first template chooses; by the second alone every choice would be another.
        let all = [
            tried("plain", [4.0, 3.0]),
            tried("plain", [3.0, 4.0]),
            tried("slm", [2.0, 9.0]),
            tried("slm", [5.0, 1.0]),
        ];
        assert_eq!(best_rates(&all, &[1.0, 0.0]), [1, 2]);
        assert_eq!(best_rates(&all, &[0.0, 1.0]), [0, 3]);
    }
}
