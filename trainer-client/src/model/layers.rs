//! The decoder's operations, each beside its gradient.
//!
//! Shapes: `n` tokens in a group (`rows * len`), `heads` query heads in `kv_heads` groups, `head_dim` wide. Each
//! forward function returns its output and a tape of what its `_backward` needs; `d_x` is the gradient of the
//! loss with respect to `x`.

use std::ops::Range;

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Bool, FloatDType, IndexingUpdateOp, Int, Tensor};

use super::host::{from_host, on_host, to_host};
use super::kernels;
use super::weights::Layer;

/// The rows of a group that a gradient flows into.
pub(super) struct Rows {
    /// Tokens of the group.
    tokens: usize,
    /// Which of them, ascending; none for all of them.
    some: Option<Tensor<1, Int>>,
}

impl Rows {
    /// All `tokens` rows.
    pub fn all(tokens: usize) -> Self {
        Self { tokens, some: None }
    }

    /// These rows of `tokens`.
    pub fn some(tokens: usize, rows: Tensor<1, Int>) -> Self {
        Self { tokens, some: Some(rows) }
    }

    /// Those rows of a matrix of all.
    pub fn take(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.some {
            Some(rows) => x.select(0, rows.clone()),
            None => x,
        }
    }

    /// The inverse of [`Rows::take`], with zeros between.
    pub fn spread(&self, x: Tensor<2>) -> Tensor<2> {
        let Some(rows) = &self.some else { return x };
        let zeros = Tensor::zeros([self.tokens, x.dims()[1]], (&x.device(), x.dtype()));
        zeros.select_assign(0, rows.clone(), x, IndexingUpdateOp::Add)
    }
}

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

impl NormTape {
    /// Its rows that a gradient flows into.
    pub fn take(self, rows: &Rows) -> Self {
        Self { normed: rows.take(self.normed), inverse_rms: rows.take(self.inverse_rms) }
    }
}

/// Root mean square norm: `x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich, arXiv 1910.07467).
pub(super) fn rms_norm(x: Tensor<2>, weight: &Tensor<2>, eps: f64) -> (Tensor<2>, NormTape) {
    let dtype = x.dtype();
    let x = x.cast(FloatDType::F32);
    let inverse_rms = (x.clone() * x.clone()).mean_dim(1).add_scalar(eps).sqrt().recip();
    let normed = x * inverse_rms.clone();
    let output = (normed.clone() * weight.clone()).cast(dtype);
    (output, NormTape { normed: normed.cast(dtype), inverse_rms })
}

