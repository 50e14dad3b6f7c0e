//! The LM head: losses of all predicted tokens, then the gradient of the kept ones, in blocks of rows.
//!
//! `[tokens, vocab]` logits never exist whole. The head runs forward once, without a graph, and each block keeps
//! its probabilities while all of them fit [`KEPT_PROBABILITIES`]; beyond, a block's kept rows are computed
//! again, which bounds memory whatever the batch and the vocabulary.

use burn::tensor::activation::softmax;
use burn::tensor::{Device, IndexingUpdateOp, Tensor};

use super::decoder::indices;
use super::layers::{linear, linear_weight_backward};
use super::learner::to_host;
use super::parallel;
use crate::batch::{Batch, NO_TARGET};

/// Logits in one block: at a vocabulary of 4,096 a block is 512 rows and 8 MiB.
const BLOCK_LOGITS: usize = 1 << 21;
/// Fewest rows in a block, below which matrix products lose their speed.
const BLOCK_ROWS_MIN: usize = 64;
/// Probabilities kept between the forward and the backward pass of a step: 256 MiB.
const KEPT_PROBABILITIES: usize = 1 << 26;

/// Consecutive predicting positions of a batch, with what their gradient needs.
pub(super) struct Block {
    /// Flat positions in the batch, ascending.
    positions: Vec<u32>,
    /// Target of each position.
    targets: Vec<u32>,
    /// `[positions, vocab]`, if kept.
    probabilities: Option<Tensor<2>>,
}

/// Gradients of the loss summed over kept positions.
pub(super) struct HeadGradients {
    /// With respect to the hidden states, `[tokens, hidden]`; zero where nothing was kept.
    pub hidden: Tensor<2>,
    /// With respect to the head, `[vocab, hidden]`.
    pub weight: Tensor<2>,
}

/// Whether [`predict`] may keep probabilities for a later [`gradients`].
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Keep {
    Probabilities,
    Nothing,
}

/// What the head says of every position, in nats, NaN where there is no target.
pub(super) struct Predictions {
    /// Loss of the target, `-log softmax(h W^T)[target]`.
    pub losses: Vec<f32>,
    /// Entropy of the prediction, `-sum(p log p)`; empty unless asked for.
    pub entropies: Vec<f32>,
}

/// Losses of every position's target in f32, and entropies where they are asked for.
pub(super) fn predict(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    batch: &Batch,
    keep: Keep,
    wants_entropies: bool,
    device: &Device,
) -> (Predictions, Vec<Block>) {
    let vocab = weight.dims()[0];
    let (positions, targets): (Vec<u32>, Vec<u32>) = (0u32..)
        .zip(&batch.targets)
        .filter(|&(_, &target)| target != NO_TARGET)
        .map(|(position, &target)| (position, target))
        .unzip();
    let keep = keep == Keep::Probabilities && positions.len() * vocab <= KEPT_PROBABILITIES;
    let rows = (BLOCK_LOGITS / vocab).max(BLOCK_ROWS_MIN);
    let blocks = positions.chunks(rows).zip(targets.chunks(rows)).collect();
    let blocks =
        parallel::map(parallel::workers(device), blocks, |(positions, targets): (&[u32], &[u32])| {
            let logits = linear(hidden.clone().select(0, indices(positions, device)), weight);
            let target = indices(targets, device).unsqueeze_dim(1);
            // The largest probability is 1 / sum(exp(logit - max)), so this is the logarithm of a softmax without a
            // pass of its own, and it cannot underflow.
            let max = logits.clone().max_dim(1);
            let below_max = max.clone() - logits.clone().gather(1, target);
            let probabilities = softmax(logits.clone(), 1);
            let log_sum = probabilities.clone().max_dim(1).clamp_max(1.0).log().neg();
            // log p = logit - max - log_sum, so the entropy is the mean of max - logit, plus log_sum.
            let entropies = if wants_entropies {
                to_host((probabilities.clone() * (max - logits)).sum_dim(1) + log_sum.clone())
            } else {
                vec![]
            };
            let losses = below_max + log_sum;
            let block = Block {
                positions: positions.to_vec(),
                targets: targets.to_vec(),
                probabilities: keep.then_some(probabilities),
            };
            (to_host(losses), entropies, block)
        });
    let nothing = || vec![f32::NAN; batch.targets.len()];
    let entropies = if wants_entropies { nothing() } else { vec![] };
    let mut predictions = Predictions { losses: nothing(), entropies };
    for (losses, entropies, block) in &blocks {
        for (row, &position) in block.positions.iter().enumerate() {
            predictions.losses[position as usize] = losses[row];
            if wants_entropies {
                predictions.entropies[position as usize] = entropies[row];
            }
        }
    }
    (predictions, blocks.into_iter().map(|(.., block)| block).collect())
}

