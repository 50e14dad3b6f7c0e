//! The decoder's operations, each beside its gradient.
//!
//! Shapes: `n` tokens in a group (`rows * len`), `heads` query heads in `kv_heads` groups, `head_dim` wide. Each
//! forward function returns its output and a tape of what its `_backward` needs; `d_x` is the gradient of the
//! loss with respect to `x`.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;

use super::attention::{Attended, AttentionShape, Projected, Visible};
use super::host::{from_host, on_host, to_host};
use super::kernels;
use super::projection::{HeadNormTape, bias_backward, norm_heads, norm_heads_backward, with_bias};
use super::rows::Rows;
use super::weights::{Extras, Layer};

/// `x W^T` for a weight stored `[out, in]`.
pub(super) fn linear(x: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.matmul(weight.clone().transpose())
}

/// Gradient of [`linear`] with respect to its weight, `[out, in]`.
pub(super) fn linear_weight_backward(d_y: Tensor<2>, x: Tensor<2>) -> Tensor<2> {
    d_y.transpose().matmul(x)
}

/// Rotary angles of some tokens.
pub(super) struct Rotary {
    /// Cosines and sines, `[tokens, head_dim / 2]`.
    pub cosine: Tensor<2>,
    pub sine: Tensor<2>,
}

impl Rotary {
    /// Those of some of the tokens.
    fn take(&self, rows: &Rows) -> Self {
        Self { cosine: rows.take(self.cosine.clone()), sine: rows.take(self.sine.clone()) }
    }

    /// Rotates `[tokens, heads * head_dim]` in the rotate-half form of Hugging Face's Llama, and multiplies it by `scale`:
    /// dimension `i` of a head is paired with `i + head_dim / 2` (Su et al., arXiv 2104.09864, pairs neighbours instead).
    fn rotate(&self, x: Tensor<2>, scale: f32) -> Tensor<2> {
        self.turn(x, 1.0, scale)
    }

    /// Gradient of [`Rotary::rotate`]: the rotation backwards.
    fn rotate_backward(&self, d_y: Tensor<2>, scale: f32) -> Tensor<2> {
        self.turn(d_y, -1.0, scale)
    }

    fn turn(&self, x: Tensor<2>, turns: f32, scale: f32) -> Tensor<2> {
        let (shape, device, half) = (x.dims(), x.device(), self.cosine.dims()[1]);
        if on_host(&x) {
            let mut values = to_host(x);
            let (cosine, sine) = (to_host(self.cosine.clone()), to_host(self.sine.clone()));
            kernels::attention::rotate(&mut values, 2 * half, (&cosine, &sine), turns, scale);
            return from_host(values, shape, &device);
        }
        let [tokens, width] = shape;
        let heads = width / (2 * half);
        let angles = |x: &Tensor<2>| x.clone().reshape([tokens, 1, half]);
        let (cosine, sine) = (angles(&self.cosine), angles(&self.sine).mul_scalar(turns));
        let x = x.reshape([tokens, heads, 2 * half]);
        let (first, second) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
        let turned_first = first.clone() * cosine.clone() - second.clone() * sine.clone();
        let turned_second = second * cosine + first * sine;
        Tensor::cat(vec![turned_first, turned_second], 2).reshape(shape).mul_scalar(scale)
    }
}

/// What the gradient of attention and its projections needs.
pub(super) struct AttentionTape {
    /// Input of the projections.
    x: Tensor<2>,
    projected: Projected,
    attended: Attended,
    /// Of queries, and of keys at the rows of the input, where the model norms them.
    norms: [Option<HeadNormTape>; 2],
}

impl AttentionTape {
    /// Its rows that gradients flow into; keys and values stay whole, for queries look at all of them.
    pub fn take(self, flow: &Flow, heads: usize) -> Self {
        let Self { x, projected: Projected { query, key, value }, attended, norms: [of_query, of_key] } =
            self;
        let rows = &flow.rows;
        Self {
            x: flow.below.take(x),
            projected: Projected { query: rows.take(query), key, value },
            attended: Attended {
                output: rows.take(attended.output),
                log_sums: rows.take_values(attended.log_sums, heads),
            },
            norms: [of_query.map(|tape| tape.take(rows)), of_key.map(|tape| tape.take(&flow.below))],
        }
    }
}

/// Where a layer's gradient flows: for each row of its output that has one, into that row of the layer.
pub(super) struct Flow {
    /// Rows of queries, of the MLP, and of everything above the keys and values.
    pub rows: Rows,
    /// Rows of keys and values, and of the layer's input: those, or all.
    pub below: Rows,
}

impl Flow {
    /// All of a group's tokens.
    pub fn all(tokens: usize) -> Self {
        Self { rows: Rows::all(tokens), below: Rows::all(tokens) }
    }

    /// Some rows of a group, and no others.
    pub fn within(rows: Rows) -> Self {
        Self { below: rows.clone(), rows }
    }
}

