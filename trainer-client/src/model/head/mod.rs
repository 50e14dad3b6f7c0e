//! The LM head: losses of all predicted tokens, then the gradient of the kept ones, in blocks of the vocabulary.
//!
//! `[tokens, vocab]` logits exist whole only where they fit one block. The head runs forward once, without a graph. A block is some columns of the
//! logits, for every token: its rows' largest logits and sums of exponentials add up to the softmax of the whole
//! vocabulary, and its part of the head's gradient is complete by itself, so that no two `[vocab, hidden]` gradients are ever
//! added. The first blocks keep their exponentials for the backward pass, up to a limit; of the others, the
//! kept rows are computed again, which bounds memory whatever the batch and the vocabulary.
//!
//! On the CPU blocks run side by side over slices (`slices`); elsewhere one after the other as tensor operations, which the
//! host waits for once a batch (`tensors`).

mod blocks;
mod slices;
mod tensors;

use burn::tensor::{Device, Tensor};
use sluice_feed::batch::NO_TARGET;

use super::device::is_cpu;
use super::parallel;
use super::rows::Rows;
use blocks::{Blocks, Columns};
pub(super) use blocks::{HeadGradients, Predictions};

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
    fn of(device: &Device, keep: Keep) -> Self {
        let limits = if is_cpu(device) {
            // 8 MiB, which caches hold; and 64 MiB.
            Self { block: 1 << 21, kept: 1 << 24 }
        } else if cfg!(test) {
            // Small, so that a test has blocks that are kept and blocks that are not.
            Self { block: 1 << 10, kept: 1 << 15 }
        } else {
            // 256 MiB, which keeps products large; and 1 GiB.
            Self { block: 1 << 26, kept: 1 << 28 }
        };
        let kept = match keep {
            Keep::Beside(tapes) if is_cpu(device) => limits.kept.max(tapes),
            Keep::Beside(_) => limits.kept,
            Keep::Nothing => 0,
        };
        Self { kept, ..limits }
    }
}

/// The columns of every block. But for the last of them, their number is a multiple of 64 whatever the vocabulary is.
fn blocks_of(vocab: usize, rows: usize, limits: &Limits) -> Vec<Columns> {
    let columns = (limits.block / rows).next_multiple_of(64).max(BLOCK_COLUMNS_MIN);
    (0..vocab).step_by(columns).map(|first| (first, columns.min(vocab - first))).collect()
}

/// What the gradient needs of a forward pass.
pub(super) struct Forward {
    /// Flat positions in the batch that predict something, ascending: the rows of the blocks.
    positions: Vec<u32>,
    /// None where nothing predicts anything.
    softmax: Option<Softmax>,
}

/// The softmax of every row, in blocks in the order of the vocabulary. There is one of a batch.
#[allow(clippy::large_enum_variant)]
enum Softmax {
    Slices(slices::Softmax),
    Tensors(tensors::Softmax),
}

/// Whether [`predict`] may keep exponentials for a later [`gradients`].
#[derive(Clone, Copy)]
pub(super) enum Keep {
    /// On the CPU as many as there are values in the layers' tapes, for a step takes that much memory anyway, or 64 MiB where
    /// that is more; elsewhere 1 GiB.
    Beside(usize),
    Nothing,
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
    let (positions, targets): (Vec<u32>, Vec<u32>) =
        (0u32..).zip(targets).filter(|&(_, &target)| target != NO_TARGET).unzip();
    let nothing = || vec![f32::NAN; count];
    let mut predictions =
        Predictions { losses: nothing(), entropies: if wants_entropies { nothing() } else { vec![] } };
    if positions.is_empty() {
        return (predictions, Forward { positions, softmax: None });
    }
    let hidden = Rows::some(count, &positions, device).take(hidden.clone());
    let (rows, limits) = (hidden.dims()[0], Limits::of(device, keep));
    let columns = blocks_of(weight.dims()[0], rows, &limits);
    let kept_columns = limits.kept / rows;
    let blocks = Blocks { hidden, weight, targets, columns, kept_columns, wants_entropies };
    let (of_rows, softmax) = if is_cpu(device) {
        let (of_rows, softmax) = slices::forward(blocks, parallel::workers(device));
        (of_rows, Softmax::Slices(softmax))
    } else {
        let (of_rows, softmax) = tensors::forward(&blocks);
        (of_rows, Softmax::Tensors(softmax))
    };
    let place = |values: &[f32], into: &mut [f32]| {
        for (&position, &value) in positions.iter().zip(values) {
            into[position as usize] = value;
        }
    };
    place(&of_rows.losses, &mut predictions.losses);
    place(&of_rows.entropies, &mut predictions.entropies);
    (predictions, Forward { positions, softmax: Some(softmax) })
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
    let Forward { positions, softmax } = forward;
    let Some(softmax) = softmax else { unreachable!("something was kept, so something was predicted") };
    let row_of = |position: &u32| {
        let Ok(row) = positions.binary_search(position) else {
            panic!("position {position} was selected but has no target");
        };
        row as u32
    };
    let rows: Vec<u32> = kept.iter().map(row_of).collect();
    let hidden = Rows::some(hidden.dims()[0], kept, device).take(hidden.clone());
    match softmax {
        Softmax::Slices(softmax) => softmax.gradients(&hidden, weight, &rows, parallel::workers(device)),
        Softmax::Tensors(softmax) => softmax.gradients(&hidden, weight, &rows),
    }
}