/// Gradients of [`rms_norm`]: `(d_x, d_weight)`.
pub(super) fn rms_norm_backward(
    d_y: Tensor<2>,
    weight: &Tensor<2>,
    tape: NormTape,
) -> (Tensor<2>, Tensor<2>) {
    let NormTape { normed, inverse_rms } = tape;
    let dtype = d_y.dtype();
    let (d_y, normed) = (d_y.cast(FloatDType::F32), normed.cast(FloatDType::F32));
    let d_weight = (d_y.clone() * normed.clone()).sum_dim(0);
    let d_normed = d_y * weight.clone();
    let along = (d_normed.clone() * normed.clone()).mean_dim(1);
    (((d_normed - normed * along) * inverse_rms).cast(dtype), d_weight)
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

/// What each token of a group may look at: itself, so that no row of a softmax is empty, and what stands before it in its
/// segment. There is one of a group.
#[allow(clippy::large_enum_variant)]
pub(super) enum Visible {
    /// On the CPU: the span of its row for each token, `[rows * len]`.
    Spans(Vec<Range<usize>>),
    /// Elsewhere: true where a token (third dimension) must not look at another (fourth), `[rows, 1, len, len]`.
    Mask(Tensor<4, Bool>),
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

    /// Grouped-query attention with its projections.
    pub(super) fn forward(
        self,
        x: Tensor<2>,
        weights: &Layer<Tensor<2>>,
        rotary: &Rotary,
        visible: &Visible,
    ) -> (Tensor<2>, AttentionTape) {
        let query = rotary.rotate(self.split(linear(x.clone(), &weights.query)));
        let query = self.stack(query.mul_scalar(self.scale()));
        let key = self.stack(rotary.rotate(self.split(linear(x.clone(), &weights.key))));
        let value = self.stack(self.split(linear(x.clone(), &weights.value)));
        let scores = query.clone().matmul(key.clone().transpose());
        let probabilities = self.softmax(scores, visible);
        let attended = probabilities.clone().matmul(value.clone());
        let output = linear(self.merge(self.unstack(attended.clone())), &weights.output);
        (output, AttentionTape { x, query, key, value, probabilities, attended })
    }

    /// Softmax over the tokens that each may look at, in f32 whatever the scores are.
    fn softmax(self, scores: Tensor<4>, visible: &Visible) -> Tensor<4> {
        let (stacked, dtype, device) = (scores.dims(), scores.dtype(), scores.device());
        let scores = scores.cast(FloatDType::F32);
        let probabilities = match visible {
            Visible::Spans(spans) => {
                let mut values = to_host(scores);
                kernels::masked_softmax(&mut values, self.len, spans, self.heads);
                from_host(values, stacked, &device)
            }
            Visible::Mask(hidden) => {
                let scores = scores.reshape([self.rows, self.heads, self.len, self.len]);
                softmax(scores.mask_fill(hidden.clone(), f32::NEG_INFINITY), 3).reshape(stacked)
            }
        };
        probabilities.cast(dtype)
    }

    /// Gradients of [`AttentionShape::forward`]: `d_x`, then those of the four projections' weights. `d_output` holds the
    /// rows that a gradient flows into.
    pub(super) fn backward(
        self,
        d_output: Tensor<2>,
        weights: &Layer<Tensor<2>>,
        rotary: &Rotary,
        tape: AttentionTape,
        rows: &Rows,
    ) -> (Tensor<2>, [Tensor<2>; 4]) {
        let AttentionTape { x, query, key, value, probabilities, attended } = tape;
        let d_attended = self.stack(self.split(rows.spread(d_output.clone().matmul(weights.output.clone()))));
        // The softmax's row sums over `len` scores equal sums over `head_dim` outputs (Dao et al.,
        // arXiv 2205.14135, section 3.1): far fewer.
        let along = (d_attended.clone() * attended.clone()).cast(FloatDType::F32).sum_dim(3);
        let d_output_weight = linear_weight_backward(d_output, rows.take(self.merge(self.unstack(attended))));
        let d_value = probabilities.clone().transpose().matmul(d_attended.clone());
        let d_scores = softmax_backward(d_attended.matmul(value.transpose()), probabilities, along);
        let d_key = d_scores.clone().transpose().matmul(query);
        let d_query = d_scores.matmul(key).mul_scalar(self.scale());

        let d_query = rows.take(self.merge(rotary.rotate_backward(self.unstack(d_query))));
        let d_key = self.merge(rotary.rotate_backward(self.unstack(d_key)));
        let d_value = self.merge(self.unstack(d_value));
        let d_x = rows.spread(d_query.clone().matmul(weights.query.clone()))
            + d_key.clone().matmul(weights.key.clone())
            + d_value.clone().matmul(weights.value.clone());
        let d_weights = [
            linear_weight_backward(d_query, rows.take(x.clone())),
            linear_weight_backward(d_key, x.clone()),
            linear_weight_backward(d_value, x),
            d_output_weight,
        ];
        (d_x, d_weights)
    }
}

/// Gradient of a softmax with respect to its scores, given that of its result and the row sums of their product.
fn softmax_backward(d_result: Tensor<4>, result: Tensor<4>, along: Tensor<4>) -> Tensor<4> {
    if !on_host(&d_result) {
        let dtype = d_result.dtype();
        return ((d_result.cast(FloatDType::F32) - along) * result.cast(FloatDType::F32)).cast(dtype);
    }
    let (shape, device) = (d_result.dims(), d_result.device());
    let mut values = to_host(d_result);
    kernels::softmax_backward(&mut values, &to_host(result), &to_host(along), shape[3]);
    from_host(values, shape, &device)
}

/// What the gradient of the MLP needs; all but `x` are `[n, intermediate]`.
pub(super) struct MlpTape {
    x: Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
}

impl MlpTape {
    /// Its rows that a gradient flows into.
    pub fn take(self, rows: &Rows) -> Self {
        Self { x: rows.take(self.x), gate: rows.take(self.gate), up: rows.take(self.up) }
    }
}

/// Gated MLP: `(silu(x G^T) * (x U^T)) D^T` (Shazeer, arXiv 2002.05202).
pub(super) fn mlp(x: Tensor<2>, weights: &Layer<Tensor<2>>) -> (Tensor<2>, MlpTape) {
    let gate = linear(x.clone(), &weights.gate);
    let up = linear(x.clone(), &weights.up);
    let (inner, gate, up) = gated(gate, up);
    (linear(inner, &weights.down), MlpTape { x, gate, up })
}

/// `silu(gate) * up`, and both of them again.
fn gated(gate: Tensor<2>, up: Tensor<2>) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    if !on_host(&gate) {
        return (gate.clone() * sigmoid(gate.clone()) * up.clone(), gate, up);
    }
    let (shape, device) = (gate.dims(), gate.device());
    let (gate, up) = (to_host(gate), to_host(up));
    let inner = kernels::gated(&gate, &up);
    (from_host(inner, shape, &device), from_host(gate, shape, &device), from_host(up, shape, &device))
}

/// Gradients of [`mlp`]: `d_x`, then those of gate, up and down.
pub(super) fn mlp_backward(
    d_output: Tensor<2>,
    weights: &Layer<Tensor<2>>,
    tape: MlpTape,
) -> (Tensor<2>, [Tensor<2>; 3]) {
    let MlpTape { x, gate, up } = tape;
    let d_inner = d_output.clone().matmul(weights.down.clone());
    let (d_gate, d_up, inner) = gated_backward(gate, up, d_inner);
    let d_down = linear_weight_backward(d_output, inner);
    let d_x = d_gate.clone().matmul(weights.gate.clone()) + d_up.clone().matmul(weights.up.clone());
    let d_weights = [linear_weight_backward(d_gate, x.clone()), linear_weight_backward(d_up, x), d_down];
    (d_x, d_weights)
}

/// Gradients of [`gated`] with respect to gate and up, and its result once more.
fn gated_backward(gate: Tensor<2>, up: Tensor<2>, d_inner: Tensor<2>) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    if !on_host(&gate) {
        let sigmoid = sigmoid(gate.clone());
        let silu = gate * sigmoid.clone();
        // silu'(a) = s + silu(a) (1 - s) with s = sigmoid(a).
        let slope = (sigmoid.clone().neg().add_scalar(1.0) * silu.clone()) + sigmoid;
        return (d_inner.clone() * up.clone() * slope, d_inner * silu.clone(), silu * up);
    }
    let (shape, device) = (gate.dims(), gate.device());
    let (mut gate, mut up, mut d_inner) = (to_host(gate), to_host(up), to_host(d_inner));
    kernels::gated_backward(&mut gate, &mut up, &mut d_inner);
    (from_host(gate, shape, &device), from_host(up, shape, &device), from_host(d_inner, shape, &device))
}
