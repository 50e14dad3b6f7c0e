//! The head's blocks as tensor operations, for a device that the host waits for: once a batch, when losses are copied.

use burn::tensor::{Bool, DType, Device, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData};

use super::blocks::{Blocks, Columns, HeadGradients, Predictions, join_blocks, products};
use crate::model::host::to_host;
use crate::model::layers::linear;
use crate::model::rows::Rows;

/// The softmax of every row.
pub(super) struct Softmax {
    /// Target of each row, -1 in padding, `[rows]`.
    targets: Tensor<1, Int>,
    /// Logarithm of each row's sum of exponentials of logits, `[rows, 1]`.
    log_sums: Tensor<2>,
    blocks: Vec<Block>,
}

/// Some columns of the logits.
struct Block {
    columns: Columns,
    /// `exp(logit - max)`, `[rows, columns]`, and each row's max, `[rows, 1]`; if kept.
    exponentials: Option<(Tensor<2>, Tensor<2>)>,
}

/// Targets as a device has them, in a matrix of `rows` rows.
fn upload(targets: &[u32], rows: usize, device: &Device) -> Tensor<1, Int> {
    let mut targets: Vec<i64> = targets.iter().map(|&target| i64::from(target)).collect();
    targets.resize(rows, -1);
    Tensor::from_data(TensorData::new(targets, [rows]), device)
}

/// The column of each row's target in a block, any where it is not there, and whether it is not, `[rows, 1]` both.
fn columns_of(targets: &Tensor<1, Int>, (first, count): Columns) -> (Tensor<2, Int>, Tensor<2, Bool>) {
    let at: Tensor<2, Int> = targets.clone().unsqueeze_dim(1) - first as i64;
    let last = count as i64 - 1;
    let is_elsewhere = at.clone().lower_elem(0).bool_or(at.clone().greater_elem(last));
    (at.clamp(0, last), is_elsewhere)
}

/// What the blocks say of their rows. Everything stays on the device but losses and entropies, which are copied together.
pub(super) fn forward(blocks: &Blocks<'_>) -> (Predictions, Softmax) {
    let &Blocks { ref hidden, weight, ref targets, ref columns, wants_entropies, .. } = blocks;
    let device = hidden.device();
    let (count, targets) = (targets.len(), upload(targets, hidden.dims()[0], &device));
    let (mut hits, mut maxima, mut sums, mut weighted) = (vec![], vec![], vec![], vec![]);
    let mut done = Vec::with_capacity(columns.len());
    for &columns in columns {
        let logits = linear(hidden.clone(), &weight.clone().narrow(0, columns.0, columns.1));
        let logits = logits.cast(FloatDType::F32);
        let (at, is_elsewhere) = columns_of(&targets, columns);
        hits.push(logits.clone().gather(1, at).mask_fill(is_elsewhere, 0.0));
        let max = logits.clone().max_dim(1);
        let below = logits - max.clone();
        let exponentials = below.clone().exp();
        sums.push(exponentials.clone().sum_dim(1));
        if wants_entropies {
            weighted.push((exponentials.clone() * below).sum_dim(1));
        }
        let kept = blocks.keeps(columns).then(|| (exponentials, max.clone()));
        maxima.push(max);
        done.push(Block { columns, exponentials: kept });
    }
    // Of the blocks, `[rows, blocks]`, and of the whole vocabulary, `[rows, 1]`.
    let (maxima, sums) = (Tensor::cat(maxima, 1), Tensor::cat(sums, 1));
    let max = maxima.clone().max_dim(1);
    let below = maxima - max.clone();
    let factors = below.clone().exp();
    let sum = (sums.clone() * factors.clone()).sum_dim(1);
    // The sum is at least 1, that of the largest logit, so this cannot underflow, and a loss is never negative.
    let log_sum = sum.clone().log();
    // But for the block that has it, a row's hits are zeros.
    let mut copied = vec![(max.clone() - Tensor::cat(hits, 1).sum_dim(1)) + log_sum.clone()];
    if wants_entropies {
        // log p = logit - max - log_sum, so the entropy is log_sum less the mean of logit - max.
        let weighted = ((Tensor::cat(weighted, 1) + below * sums) * factors).sum_dim(1);
        copied.push(log_sum.clone() - weighted / sum);
    }
    let width = copied.len();
    // One copy, since each of them waits for the device.
    let copied = to_host(Tensor::cat(copied, 1));
    let column = |at: usize| copied.iter().skip(at).step_by(width).take(count).copied().collect();
    let entropies = if wants_entropies { column(1) } else { vec![] };
    let predictions = Predictions { losses: column(0), entropies };
    (predictions, Softmax { targets, log_sums: max + log_sum, blocks: done })
}

impl Softmax {
    /// As [`gradients`](super::gradients), for some of the rows, whose hidden states are given.
    pub fn gradients(self, hidden: &Tensor<2>, weight: &Tensor<2>, rows: &[u32]) -> HeadGradients {
        let Self { targets, log_sums, blocks } = self;
        let rows = Rows::some(log_sums.dims()[0], rows, &hidden.device());
        let (log_sums, targets) = (rows.take(log_sums), rows.take_ids(targets));
        join_blocks(blocks, 1, |Block { columns, exponentials }| {
            let weight = weight.clone().narrow(0, columns.0, columns.1);
            let probabilities = if let Some((all, max)) = exponentials {
                rows.take(all) * (rows.take(max) - log_sums.clone()).exp()
            } else {
                (linear(hidden.clone(), &weight).cast(FloatDType::F32) - log_sums.clone()).exp()
            };
            let (at, is_elsewhere) = columns_of(&targets, columns);
            let minus_one = Tensor::zeros(at.dims(), (&at.device(), DType::F32)).sub_scalar(1.0);
            let minus_one: Tensor<2> = minus_one.mask_fill(is_elsewhere, 0.0);
            let d_logits = probabilities.scatter(1, at, minus_one, IndexingUpdateOp::Add);
            products(rows.without_padding(d_logits), weight, hidden.clone())
        })
    }
}
