//! The decoder's body, from token ids to final hidden states and back, for a group of a batch's rows.

use std::ops::Range;

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use sluice_feed::batch::Batch;

use super::config::ModelConfig;
use super::device::is_cpu;
use super::layers::{
    AttentionShape, AttentionTape, MlpTape, NormTape, Rotary, Rows, Visible, mlp, mlp_backward, rms_norm,
    rms_norm_backward,
};
use super::weights::{Layer, Weights};

/// Some rows of a batch, as tensors.
pub(super) struct Group {
    shape: AttentionShape,
    /// Token ids, `[n]`.
    tokens: Tensor<1, Int>,
    rotary: Rotary,
    visible: Visible,
}

/// What the gradient of a group's body needs.
pub(super) struct Tape {
    group: Group,
    layers: Vec<Saved>,
    norm: NormTape,
}

/// What is kept of a layer between its forward and its backward pass: a handful, so their size does not matter.
#[allow(clippy::large_enum_variant)]
enum Saved {
    Tape(Box<LayerTape>),
    /// Its input alone, from which the tape is made again.
    Input(Tensor<2>),
}

struct LayerTape {
    input_norm: NormTape,
    attention: AttentionTape,
    mlp_norm: NormTape,
    mlp: MlpTape,
}

/// Gradients of a group's body.
pub(super) struct BodyGradients {
    /// With respect to the embedded tokens, `[n, hidden]`.
    pub embedded: Tensor<2>,
    pub layers: Vec<Layer<Tensor<2>>>,
    pub norm: Tensor<2>,
}

/// Cosines and sines of every position, `[max_position_embeddings, head_dim / 2]`, row-major, computed in f64.
pub(crate) fn rotary_tables(config: &ModelConfig) -> (Vec<f32>, Vec<f32>) {
    let half = config.head_dim() / 2;
    let frequencies: Vec<f64> =
        (0..half).map(|i| config.rope_theta.powf(-(i as f64) / half as f64)).collect();
    (0..config.max_position_embeddings)
        .flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency))
        .map(|angle| (angle.cos() as f32, angle.sin() as f32))
        .unzip()
}

impl BodyGradients {
    /// Adds the weights' gradients of another group; those of the embedded tokens are not the same tokens', and
    /// stay.
    pub fn add(self, other: Self) -> Self {
        let layers =
            self.layers.into_iter().zip(other.layers).map(|(a, b)| a.zip_with(b, |a, b| a + b)).collect();
        Self { embedded: self.embedded, layers, norm: self.norm + other.norm }
    }
}

impl Group {
    /// Takes `rows` of a batch. `tables` are [`rotary_tables`] on the device.
    pub fn new(
        batch: &Batch,
        rows: Range<usize>,
        config: &ModelConfig,
        tables: &(Tensor<2>, Tensor<2>),
        dtype: FloatDType,
        device: &Device,
    ) -> Self {
        let len = batch.len;
        let shape = AttentionShape {
            rows: rows.len(),
            len,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim(),
        };
        let span = rows.start * len..rows.end * len;
        let positions = indices(&batch.positions[span.clone()], device);
        let angles = |table: &Tensor<2>| {
            table
                .clone()
                .select(0, positions.clone())
                .reshape([shape.rows, len, 1, shape.head_dim / 2])
                .cast(dtype)
        };
        let rotary = Rotary { cosine: angles(&tables.0), sine: angles(&tables.1) };
        let visible = visible(&batch.segments[span.clone()], shape, device);
        Self { shape, tokens: indices(&batch.tokens[span], device), rotary, visible }
    }
}

/// What each token of some rows may look at, given the tokens' segments.
fn visible(segments: &[u32], shape: AttentionShape, device: &Device) -> Visible {
    let len = shape.len;
    if is_cpu(device) {
        let spans = segments.chunks_exact(len).flat_map(|segments| {
            let mut start = 0;
            (0..len).map(move |i| {
                if i > 0 && segments[i] != segments[i - 1] {
                    start = i;
                }
                start..i + 1
            })
        });
        return Visible::Spans(spans.collect());
    }
    let mut hidden = Vec::with_capacity(segments.len() * len);
    for segments in segments.chunks_exact(len) {
        for (i, own) in segments.iter().enumerate() {
            hidden.extend(segments.iter().enumerate().map(|(j, other)| j > i || other != own));
        }
    }
    Visible::Mask(Tensor::from_data(TensorData::new(hidden, [shape.rows, 1, len, len]), device))
}

