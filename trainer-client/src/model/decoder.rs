//! The decoder's body, from token ids to final hidden states and back, for a group of a batch's rows.

use std::ops::Range;

use burn::tensor::{Device, FloatDType, Tensor};
use sluice_feed::batch::Batch;

use super::attention::{AttentionShape, Visible};
use super::backward::Backward;
use super::config::{ModelConfig, Scales};
use super::layers::{AttentionTape, Flow, MlpTape, Rotary, attention, attention_backward, mlp_backward};
use super::norm::{NormTape, rms_norm, rms_norm_backward};
use super::rows::{Rows, indices};
use super::weights::{Layer, Weights};

/// Some rows of a batch, as tensors.
pub(super) struct Group {
    shape: AttentionShape,
    /// Token ids, `rows * len`.
    tokens: Vec<u32>,
    rotary: Rotary,
    visible: Visible,
    scales: Scales,
}

/// What the gradient of a group's body needs.
pub(super) struct Tape {
    group: Group,
    layers: Vec<Saved>,
    norm: NormTape,
    /// The rows that it was kept for.
    flow: Flow,
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

impl LayerTape {
    /// Its rows that gradients flow into.
    fn take(self, flow: &Flow, shape: AttentionShape) -> Self {
        let Self { input_norm, attention, mlp_norm, mlp } = self;
        Self {
            input_norm: input_norm.take(&flow.below),
            attention: attention.take(flow, shape.heads),
            mlp_norm: mlp_norm.take(&flow.rows),
            mlp: mlp.take(&flow.rows),
        }
    }
}

/// What a forward pass keeps for a backward pass.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Record<'a> {
    /// Nothing: losses alone are wanted.
    Nothing,
    /// What enters each layer, which runs forward once more when its gradient is wanted.
    Inputs,
    /// All that a gradient needs.
    Tapes,
    /// All that a gradient needs at these rows of the group, ascending, which flows into no others.
    TapesOf(&'a [u32]),
}

/// Values of each token in the tape of a layer, without what few families add.
pub(super) fn tape_values(config: &ModelConfig) -> usize {
    let ModelConfig { hidden_size: hidden, intermediate_size: inner, heads, kv_heads, .. } = *config;
    // Both norms' tapes and outputs; queries, keys, values, and what attention makes of them; gate and up.
    4 * hidden + 2 * (heads + kv_heads) * config.head_dim() + 2 * inner
}

/// Gradients of a group's body.
pub(super) struct BodyGradients {
    /// With respect to the embedded tokens that a gradient flows into, `[tokens, hidden]`, and zeros behind them.
    pub embedded: Tensor<2>,
    /// Ids of those tokens.
    pub tokens: Vec<u32>,
    pub layers: Vec<Layer<Tensor<2>>>,
    pub norm: Tensor<2>,
}

/// Cosines and sines of every position, `[max_position_embeddings, head_dim / 2]`, row-major, computed in f64.
pub(crate) fn rotary_tables(config: &ModelConfig) -> (Vec<f32>, Vec<f32>) {
    let (frequencies, factor) = config.rotary_frequencies();
    (0..config.max_position_embeddings)
        .flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency))
        .map(|angle| ((factor * angle.cos()) as f32, (factor * angle.sin()) as f32))
        .unzip()
}

impl BodyGradients {
    /// Adds the weights' gradients of another group; those of the embedded tokens are not the same tokens', and
    /// stay.
    pub fn add(self, other: Self) -> Self {
        let layers =
            self.layers.into_iter().zip(other.layers).map(|(a, b)| a.zip_with(b, |a, b| a + b)).collect();
        Self { layers, norm: self.norm + other.norm, ..self }
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
            scale: config.attention_scale() as f32,
            eps: config.rms_norm_eps,
        };
        let span = rows.start * len..rows.end * len;
        let positions = indices(&batch.positions[span.clone()], device);
        let angles = |table: &Tensor<2>| table.clone().select(0, positions.clone()).cast(dtype);
        let rotary = Rotary { cosine: angles(&tables.0), sine: angles(&tables.1) };
        let visible = Visible::of(&batch.segments[span.clone()], len, device);
        let tokens = batch.tokens[span].to_vec();
        Self { shape, tokens, rotary, visible, scales: config.variant.scales }
    }

    /// What attention has to know of it.
    fn seen(&self) -> (AttentionShape, &Rotary, &Visible) {
        (self.shape, &self.rotary, &self.visible)
    }
}

/// Final normed hidden states of a group, `[n, hidden]`, and what `record` says of the way there.
pub(super) fn forward(
    group: Group,
    weights: &Weights<Tensor<2>>,
    eps: f64,
    record: Record<'_>,
) -> (Tensor<2>, Option<Tape>) {
    let tokens = group.shape.rows * group.shape.len;
    let all = Flow::all(tokens);
    let device = weights.embedding.device();
    let embedded = weights.embedding.clone().select(0, indices(&group.tokens, &device));
    let mut x = scaled(embedded, group.scales.embedding);
    let flow = match record {
        Record::TapesOf(rows) => Flow::within(Rows::some(tokens, rows, &device)),
        _ => Flow::all(tokens),
    };
    let mut layers = Vec::with_capacity(weights.layers.len());
    for layer in &weights.layers {
        let input = (record == Record::Inputs).then(|| x.clone());
        let (output, tape) = layer_forward(x, layer, &group, eps, &all);
        x = output;
        match record {
            Record::Nothing => {}
            Record::Inputs => layers.extend(input.map(Saved::Input)),
            Record::Tapes => layers.push(Saved::Tape(Box::new(tape))),
            Record::TapesOf(_) => layers.push(Saved::Tape(Box::new(tape.take(&flow, group.shape)))),
        }
    }
    let (hidden_states, norm) = rms_norm(x, &weights.norm, eps);
    let hidden_states = scaled(hidden_states, 1.0 / group.scales.logits);
    let tape = (record != Record::Nothing).then(|| Tape { group, layers, norm: norm.take(&flow.rows), flow });
    (hidden_states, tape)
}