/// Grouped-query attention with its projections, at some rows of the input; keys and values are those of all.
pub(super) fn attention(
    x: Tensor<2>,
    weights: &Layer<Tensor<2>>,
    (shape, rotary, visible): (AttentionShape, &Rotary, &Visible),
    flow: &Flow,
) -> (Tensor<2>, AttentionTape) {
    let Flow { rows, below } = flow;
    let Extras { query_bias, key_bias, value_bias, query_norm, key_norm } = &weights.extras;
    let key = with_bias(linear(x.clone(), &weights.key), key_bias.as_ref());
    let (key, of_key) = norm_heads(key, key_norm.as_ref(), shape.eps);
    let key = rotary.rotate(key, 1.0);
    let value = with_bias(linear(x.clone(), &weights.value), value_bias.as_ref());
    let query = with_bias(linear(rows.take(x.clone()), &weights.query), query_bias.as_ref());
    let (query, of_query) = norm_heads(query, query_norm.as_ref(), shape.eps);
    let query = rotary.take(rows).rotate(query, shape.scale);
    let projected = Projected { query, key, value };
    let attended = shape.attend(&projected, visible, rows);
    let output = linear(attended.output.clone(), &weights.output);
    let norms = [of_query, of_key.map(|tape| tape.take(below))];
    (output, AttentionTape { x: below.take(x), projected, attended, norms })
}

/// Gradients of [`attention`]: `d_x`, at the rows below, then those of the four projections' weights, and of what some families
/// add to them.
pub(super) fn attention_backward(
    d_output: Tensor<2>,
    weights: &Layer<Tensor<2>>,
    (shape, rotary, visible): (AttentionShape, &Rotary, &Visible),
    tape: AttentionTape,
    flow: &Flow,
) -> (Tensor<2>, [Tensor<2>; 4], Extras<Tensor<2>>) {
    let AttentionTape { x, projected, attended, norms: [of_query, of_key] } = tape;
    let Extras { query_bias, key_bias, value_bias, query_norm, key_norm } = &weights.extras;
    let Flow { rows, below } = flow;
    let d_attended = d_output.clone().matmul(weights.output.clone());
    let d_output_weight = linear_weight_backward(d_output, attended.output.clone());
    let [d_query, d_key, d_value] = shape.backward(d_attended, projected, attended, visible, (rows, below));

    let d_query = rotary.take(rows).rotate_backward(d_query, shape.scale);
    let (d_query, d_query_norm) = norm_heads_backward(d_query, query_norm.as_ref(), of_query);
    let d_key = rotary.take(below).rotate_backward(d_key, 1.0);
    let (d_key, d_key_norm) = norm_heads_backward(d_key, key_norm.as_ref(), of_key);
    let extras = Extras {
        query_bias: query_bias.as_ref().map(|_| bias_backward(d_query.clone())),
        key_bias: key_bias.as_ref().map(|_| bias_backward(d_key.clone())),
        value_bias: value_bias.as_ref().map(|_| bias_backward(d_value.clone())),
        query_norm: d_query_norm,
        key_norm: d_key_norm,
    };
    let d_x = rows.spread_to(below, d_query.clone().matmul(weights.query.clone()))
        + d_key.clone().matmul(weights.key.clone())
        + d_value.clone().matmul(weights.value.clone());
    // Where they are not the same rows, those of the queries are some of all.
    let x_of_queries = if below.are_all() { rows.take(x.clone()) } else { x.clone() };
    let d_weights = [
        linear_weight_backward(d_query, x_of_queries),
        linear_weight_backward(d_key, x.clone()),
        linear_weight_backward(d_value, x),
        d_output_weight,
    ];
    (d_x, d_weights, extras)
}

/// What the gradient of the MLP needs.
pub(super) struct MlpTape {
    x: Tensor<2>,
    /// `[.., intermediate]`.
    gate: Tensor<2>,
    /// `[.., intermediate]`.
    up: Tensor<2>,
}

impl MlpTape {
    /// The first half of the gated MLP `(silu(x G^T) * (x U^T)) D^T` (Shazeer, arXiv 2002.05202).
    pub fn of(x: Tensor<2>, weights: &Layer<Tensor<2>>) -> Self {
        let gate = linear(x.clone(), &weights.gate);
        let up = linear(x.clone(), &weights.up);
        Self { x, gate, up }
    }

    /// The second half, and the same tape.
    pub fn output(self, weights: &Layer<Tensor<2>>) -> (Tensor<2>, Self) {
        let Self { x, gate, up } = self;
        let (inner, gate, up) = gated(gate, up);
        (linear(inner, &weights.down), Self { x, gate, up })
    }

    /// Its rows that a gradient flows into.
    pub fn take(self, rows: &Rows) -> Self {
        Self { x: rows.take(self.x), gate: rows.take(self.gate), up: rows.take(self.up) }
    }
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

/// Gradients of the gated MLP: `d_x`, then those of gate, up and down.
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
