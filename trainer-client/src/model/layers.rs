//! The decoder's operations, each beside its gradient.
//!
//! Shapes: `n` tokens in a group (`rows * len`), `heads` query heads in `kv_heads` groups, `head_dim` wide. Each
//! forward function returns its output and a tape of what its `_backward` needs; `d_x` is the gradient of the
//! loss with respect to `x`.

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Bool, Tensor};

use super::weights::Layer;

/// `x W^T` for a weight stored `[out, in]`.
pub(super) fn linear(x: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.matmul(weight.clone().transpose())
}

/// Gradient of [`linear`] with respect to its weight, `[out, in]`.
pub(super) fn linear_weight_backward(d_y: Tensor<2>, x: Tensor<2>) -> Tensor<2> {
    d_y.transpose().matmul(x)
}

/// What the gradient of a norm needs.
pub(super) struct NormTape {
    /// `x / rms(x)`, `[n, width]`.
    normed: Tensor<2>,
    /// `1 / rms(x)`, `[n, 1]`.
    inverse_rms: Tensor<2>,
}

/// Root mean square norm: `x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich, arXiv 1910.07467).
pub(super) fn rms_norm(x: Tensor<2>, weight: &Tensor<2>, eps: f64) -> (Tensor<2>, NormTape) {
    let inverse_rms = (x.clone() * x.clone()).mean_dim(1).add_scalar(eps).sqrt().recip();
    let normed = x * inverse_rms.clone();
    (normed.clone() * weight.clone(), NormTape { normed, inverse_rms })
}

/// Gradients of [`rms_norm`]: `(d_x, d_weight)`.
pub(super) fn rms_norm_backward(
    d_y: Tensor<2>,
    weight: &Tensor<2>,
    tape: NormTape,
) -> (Tensor<2>, Tensor<2>) {
    let NormTape { normed, inverse_rms } = tape;
    let d_weight = (d_y.clone() * normed.clone()).sum_dim(0);
    let d_normed = d_y * weight.clone();
    let along = (d_normed.clone() * normed.clone()).mean_dim(1);
    ((d_normed - normed * along) * inverse_rms, d_weight)
}

/// Rotary angles of a group's tokens: cosines and sines, `[rows, len, 1, head_dim / 2]`.
pub(super) struct Rotary {
    pub cosine: Tensor<4>,
    pub sine: Tensor<4>,
}

impl Rotary {
    /// Rotates `[rows, len, heads, head_dim]` in the rotate-half form of Hugging Face's Llama: dimension `i` is
    /// paired with `i + head_dim / 2` (Su et al., arXiv 2104.09864, pairs neighbours instead).
    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let (first, second) = halves(x);
        let (cosine, sine) = (&self.cosine, &self.sine);
        let turned_first = first.clone() * cosine.clone() - second.clone() * sine.clone();
        let turned_second = second * cosine.clone() + first * sine.clone();
        Tensor::cat(vec![turned_first, turned_second], 3)
    }

    /// Gradient of [`Rotary::rotate`]: the rotation backwards.
    fn rotate_backward(&self, d_y: Tensor<4>) -> Tensor<4> {
        let (first, second) = halves(d_y);
        let (cosine, sine) = (&self.cosine, &self.sine);
        let turned_first = first.clone() * cosine.clone() + second.clone() * sine.clone();
        let turned_second = second * cosine.clone() - first * sine.clone();
        Tensor::cat(vec![turned_first, turned_second], 3)
    }
}

fn halves(x: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let half = x.dims()[3] / 2;
    (x.clone().narrow(3, 0, half), x.narrow(3, half, half))
}

