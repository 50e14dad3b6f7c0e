//! The head's blocks on the CPU, side by side, in one pass over slices each.

use burn::tensor::{FloatDType, Tensor};

use super::blocks::{Blocks, Columns, HeadGradients, Predictions, join_blocks, products};
use crate::model::host::{from_host, to_host};
use crate::model::kernels::{self, RowSum};
use crate::model::layers::linear;
use crate::model::parallel;

/// The softmax of every row.
pub(super) struct Softmax {
    /// Target of each row.
    targets: Vec<u32>,
    /// Logarithm of each row's sum of exponentials of logits.
    log_sums: Vec<f32>,
    blocks: Vec<Block>,
}

/// Some columns of the logits.
struct Block {
    columns: Columns,
    /// `exp(logit - max)`, `[rows, columns]`, and each row's max; if kept.
    exponentials: Option<(Tensor<2>, Vec<f32>)>,
}

/// Where a row's target is in a block, if it is there.
fn column_of(target: u32, (first, count): Columns) -> Option<usize> {
    (target as usize).checked_sub(first).filter(|&at| at < count)
}

/// What the blocks say of their rows.
pub(super) fn forward(blocks: Blocks<'_>, workers: usize) -> (Predictions, Softmax) {
    let Blocks { ref hidden, weight, ref targets, ref columns, wants_entropies, .. } = blocks;
    let device = hidden.device();
    let run = |columns: Columns| {
        let (first, count) = columns;
        let logits = linear(hidden.clone(), &weight.clone().narrow(0, first, count));
        let mut values = to_host(logits.cast(FloatDType::F32));
        let target = |(row, &target): (usize, &u32)| column_of(target, columns).map(|at| (row, at));
        let targets = targets.iter().enumerate().filter_map(target);
        let hits: Vec<_> = targets.map(|(row, at)| (row, values[row * count + at])).collect();
        let sums = kernels::exponentials(&mut values, count, wants_entropies);
        let max = sums.iter().map(|sum| sum.max).collect();
        let kept = blocks.keeps(columns).then(|| (from_host(values, [sums.len(), count], &device), max));
        (sums, hits, Block { columns, exponentials: kept })
    };
    let mut sums = vec![RowSum { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0 }; targets.len()];
    let mut target_logits = vec![f32::NAN; targets.len()];
    let mut done = Vec::with_capacity(columns.len());
    for (of_block, hits, block) in parallel::map(workers, columns.clone(), run) {
        sums.iter_mut().zip(of_block).for_each(|(sum, other)| *sum = join(*sum, other));
        for (row, logit) in hits {
            target_logits[row] = logit;
        }
        done.push(block);
    }
    let mut predictions = Predictions { losses: Vec::with_capacity(targets.len()), entropies: vec![] };
    let mut log_sums = Vec::with_capacity(targets.len());
    for (RowSum { max, sum, weighted }, logit) in sums.into_iter().zip(target_logits) {
        // The sum is at least 1, that of the largest logit, so this cannot underflow, and a loss is never negative.
        let log_sum = sum.ln();
        predictions.losses.push((max - logit) + log_sum);
        if wants_entropies {
            // log p = logit - max - log_sum, so the entropy is log_sum less the mean of logit - max.
            predictions.entropies.push(log_sum - weighted / sum);
        }
        log_sums.push(max + log_sum);
    }
    (predictions, Softmax { targets: blocks.targets, log_sums, blocks: done })
}

/// Sums of two blocks as those of one.
fn join(a: RowSum, b: RowSum) -> RowSum {
    let max = if b.max > a.max || b.max.is_nan() { b.max } else { a.max };
    let part = |RowSum { max: own, sum, weighted }: RowSum| {
        // Nothing has been added to the first one yet.
        if sum == 0.0 {
            return (0.0, 0.0);
        }
        let factor = (own - max).exp();
        (sum * factor, (weighted + (own - max) * sum) * factor)
    };
    let ((a, weighted_a), (b, weighted_b)) = (part(a), part(b));
    RowSum { max, sum: a + b, weighted: weighted_a + weighted_b }
}

impl Softmax {
    /// As [`gradients`](super::gradients), for some of the rows, whose hidden states are given.
    pub fn gradients(
        self,
        hidden: &Tensor<2>,
        weight: &Tensor<2>,
        rows: &[u32],
        workers: usize,
    ) -> HeadGradients {
        let Self { targets, log_sums, blocks } = self;
        let device = hidden.device();
        let of_kept = |values: &[f32]| -> Vec<f32> { rows.iter().map(|&row| values[row as usize]).collect() };
        let log_sums = of_kept(&log_sums);
        let targets: Vec<u32> = rows.iter().map(|&row| targets[row as usize]).collect();
        join_blocks(blocks, workers, |Block { columns: (first, count), exponentials }| {
            let weight = weight.clone().narrow(0, first, count);
            let mut gradient = if let Some((all, max)) = exponentials {
                let pairs = of_kept(&max).into_iter().zip(&log_sums);
                let factors: Vec<f32> = pairs.map(|(max, log)| (max - log).exp()).collect();
                scaled_rows(all, rows, &factors)
            } else {
                let mut logits = to_host(linear(hidden.clone(), &weight).cast(FloatDType::F32));
                kernels::shifted_exponentials(&mut logits, count, &log_sums);
                logits
            };
            for (row, &target) in targets.iter().enumerate() {
                if let Some(at) = column_of(target, (first, count)) {
                    gradient[row * count + at] -= 1.0;
                }
            }
            products(from_host(gradient, [rows.len(), count], &device), weight, hidden.clone())
        })
    }
}

/// Some rows of a matrix, each times its factor.
fn scaled_rows(all: Tensor<2>, rows: &[u32], factors: &[f32]) -> Vec<f32> {
    let [of, columns] = all.dims();
    let mut values = to_host(all);
    if rows.len() < of {
        return kernels::scaled_rows(&values, columns, rows, factors);
    }
    kernels::scale_rows(&mut values, columns, factors);
    values
}
