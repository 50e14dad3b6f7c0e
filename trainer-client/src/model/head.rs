//! The LM head: losses of all predicted tokens, then the gradient of the kept ones, in blocks of the vocabulary.
//!
//! `[tokens, vocab]` logits exist whole only where they fit one block. The head runs forward once, without a graph. A block is some columns of the
//! logits, for every token: its rows' largest logits and sums of exponentials add up to the softmax of the whole
//! vocabulary, and its part of the head's gradient is complete by itself, so that no two `[vocab, hidden]` gradients are ever
//! added. The first blocks keep their exponentials for the backward pass, up to a limit; of the others, the
//! kept rows are computed again, which bounds memory whatever the batch and the vocabulary.

use burn::tensor::{Device, FloatDType, IndexingUpdateOp, Tensor};
use sluice_feed::batch::NO_TARGET;

use super::device::is_cpu;
use super::host::{from_host, on_host, to_host};
use super::kernels::{self, RowSum};
use super::layers::{linear, linear_weight_backward};
use super::parallel;
use super::rows::indices;

/// Fewest columns in a block, below which matrix products lose their speed.
const BLOCK_COLUMNS_MIN: usize = 256;

/// How much of the logits is in memory.
struct Limits {
    /// Logits in one block.
    block: usize,
    /// Exponentials kept between the forward and the backward pass of a step.
    kept: usize,
}

impl Limits {
    fn of(device: &Device) -> Self {
        if is_cpu(device) {
            // 8 MiB, which caches hold; and 64 MiB, which hold 2,048 tokens with a vocabulary of 8,192 whole.
            Self { block: 1 << 21, kept: 1 << 24 }
        } else if cfg!(test) {
            // Small, so that a test has blocks that are kept and blocks that are not.
            Self { block: 1 << 10, kept: 1 << 15 }
        } else {
            // 256 MiB, as every block waits for the device once; and 1 GiB.
            Self { block: 1 << 26, kept: 1 << 28 }
        }
    }
}

/// What the gradient needs of a forward pass.
pub(super) struct Forward {
    /// Flat positions in the batch that predict something, ascending: the rows of the blocks.
    positions: Vec<u32>,
    /// Target of each row.
    targets: Vec<u32>,
    /// Logarithm of each row's sum of exponentials of logits.
    log_sums: Vec<f32>,
    /// In the order of the vocabulary.
    blocks: Vec<Block>,
}

/// Some columns of the logits.
struct Block {
    /// First token id, and their number.
    columns: (usize, usize),
    /// `exp(logit - max)`, `[rows, columns]`, and each row's max; if kept.
    exponentials: Option<(Tensor<2>, Vec<f32>)>,
}

/// Gradients of the loss summed over kept positions.
pub(super) struct HeadGradients {
    /// With respect to the hidden states of the kept positions, `[kept, hidden]`.
    pub hidden: Tensor<2>,
    /// With respect to the head, `[vocab, hidden]`.
    pub weight: Tensor<2>,
}

/// Whether [`predict`] may keep exponentials for a later [`gradients`].
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Keep {
    Exponentials,
    Nothing,
}

/// What the head says of every position, in nats, NaN where there is no target.
pub(super) struct Predictions {
    /// Loss of the target, `-log softmax(h W^T)[target]`.
    pub losses: Vec<f32>,
    /// Entropy of the prediction, `-sum(p log p)`; empty unless asked for.
    pub entropies: Vec<f32>,
}

