//! What some families add to the projections of queries, keys and values: a bias (Qwen2), and a root mean square norm of
//! each head (Qwen3; Henry et al., arXiv 2010.04245), each beside its gradient.
//!
//! Shapes as in [`layers`](super::layers); `heads` are those of the projection.

use burn::tensor::{FloatDType, Tensor};

use super::norm::{NormTape, rms_norm, rms_norm_backward};
use super::rows::Rows;

/// What the gradient of [`norm_heads`] needs: a norm's tape with a row for each head of each token.
pub(super) struct HeadNormTape {
    tape: NormTape,
    heads: usize,
}

impl HeadNormTape {
    /// Its tokens that a gradient flows into.
    pub fn take(self, rows: &Rows) -> Self {
        let Self { tape: NormTape { normed, inverse_rms }, heads } = self;
        let take = |x: Tensor<2>| {
            let [all, width] = x.dims();
            let taken = rows.take(x.reshape([all / heads, heads * width]));
            let tokens = taken.dims()[0];
            taken.reshape([tokens * heads, width])
        };
        Self { tape: NormTape { normed: take(normed), inverse_rms: take(inverse_rms) }, heads }
    }
}

/// Adds a bias `[1, width]` to a projection `[n, width]`, where there is one.
pub(super) fn with_bias(y: Tensor<2>, bias: Option<&Tensor<2>>) -> Tensor<2> {
    match bias {
        Some(bias) => {
            let dtype: FloatDType = y.dtype().into();
            y + bias.clone().cast(dtype)
        }
        None => y,
    }
}

/// Gradient of a bias, `[1, width]`: in f32, as a sum over tokens.
pub(super) fn bias_backward(d_y: Tensor<2>) -> Tensor<2> {
    d_y.cast(FloatDType::F32).sum_dim(0)
}

/// Norms each head of `[n, heads * head_dim]` by a weight `[1, head_dim]`, where there is one.
pub(super) fn norm_heads(
    y: Tensor<2>,
    weight: Option<&Tensor<2>>,
    eps: f64,
) -> (Tensor<2>, Option<HeadNormTape>) {
    let Some(weight) = weight else { return (y, None) };
    let ([tokens, width], head_dim) = (y.dims(), weight.dims()[1]);
    let heads = width / head_dim;
    let (normed, tape) = rms_norm(y.reshape([tokens * heads, head_dim]), weight, eps);
    (normed.reshape([tokens, width]), Some(HeadNormTape { tape, heads }))
}

/// Gradients of [`norm_heads`]: of its input, and of the weight.
pub(super) fn norm_heads_backward(
    d_y: Tensor<2>,
    weight: Option<&Tensor<2>>,
    tape: Option<HeadNormTape>,
) -> (Tensor<2>, Option<Tensor<2>>) {
    let (Some(weight), Some(HeadNormTape { tape, heads })) = (weight, tape) else { return (d_y, None) };
    let [tokens, width] = d_y.dims();
    let (d_x, d_weight) = rms_norm_backward(d_y.reshape([tokens * heads, width / heads]), weight, tape);
    (d_x.reshape([tokens, width]), Some(d_weight))
}