/// Shape of a group's attention.
#[derive(Clone, Copy)]
pub(super) struct AttentionShape {
    pub rows: usize,
    pub len: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// What the gradient of attention needs. Query heads that share a key head are stacked into one matrix, so
/// neither keys nor values are ever repeated.
pub(super) struct AttentionTape {
    /// Layer input, `[n, hidden]`.
    x: Tensor<2>,
    /// Rotated and scaled queries, `[rows, kv_heads, heads / kv_heads * len, head_dim]`.
    query: Tensor<4>,
    /// Rotated keys, `[rows, kv_heads, len, head_dim]`.
    key: Tensor<4>,
    /// Values, `[rows, kv_heads, len, head_dim]`.
    value: Tensor<4>,
    /// Attention probabilities, `[rows, kv_heads, heads / kv_heads * len, len]`.
    probabilities: Tensor<4>,
    /// Heads' outputs, `[rows, kv_heads, heads / kv_heads * len, head_dim]`.
    attended: Tensor<4>,
}

impl AttentionShape {
    fn scale(self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// `[n, heads * head_dim]` to `[rows, len, heads, head_dim]`.
    fn split(self, x: Tensor<2>) -> Tensor<4> {
        let heads = x.dims()[1] / self.head_dim;
        x.reshape([self.rows, self.len, heads, self.head_dim])
    }

    /// `[rows, len, heads, head_dim]` to `[rows, kv_heads, heads / kv_heads * len, head_dim]`.
    fn stack(self, x: Tensor<4>) -> Tensor<4> {
        let stacked = x.dims()[2] / self.kv_heads * self.len;
        x.swap_dims(1, 2).reshape([self.rows, self.kv_heads, stacked, self.head_dim])
    }

    /// The inverse of [`AttentionShape::stack`].
    fn unstack(self, x: Tensor<4>) -> Tensor<4> {
        let heads = x.dims()[2] / self.len * self.kv_heads;
        x.reshape([self.rows, heads, self.len, self.head_dim]).swap_dims(1, 2)
    }

    /// `[rows, len, heads, head_dim]` to `[n, heads * head_dim]`.
    fn merge(self, x: Tensor<4>) -> Tensor<2> {
        let heads = x.dims()[2];
        x.reshape([self.rows * self.len, heads * self.head_dim])
    }

    /// Grouped-query attention with its projections. `hidden` (`[rows, 1, len, len]`) is true where a token must
    /// not look; every token may look at itself, so no row of the softmax is empty.
    pub(super) fn forward(
        self,
        x: Tensor<2>,
        weights: &Layer<Tensor<2>>,
        rotary: &Rotary,
        hidden: &Tensor<4, Bool>,
    ) -> (Tensor<2>, AttentionTape) {
        let query = rotary.rotate(self.split(linear(x.clone(), &weights.query)));
        let query = self.stack(query.mul_scalar(self.scale()));
        let key = self.stack(rotary.rotate(self.split(linear(x.clone(), &weights.key))));
        let value = self.stack(self.split(linear(x.clone(), &weights.value)));
        let scores = query.clone().matmul(key.clone().transpose());
        let stacked = scores.dims();
        let scores = scores.reshape([self.rows, self.heads, self.len, self.len]);
        let probabilities = softmax(scores.mask_fill(hidden.clone(), f32::NEG_INFINITY), 3).reshape(stacked);
        let attended = probabilities.clone().matmul(value.clone());
        let output = linear(self.merge(self.unstack(attended.clone())), &weights.output);
        (output, AttentionTape { x, query, key, value, probabilities, attended })
    }

    /// Gradients of [`AttentionShape::forward`]: `d_x`, then those of the four projections' weights.
    pub(super) fn backward(
        self,
        d_output: Tensor<2>,
        weights: &Layer<Tensor<2>>,
        rotary: &Rotary,
        tape: AttentionTape,
    ) -> (Tensor<2>, [Tensor<2>; 4]) {
        let AttentionTape { x, query, key, value, probabilities, attended } = tape;
        let d_attended = self.stack(self.split(d_output.clone().matmul(weights.output.clone())));
        // The softmax's row sums over `len` scores equal sums over `head_dim` outputs (Dao et al.,
        // arXiv 2205.14135, section 3.1): far fewer.
        let along = (d_attended.clone() * attended.clone()).sum_dim(3);
        let d_output_weight = linear_weight_backward(d_output, self.merge(self.unstack(attended)));
        let d_value = probabilities.clone().transpose().matmul(d_attended.clone());
        let d_scores = (d_attended.matmul(value.transpose()) - along) * probabilities;
        let d_key = d_scores.clone().transpose().matmul(query);
        let d_query = d_scores.matmul(key).mul_scalar(self.scale());

        let d_query = self.merge(rotary.rotate_backward(self.unstack(d_query)));
        let d_key = self.merge(rotary.rotate_backward(self.unstack(d_key)));
        let d_value = self.merge(self.unstack(d_value));
        let d_x = d_query.clone().matmul(weights.query.clone())
            + d_key.clone().matmul(weights.key.clone())
            + d_value.clone().matmul(weights.value.clone());
        let d_weights = [
            linear_weight_backward(d_query, x.clone()),
            linear_weight_backward(d_key, x.clone()),
            linear_weight_backward(d_value, x),
            d_output_weight,
        ];
        (d_x, d_weights)
    }
}

/// What the gradient of the MLP needs; all but `x` are `[n, intermediate]`.
pub(super) struct MlpTape {
    x: Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
    sigmoid: Tensor<2>,
}

/// Gated MLP: `(silu(x G^T) * (x U^T)) D^T` (Shazeer, arXiv 2002.05202).
pub(super) fn mlp(x: Tensor<2>, weights: &Layer<Tensor<2>>) -> (Tensor<2>, MlpTape) {
    let gate = linear(x.clone(), &weights.gate);
    let up = linear(x.clone(), &weights.up);
    let sigmoid = sigmoid(gate.clone());
    let output = linear(gate.clone() * sigmoid.clone() * up.clone(), &weights.down);
    (output, MlpTape { x, gate, up, sigmoid })
}

/// Gradients of [`mlp`]: `d_x`, then those of gate, up and down.
pub(super) fn mlp_backward(
    d_output: Tensor<2>,
    weights: &Layer<Tensor<2>>,
    tape: MlpTape,
) -> (Tensor<2>, [Tensor<2>; 3]) {
    let MlpTape { x, gate, up, sigmoid } = tape;
    let silu = gate * sigmoid.clone();
    let d_inner = d_output.clone().matmul(weights.down.clone());
    let d_down = linear_weight_backward(d_output, silu.clone() * up.clone());
    let d_up = d_inner.clone() * silu.clone();
    // silu'(a) = s + silu(a) (1 - s) with s = sigmoid(a).
    let slope = (sigmoid.clone().neg().add_scalar(1.0) * silu) + sigmoid;
    let d_gate = d_inner * up * slope;
    let d_x = d_gate.clone().matmul(weights.gate.clone()) + d_up.clone().matmul(weights.up.clone());
    let d_weights = [linear_weight_backward(d_gate, x.clone()), linear_weight_backward(d_up, x), d_down];
    (d_x, d_weights)
}
