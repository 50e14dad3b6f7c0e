//! What a forward pass over the body is for, and what comes of it.

use burn::tensor::Tensor;

use crate::model::decoder::Tape;

/// What a forward pass is for.
#[derive(Clone, Copy)]
pub(super) enum Purpose<'a> {
    /// Losses alone.
    Losses,
    /// A gradient, of positions that are not chosen yet.
    Gradient,
    /// A gradient of these positions, ascending.
    GradientOf(&'a [u32]),
}

/// A forward pass over the body.
pub(super) struct Forward {
    /// Final hidden states, `[tokens, hidden]`.
    pub hidden: Tensor<2>,
    /// One for each group of rows, in order; none where no gradient is wanted.
    pub tapes: Vec<Option<Tape>>,
}