/// Losses of every position's target ([`NO_TARGET`] where it has none) in f32, and entropies where they are asked for.
pub(super) fn predict(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    targets: &[u32],
    keep: Keep,
    wants_entropies: bool,
    device: &Device,
) -> (Predictions, Forward) {
    let count = targets.len();
    let (positions, targets): (Vec<u32>, Vec<u32>) = (0u32..)
        .zip(targets)
        .filter(|&(_, &target)| target != NO_TARGET)
        .map(|(position, &target)| (position, target))
        .unzip();
    let rows = positions.len();
    let mut sums = vec![RowSum { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0 }; rows];
    let mut target_logits = vec![f32::NAN; rows];
    let mut blocks = Vec::new();
    if rows > 0 {
        let hidden = &rows_of(hidden, &positions, device);
        let limits = Limits::of(device);
        let columns = blocks_of(weight.dims()[0], rows, &limits);
        // The first blocks of the vocabulary fit.
        let fits = |first: usize, count: usize| (first + count) * rows <= limits.kept;
        let run = |(first, count): (usize, usize)| {
            let logits = linear(hidden.clone(), &weight.clone().narrow(0, first, count));
            let mine =
                |row: usize| targets[row].checked_sub(first as u32).filter(|&at| (at as usize) < count);
            let (exponentials, sums, hits) = exponentials(logits, wants_entropies, &mine);
            let max = sums.iter().map(|sum| sum.max).collect();
            let is_kept = keep == Keep::Exponentials && fits(first, count);
            (
                sums,
                hits,
                Block { columns: (first, count), exponentials: is_kept.then_some((exponentials, max)) },
            )
        };
        for (of_block, hits, block) in parallel::map(parallel::workers(device), columns, run) {
            sums.iter_mut().zip(of_block).for_each(|(sum, other)| *sum = join(*sum, other));
            for (row, logit) in hits {
                target_logits[row] = logit;
            }
            blocks.push(block);
        }
    }
    let nothing = || vec![f32::NAN; count];
    let mut predictions =
        Predictions { losses: nothing(), entropies: if wants_entropies { nothing() } else { vec![] } };
    let mut log_sums = Vec::with_capacity(rows);
    for ((&position, RowSum { max, sum, weighted }), logit) in positions.iter().zip(sums).zip(target_logits) {
        // The sum is at least 1, that of the largest logit, so this cannot underflow, and a loss is never negative.
        let log_sum = sum.ln();
        predictions.losses[position as usize] = (max - logit) + log_sum;
        if wants_entropies {
            // log p = logit - max - log_sum, so the entropy is log_sum less the mean of logit - max.
            predictions.entropies[position as usize] = log_sum - weighted / sum;
        }
        log_sums.push(max + log_sum);
    }
    (predictions, Forward { positions, targets, log_sums, blocks })
}

/// Gradients of the loss summed over `kept` (ascending flat positions, each with a target):
/// `G = (softmax - onehot)[kept]`, `d_hidden = G W`, `d_weight = G^T hidden[kept]`. The optimizer divides by the
/// number of kept tokens (Rho-1, arXiv 2404.07965, equation 4), which is known once every micro-batch has been seen.
pub(super) fn gradients(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    forward: Forward,
    kept: &[u32],
    device: &Device,
) -> HeadGradients {
    let Forward { positions, targets, log_sums, blocks } = forward;
    let rows: Vec<u32> = kept
        .iter()
        .map(|position| {
            let Ok(row) = positions.binary_search(position) else {
                panic!("position {position} was selected but has no target");
            };
            row as u32
        })
        .collect();
    let of_kept = |values: &[f32]| -> Vec<f32> { rows.iter().map(|&row| values[row as usize]).collect() };
    let log_sums = of_kept(&log_sums);
    let targets: Vec<u32> = rows.iter().map(|&row| targets[row as usize]).collect();
    let hidden = rows_of(hidden, kept, device);

    let block_gradients = |Block { columns: (first, count), exponentials }: Block| {
        let weight = weight.clone().narrow(0, first, count);
        let mut gradient = if let Some((all, max)) = exponentials {
            let factors: Vec<f32> =
                of_kept(&max).iter().zip(&log_sums).map(|(max, log)| (max - log).exp()).collect();
            scaled_rows(all, &rows, &factors)
        } else {
            shifted_exponentials(linear(hidden.clone(), &weight), &log_sums)
        };
        let mine = |row: usize| targets[row].checked_sub(first as u32).filter(|&at| (at as usize) < count);
        gradient = minus_one_at(gradient, &mine);
        // Products in the precision of the weights, sums in f32.
        let gradient = gradient.cast(weight.dtype());
        let d_rows = gradient.clone().matmul(weight).cast(FloatDType::F32);
        (d_rows, linear_weight_backward(gradient, hidden.clone()).cast(FloatDType::F32))
    };

    let workers = parallel::workers(device);
    let mut d_hidden: Option<Tensor<2>> = None;
    let mut d_weight = Vec::with_capacity(blocks.len());
    let mut work = blocks.into_iter();
    loop {
        // Waves of as many blocks as there are workers bound what is in memory; adding them in order keeps the bits
        // independent of that number.
        let wave: Vec<_> = work.by_ref().take(workers).collect();
        if wave.is_empty() {
            break;
        }
        for (d_rows, d_block) in parallel::map(workers, wave, block_gradients) {
            d_weight.push(d_block);
            d_hidden = Some(match d_hidden {
                Some(sum) => sum + d_rows,
                None => d_rows,
            });
        }
    }
    let Some(hidden) = d_hidden else { unreachable!("a vocabulary has blocks, and something was kept") };
    HeadGradients { hidden, weight: Tensor::cat(d_weight, 0) }
}

