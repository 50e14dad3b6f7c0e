//! Blocks of the vocabulary: what goes into a forward pass over them, what comes of it, and what their gradients have in common.

use burn::tensor::{FloatDType, Tensor};

use crate::model::layers::linear_weight_backward;
use crate::model::parallel;

/// First token id, and number of columns of a block.
pub(super) type Columns = (usize, usize);

/// Gradients of the loss summed over kept positions.
pub(in crate::model) struct HeadGradients {
    /// With respect to the hidden states of the kept positions, `[kept, hidden]`, padded as
    /// [`Rows`](crate::model::rows::Rows) are.
    pub hidden: Tensor<2>,
    /// With respect to the head, `[vocab, hidden]`.
    pub weight: Tensor<2>,
}

/// What the head says of positions, in nats: of every one of a batch, NaN where there is no target, or of a matrix's rows.
pub(in crate::model) struct Predictions {
    /// Loss of the target, `-log softmax(h W^T)[target]`.
    pub losses: Vec<f32>,
    /// Entropy of the prediction, `-sum(p log p)`; empty unless asked for.
    pub entropies: Vec<f32>,
}

/// A forward pass over the blocks.
pub(super) struct Blocks<'a> {
    /// Rows that predict something, `[rows, hidden]`.
    pub hidden: Tensor<2>,
    pub weight: &'a Tensor<2>,
    /// Target of each row; there may be padding behind them.
    pub targets: Vec<u32>,
    pub columns: Vec<Columns>,
    /// Columns from the first whose exponentials are kept.
    pub kept_columns: usize,
    pub wants_entropies: bool,
}

impl Blocks<'_> {
    /// Whether a block's exponentials are kept.
    pub fn keeps(&self, (first, count): Columns) -> bool {
        first + count <= self.kept_columns
    }
}

/// Gradients of the hidden states and of a block's weights, given that of its logits: products in the precision of the weights,
/// sums in f32.
pub(super) fn products(d_logits: Tensor<2>, weight: Tensor<2>, hidden: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let d_logits = d_logits.cast(weight.dtype());
    let d_hidden = d_logits.clone().matmul(weight).cast(FloatDType::F32);
    (d_hidden, linear_weight_backward(d_logits, hidden).cast(FloatDType::F32))
}

/// The gradients of all blocks from those of each, which `of_block` gives.
pub(super) fn join_blocks<B: Send>(
    blocks: Vec<B>,
    workers: usize,
    of_block: impl Fn(B) -> (Tensor<2>, Tensor<2>) + Sync,
) -> HeadGradients {
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
        for (of_rows, of_columns) in parallel::map(workers, wave, &of_block) {
            d_weight.push(of_columns);
            d_hidden = Some(match d_hidden {
                Some(sum) => sum + of_rows,
                None => of_rows,
            });
        }
    }
    let Some(hidden) = d_hidden else { unreachable!("a vocabulary has blocks") };
    HeadGradients { hidden, weight: Tensor::cat(d_weight, 0) }
}