/// Gradients of the loss summed over `kept` (ascending flat positions, each with a target):
/// `G = (softmax - onehot)[kept]`, `d_hidden = G W`, `d_weight = G^T hidden[kept]`. The optimizer divides by the
/// number of kept tokens (Rho-1, arXiv 2404.07965, equation 4), which is known once every micro-batch has been seen.
pub(super) fn gradients(
    hidden: &Tensor<2>,
    weight: &Tensor<2>,
    blocks: Vec<Block>,
    kept: &[u32],
    device: &Device,
) -> HeadGradients {
    let mut remaining = kept;
    let mut work = Vec::new();
    for block in blocks {
        let end =
            block.positions.last().map_or(0, |&last| remaining.partition_point(|&position| position <= last));
        let (own, rest) = remaining.split_at(end);
        remaining = rest;
        if !own.is_empty() {
            work.push((block, own));
        }
    }
    assert!(remaining.is_empty(), "position {remaining:?} was selected but has no target");

    let block_gradients = |(block, kept): (Block, &[u32])| {
        let Block { positions, targets, probabilities } = block;
        let local: Vec<u32> = kept
            .iter()
            .map(|position| {
                let Ok(row) = positions.binary_search(position) else {
                    panic!("position {position} was selected but has no target");
                };
                row as u32
            })
            .collect();
        let hidden = hidden.clone().select(0, indices(kept, device));
        let probabilities = match probabilities {
            Some(all) if local.len() == positions.len() => all,
            Some(all) => all.select(0, indices(&local, device)),
            None => softmax(linear(hidden.clone(), weight), 1),
        };
        let targets: Vec<u32> = local.iter().map(|&row| targets[row as usize]).collect();
        let target = indices(&targets, device).unsqueeze_dim(1);
        let minus_one = Tensor::full([targets.len(), 1], -1.0, device);
        let gradient = probabilities.scatter(1, target, minus_one, IndexingUpdateOp::Add);
        let d_hidden = gradient.clone().matmul(weight.clone());
        (d_hidden, linear_weight_backward(gradient, hidden))
    };

    let workers = parallel::workers(device);
    let mut rows = Vec::new();
    let mut d_weight: Option<Tensor<2>> = None;
    let mut work = work.into_iter();
    loop {
        // Waves of as many blocks as there are workers bound the number of `[vocab, hidden]` gradients in
        // memory; adding them in order keeps the bits independent of that number.
        let wave: Vec<_> = work.by_ref().take(workers).collect();
        if wave.is_empty() {
            break;
        }
        for (d_rows, d_block) in parallel::map(workers, wave, block_gradients) {
            rows.push(d_rows);
            d_weight = Some(match d_weight {
                Some(sum) => sum + d_block,
                None => d_block,
            });
        }
    }
    let zeros = Tensor::zeros(hidden.dims(), device);
    HeadGradients {
        hidden: zeros.select_assign(0, indices(kept, device), Tensor::cat(rows, 0), IndexingUpdateOp::Add),
        weight: d_weight.unwrap_or_else(|| Tensor::zeros(weight.dims(), device)),
    }
}