/// First column and number of columns of every block.
fn blocks_of(vocab: usize, rows: usize, limits: &Limits) -> Vec<(usize, usize)> {
    let columns = (limits.block / rows).next_multiple_of(64).max(BLOCK_COLUMNS_MIN);
    (0..vocab).step_by(columns).map(|first| (first, columns.min(vocab - first))).collect()
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

fn rows_of(x: &Tensor<2>, rows: &[u32], device: &Device) -> Tensor<2> {
    if rows.len() == x.dims()[0] { x.clone() } else { x.clone().select(0, indices(rows, device)) }
}

/// Row and logit of every target in a block.
type Hits = Vec<(usize, f32)>;

/// `exp(logit - max)` of a block's logits, the sums of its rows, and the logits of the targets that are in it.
fn exponentials(
    logits: Tensor<2>,
    wants_entropies: bool,
    target: &dyn Fn(usize) -> Option<u32>,
) -> (Tensor<2>, Vec<RowSum>, Hits) {
    let ([rows, columns], device) = (logits.dims(), logits.device());
    let logits = logits.cast(FloatDType::F32);
    if on_host(&logits) {
        let mut values = to_host(logits);
        let hits = (0..rows)
            .filter_map(|row| target(row).map(|at| (row, values[row * columns + at as usize])))
            .collect();
        let sums = kernels::exponentials(&mut values, columns, wants_entropies);
        return (from_host(values, [rows, columns], &device), sums, hits);
    }
    let at: Vec<u32> = (0..rows).map(|row| target(row).unwrap_or(0)).collect();
    let hits = logits.clone().gather(1, indices(&at, &device).unsqueeze_dim(1));
    let max = logits.clone().max_dim(1);
    let below = logits - max.clone();
    let exponentials = below.clone().exp();
    let mut parts = vec![hits, max, exponentials.clone().sum_dim(1)];
    if wants_entropies {
        parts.push((exponentials.clone() * below).sum_dim(1));
    }
    let width = parts.len();
    // One copy, since each of them waits for the device.
    let parts = to_host(Tensor::cat(parts, 1));
    let mut sums = Vec::with_capacity(rows);
    let mut hits = Vec::new();
    for (row, parts) in parts.chunks_exact(width).enumerate() {
        sums.push(RowSum { max: parts[1], sum: parts[2], weighted: parts.get(3).copied().unwrap_or(0.0) });
        if target(row).is_some() {
            hits.push((row, parts[0]));
        }
    }
    (exponentials, sums, hits)
}

/// Some rows of a matrix, each times its factor.
fn scaled_rows(all: Tensor<2>, rows: &[u32], factors: &[f32]) -> Tensor<2> {
    let ([of, columns], device) = (all.dims(), all.device());
    if !on_host(&all) {
        return rows_of(&all, rows, &device) * from_host(factors.to_vec(), [rows.len(), 1], &device);
    }
    let mut values = to_host(all);
    if rows.len() == of {
        kernels::scale_rows(&mut values, columns, factors);
    } else {
        values = kernels::scaled_rows(&values, columns, rows, factors);
    }
    from_host(values, [rows.len(), columns], &device)
}

/// `exp(logit - shift)`, a shift for each row.
fn shifted_exponentials(logits: Tensor<2>, shifts: &[f32]) -> Tensor<2> {
    let ([rows, columns], device) = (logits.dims(), logits.device());
    let logits = logits.cast(FloatDType::F32);
    if !on_host(&logits) {
        return (logits - from_host(shifts.to_vec(), [rows, 1], &device)).exp();
    }
    let mut values = to_host(logits);
    kernels::shifted_exponentials(&mut values, columns, shifts);
    from_host(values, [rows, columns], &device)
}

/// Takes one off each row's target, where it has one.
fn minus_one_at(x: Tensor<2>, target: &dyn Fn(usize) -> Option<u32>) -> Tensor<2> {
    let ([rows, columns], device) = (x.dims(), x.device());
    if on_host(&x) {
        let mut values = to_host(x);
        for row in 0..rows {
            if let Some(at) = target(row) {
                values[row * columns + at as usize] -= 1.0;
            }
        }
        return from_host(values, [rows, columns], &device);
    }
    let at: Vec<u32> = (0..rows).map(|row| target(row).unwrap_or(0)).collect();
    let one = |row| if target(row).is_some() { -1.0 } else { 0.0 };
    let minus_one = from_host((0..rows).map(one).collect(), [rows, 1], &device);
    x.scatter(1, indices(&at, &device).unsqueeze_dim(1), minus_one, IndexingUpdateOp::Add)
}
