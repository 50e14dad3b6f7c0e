//! How single tokens of held-out mathematics fare: their four categories over training (Rho-1, arXiv 2404.07965, section 2.1),
//! and the losses of those that selection would keep and of the others, to be held against the loss of final answers.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use sluice_trainer::report::dynamics::{Category, categories};
use sluice_trainer::run::checkpoints::Best;
use sluice_trainer::run::recorded::RecordedRun;
use sluice_trainer::run::token_losses::TokenLosses;

use super::plan::TARGET;

/// Parts of a run after each of which tokens are put into categories.
const PARTS: usize = 4;

/// How the tokens of the target fare in one run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct TokenDynamics {
    /// By the evaluations up to each quarter of the run.
    pub shares: Vec<CategoryShares>,
    /// At each evaluation, that before the first step too.
    pub losses: Vec<SplitLoss>,
}

/// How many tokens are of which category, by the evaluations after the first step and up to another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct CategoryShares {
    pub step: u64,
    /// In the order of [`Category::ALL`].
    pub shares: [f64; 4],
}

/// Mean losses of the tokens that selection would keep, and of the others, nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct SplitLoss {
    pub step: u64,
    pub selected: f64,
    pub unselected: f64,
}

/// Which held-out tokens selection would keep at the start: the share with the highest excess loss of the model that students
/// begin with, `start`, over the reference.
pub(super) fn selected(
    start: &RecordedRun,
    reference: (&Path, &RecordedRun),
    keep: f64,
) -> Result<Vec<bool>> {
    let best = Best::read(reference.0)?.context("the reference kept no best checkpoint")?;
    let (start, reference) = (of_step(start, 0)?, of_step(reference.1, best.step)?);
    ensure!(start.len() == reference.len(), "a run and its reference were evaluated on different texts");
    let excess: Vec<f32> = start.iter().zip(reference).map(|(own, other)| own - other).collect();
    let mut order: Vec<usize> = (0..excess.len()).collect();
    order.sort_by(|&left, &right| excess[right].total_cmp(&excess[left]));
    let mut kept = vec![false; excess.len()];
    let count = (keep * excess.len() as f64).ceil() as usize;
    for &token in &order[..count.min(order.len())] {
        kept[token] = true;
    }
    Ok(kept)
}

/// How the tokens fare in a run.
pub(super) fn of(run: &RecordedRun, selected: &[bool]) -> Result<TokenDynamics> {
    let all: Vec<&TokenLosses> = run.token_losses.iter().filter(|losses| losses.set == TARGET).collect();
    let mut losses = Vec::new();
    for at in &all {
        ensure!(at.losses.len() == selected.len(), "{} was evaluated on another text", run.name);
        let mean = |side: bool| {
            let own = at.losses.iter().zip(selected).filter(|&(_, &kept)| kept == side);
            let (sum, count) =
                own.fold((0.0, 0.0), |(sum, count), (&loss, _)| (sum + f64::from(loss), count + 1.0));
            sum / f64::max(count, 1.0)
        };
        losses.push(SplitLoss { step: at.step, selected: mean(true), unselected: mean(false) });
    }
    let after: Vec<&TokenLosses> = all.into_iter().filter(|at| at.step > 0).collect();
    let ends = (1..=PARTS).map(|part| after.len() * part / PARTS);
    let shares = ends.filter(|&end| end >= 2).map(|end| {
        let upto: Vec<&[f32]> = after[..end].iter().map(|at| &at.losses[..]).collect();
        let found = categories(&upto);
        let share = |category: Category| {
            found.iter().filter(|&&of_token| of_token == category).count() as f64 / found.len().max(1) as f64
        };
        CategoryShares { step: after[end - 1].step, shares: Category::ALL.map(share) }
    });
    Ok(TokenDynamics { shares: shares.collect(), losses })
}

fn of_step(run: &RecordedRun, step: u64) -> Result<&[f32]> {
    let found = run.token_losses.iter().find(|losses| losses.step == step && losses.set == TARGET);
    let found = found
        .with_context(|| format!("{} wrote down no losses of single tokens at step {step}", run.name))?;
    Ok(&found.losses)
}

/// Pearson's correlation of two rows of numbers; absent where one of them does not move.
pub(super) fn correlation(pairs: &[(f64, f64)]) -> Option<f64> {
    let count = pairs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / count;
    let (left, right) = (mean(|pair| pair.0), mean(|pair| pair.1));
    let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
        pairs.iter().map(|pair| of(pair.0 - left, pair.1 - right)).sum()
    };
    let spread = (sum(&|left, _| left * left) * sum(&|_, right| right * right)).sqrt();
    (spread > 0.0).then(|| sum(&|left, right| left * right) / spread)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::correlation;

    #[test]
    fn a_correlation_is_that_of_pearson() {
        // By hand: deviations (-1.5, -0.5, 0.5, 1.5) and (-1.75, 0.25, -0.75, 2.25); 5.5 / sqrt(5 * 8.75).
        let found = correlation(&[(1.0, 2.0), (2.0, 4.0), (3.0, 3.0), (4.0, 6.0)]).unwrap();
        assert!((found - 5.5 / 43.75f64.sqrt()).abs() < 1e-12, "{found}");
        assert_eq!(correlation(&[(1.0, 2.0), (1.0, 3.0)]), None);
        assert_eq!(correlation(&[]), None);
    }
}