/// Final normed hidden states of a group, `[n, hidden]`. With `recomputes`, layers keep their inputs alone, and run forward
/// once more, with the same bits, when their gradient is wanted.
pub(super) fn forward(
    group: Group,
    weights: &Weights<Tensor<2>>,
    eps: f64,
    recomputes: bool,
) -> (Tensor<2>, Tape) {
    let mut x = weights.embedding.clone().select(0, group.tokens.clone());
    let mut layers = Vec::with_capacity(weights.layers.len());
    for layer in &weights.layers {
        if recomputes {
            layers.push(Saved::Input(x.clone()));
            x = layer_forward(x, layer, &group, eps).0;
        } else {
            let (output, tape) = layer_forward(x, layer, &group, eps);
            layers.push(Saved::Tape(Box::new(tape)));
            x = output;
        }
    }
    let (hidden_states, norm) = rms_norm(x, &weights.norm, eps);
    (hidden_states, Tape { group, layers, norm })
}

fn layer_forward(
    x: Tensor<2>,
    weights: &Layer<Tensor<2>>,
    group: &Group,
    eps: f64,
) -> (Tensor<2>, LayerTape) {
    let (normed, input_norm) = rms_norm(x.clone(), &weights.input_norm, eps);
    let (attended, attention) = group.shape.forward(normed, weights, &group.rotary, &group.visible);
    let x = x + attended;
    let (normed, mlp_norm) = rms_norm(x.clone(), &weights.mlp_norm, eps);
    let (output, mlp) = mlp(normed, weights);
    (x + output, LayerTape { input_norm, attention, mlp_norm, mlp })
}

/// Gradients of [`forward`], given that of its output in some rows of the group (ascending; none elsewhere). Above the last
/// layer's keys and values a row's gradient is its own, so what else there is of that layer costs the kept rows alone.
pub(super) fn backward(
    d_hidden: Tensor<2>,
    kept: &[u32],
    weights: &Weights<Tensor<2>>,
    tape: Tape,
    eps: f64,
) -> BodyGradients {
    let Tape { group, layers: tapes, norm } = tape;
    let tokens = group.shape.rows * group.shape.len;
    let mut rows = if kept.len() == tokens {
        Rows::all(tokens)
    } else {
        Rows::some(tokens, indices(kept, &d_hidden.device()))
    };
    let d_hidden = d_hidden.cast(weights.embedding.dtype());
    let (mut d_x, norm) = rms_norm_backward(d_hidden, &weights.norm, norm.take(&rows));
    let mut layers = Vec::with_capacity(tapes.len());
    for (weights, saved) in weights.layers.iter().zip(tapes).rev() {
        let tape = match saved {
            Saved::Tape(tape) => *tape,
            Saved::Input(x) => layer_forward(x, weights, &group, eps).1,
        };
        let (d_normed, [gate, up, down]) = mlp_backward(d_x.clone(), weights, tape.mlp.take(&rows));
        let (d_residual, mlp_norm) =
            rms_norm_backward(d_normed, &weights.mlp_norm, tape.mlp_norm.take(&rows));
        d_x = d_x + d_residual;
        let (d_normed, [query, key, value, output]) =
            group.shape.backward(d_x.clone(), weights, &group.rotary, tape.attention, &rows);
        let (d_residual, input_norm) = rms_norm_backward(d_normed, &weights.input_norm, tape.input_norm);
        d_x = rows.spread(d_x) + d_residual;
        rows = Rows::all(tokens);
        let gradients = Layer { input_norm, query, key, value, output, mlp_norm, gate, up, down };
        // Sums over groups and micro-batches are f32, whatever the products were.
        layers.push(gradients.map(|gradient| gradient.cast(FloatDType::F32)));
    }
    layers.reverse();
    BodyGradients { embedded: d_x.cast(FloatDType::F32), layers, norm }
}

/// Host indices as an integer tensor.
pub(super) fn indices(values: &[u32], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.iter().map(|&value| i64::from(value)).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