/// `x` times a factor, which is 1 in most families.
fn scaled(x: Tensor<2>, factor: f64) -> Tensor<2> {
    #[allow(clippy::float_cmp, reason = "1 is what a config.json says, or what it leaves out")]
    if factor == 1.0 { x } else { x.mul_scalar(factor) }
}

/// A layer's output and its tape, both at some rows of its input.
fn layer_forward(
    x: Tensor<2>,
    weights: &Layer<Tensor<2>>,
    group: &Group,
    eps: f64,
    flow: &Flow,
) -> (Tensor<2>, LayerTape) {
    let (x, tape) = half_forward(x, weights, group, eps, flow);
    let LayerTape { mlp, .. } = tape;
    let (output, mlp) = mlp.output(weights);
    (x + scaled(output, group.scales.residual), LayerTape { mlp, ..tape })
}

/// A layer's tape, and what its MLP's output is added to.
fn half_forward(
    x: Tensor<2>,
    weights: &Layer<Tensor<2>>,
    group: &Group,
    eps: f64,
    flow: &Flow,
) -> (Tensor<2>, LayerTape) {
    let (normed, input_norm) = rms_norm(x.clone(), &weights.input_norm, eps);
    let (attended, attention) = attention(normed, weights, group.seen(), flow);
    let x = flow.rows.take(x) + scaled(attended, group.scales.residual);
    let (normed, mlp_norm) = rms_norm(x.clone(), &weights.mlp_norm, eps);
    let input_norm = input_norm.take(&flow.below);
    (x, LayerTape { input_norm, attention, mlp_norm, mlp: MlpTape::of(normed, weights) })
}

/// Gradients of [`forward`], given that of its output in the `kept` rows of the group (ascending; none elsewhere), padded as
/// [`Rows`] are.
///
/// Above the last layer's keys and values a row's gradient is its own, so what else there is of that layer costs the kept
/// rows alone; with [`Backward::Kept`] everything does.
pub(super) fn backward(
    d_hidden: Tensor<2>,
    kept: &[u32],
    weights: &Weights<Tensor<2>>,
    tape: Tape,
    (eps, through): (f64, Backward),
) -> BodyGradients {
    let Tape { group, layers: tapes, norm, flow: taped } = tape;
    let tokens = group.shape.rows * group.shape.len;
    let rows = || Rows::some(tokens, kept, &d_hidden.device());
    let mut flow = match through {
        Backward::Exact => Flow { rows: rows(), below: Rows::all(tokens) },
        Backward::Kept => Flow::within(rows()),
    };
    // A tape that was kept for these rows alone has them already.
    let is_whole = taped.rows.are_all();
    let norm = if is_whole { norm.take(&flow.rows) } else { norm };
    let Scales { embedding, residual, logits, .. } = group.scales;
    let d_hidden = scaled(d_hidden.cast(weights.embedding.dtype()), 1.0 / logits);
    let (mut d_x, norm) = rms_norm_backward(d_hidden, &weights.norm, norm);
    let mut layers = Vec::with_capacity(tapes.len());
    for (weights, saved) in weights.layers.iter().zip(tapes).rev() {
        let tape = match (saved, through) {
            (Saved::Tape(tape), _) if is_whole => tape.take(&flow, group.shape),
            (Saved::Tape(tape), _) => *tape,
            // With all rows, as the pass forward had them: products of other shapes may round otherwise.
            (Saved::Input(x), Backward::Exact) => {
                half_forward(x, weights, &group, eps, &Flow::all(tokens)).1.take(&flow, group.shape)
            }
            (Saved::Input(x), Backward::Kept) => half_forward(x, weights, &group, eps, &flow).1,
        };
        let (d_normed, [gate, up, down]) = mlp_backward(scaled(d_x.clone(), residual), weights, tape.mlp);
        let (d_residual, mlp_norm) = rms_norm_backward(d_normed, &weights.mlp_norm, tape.mlp_norm);
        d_x = d_x + d_residual;
        let d_attended = scaled(d_x.clone(), residual);
        let (d_normed, [query, key, value, output], extras) =
            attention_backward(d_attended, weights, group.seen(), tape.attention, &flow);
        let (d_residual, input_norm) = rms_norm_backward(d_normed, &weights.input_norm, tape.input_norm);
        d_x = flow.rows.spread_to(&flow.below, d_x) + d_residual;
        if through == Backward::Exact {
            flow = Flow::all(tokens);
        }
        let gradients = Layer { input_norm, query, key, value, output, mlp_norm, gate, up, down, extras };
        // Sums over groups and micro-batches are f32, whatever the products were.
        layers.push(gradients.map(|gradient| gradient.cast(FloatDType::F32)));
    }
    layers.reverse();
    let tokens = flow.below.positions().iter().map(|&position| group.tokens[position as usize]).collect();
    BodyGradients { embedded: scaled(d_x.cast(FloatDType::F32), embedding), tokens, layers, norm }
}
