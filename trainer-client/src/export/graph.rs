//! The decoder as an ONNX graph.
//!
//! It reads `input_ids` alone: positions and the causal mask come from the input's shape, so padding on the right changes no
//! real token. Attention is one operator, which ONNX Runtime has fused kernels for: `GroupQueryAttention` of its own domain
//! where that can turn a head's dimensions by itself, else the standard `Attention`. Norms are spelled the way ONNX
//! Runtime's optimizer recognises them, in single precision as transformers computes them.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use sluice_schemas::graph::{
    Dim, GraphBuilder, float_attribute, int_attribute, ints_attribute, raw_tensor, tensor_info,
};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto};

use super::external::{External, PAGE_BYTES};
use crate::model::ModelConfig;
use crate::model::config::Scales;
use crate::model::decoder::rotary_tables;
use crate::run::tensors::{NamedTensor, Stored};

/// Input: token ids, int64 `[batch, sequence]`.
pub const INPUT: &str = "input_ids";
/// Output: logits `[batch, sequence, vocab]`; position `i` predicts token `i + 1`.
pub const OUTPUT: &str = "logits";

/// ONNX Runtime's own operators.
const MICROSOFT: &str = "com.microsoft";
/// `GroupQueryAttention` turns heads of a multiple of these dimensions.
const HEAD_DIM_STEP: usize = 16;
/// The operator that attention is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attention {
    /// ONNX Runtime's `GroupQueryAttention`.
    GroupQuery,
    /// The standard operator.
    Standard,
}

impl Attention {
    fn of(config: &ModelConfig) -> Self {
        if config.head_dim().is_multiple_of(HEAD_DIM_STEP) { Self::GroupQuery } else { Self::Standard }
    }

    /// Version of the file format, and of the standard operators: the oldest that has what is needed.
    fn versions(self) -> (i64, i64) {
        match self {
            Self::GroupQuery => (8, 17),
            Self::Standard => (11, 23),
        }
    }
}

fn data_type(stored: Stored) -> DataType {
    match stored {
        Stored::F32 => DataType::Float,
        Stored::F16 => DataType::Float16,
        Stored::Bf16 => DataType::Bfloat16,
    }
}

/// The decoder as an ONNX model whose floating-point values are `stored` so; weights go to `external` where that is given.
pub(super) fn onnx_model<'a>(
    config: &'a ModelConfig,
    weights: Vec<NamedTensor>,
    stored: Stored,
    external: Option<External<'a>>,
) -> Result<ModelProto> {
    let weights = weights.into_iter().map(|weight| (weight.name.clone(), weight)).collect();
    let attention = Attention::of(config);
    let mut exporter =
        Exporter { config, weights, stored, attention, external, graph: GraphBuilder::new("") };
    exporter.decoder()?;
    if let Some(name) = exporter.weights.keys().min() {
        bail!("weight {name} is not part of this model: use the config.json that belongs to the weights");
    }
    let (node, initializer) = exporter.graph.finish();
    let (batch, sequence) = (Dim::Named("batch"), Dim::Named("sequence"));
    let vocab = Dim::Fixed(config.vocab_size as i64);
    let graph = GraphProto {
        name: Some("decoder".to_owned()),
        node,
        initializer,
        input: vec![tensor_info(INPUT, DataType::Int64, &[batch, sequence])],
        output: vec![tensor_info(OUTPUT, data_type(stored), &[batch, sequence, vocab])],
        ..Default::default()
    };
    let (ir_version, opset) = attention.versions();
    let import = |domain: &str, version| OperatorSetIdProto {
        domain: Some(domain.to_owned()),
        version: Some(version),
    };
    let mut opset_import = vec![import("", opset)];
    if attention == Attention::GroupQuery {
        opset_import.push(import(MICROSOFT, 1));
    }
    Ok(ModelProto {
        ir_version: Some(ir_version),
        opset_import,
        producer_name: Some("sluice-train".to_owned()),
        producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        graph: Some(graph),
        ..Default::default()
    })
}

struct Exporter<'a> {
    config: &'a ModelConfig,
    /// Weights not yet in the graph, by name.
    weights: HashMap<String, NamedTensor>,
    stored: Stored,
    attention: Attention,
    external: Option<External<'a>>,
    graph: GraphBuilder,
}

/// Values that every layer uses.
struct Shared {
    /// Cosines and sines, `[positions, head_dim / 2]`: of all positions for `GroupQueryAttention`, else of the sequence's.
    cosine: String,
    sine: String,
    /// For `GroupQueryAttention`: each row's last position, and the number of positions.
    lengths: [String; 2],
    eps: String,
    two: String,
    /// Where the halves of a head begin and end, and the axis they lie on.
    halves: [String; 3],
    last_axis: String,
}

impl Exporter<'_> {
    fn decoder(&mut self) -> Result<()> {
        let Scales { embedding: of_embedding, residual, logits, .. } = self.config.variant.scales;
        let shared = self.shared()?;
        let embedding = self.weight("model.embed_tokens.weight")?;
        let x = self.op("Gather", &[&embedding, INPUT]);
        let mut x = self.scaled(x, of_embedding)?;
        for layer in 0..self.config.layers {
            let prefix = format!("model.layers.{layer}");
            let normed = self.rms_norm(&x, &format!("{prefix}.input_layernorm.weight"), &shared)?;
            let attended = self.attention(&normed, &format!("{prefix}.self_attn"), &shared)?;
            let attended = self.scaled(attended, residual)?;
            x = self.op("Add", &[&x, &attended]);
            let normed = self.rms_norm(&x, &format!("{prefix}.post_attention_layernorm.weight"), &shared)?;
            let output = self.mlp(&normed, &format!("{prefix}.mlp"))?;
            let output = self.scaled(output, residual)?;
            x = self.op("Add", &[&x, &output]);
        }
        let normed = self.rms_norm(&x, "model.norm.weight", &shared)?;
        // Before the head, where it costs the width of the stream and not that of the vocabulary.
        let normed = self.scaled(normed, 1.0 / logits)?;
        let head = if self.config.tie_word_embeddings {
            self.transpose(&embedding, &[1, 0])
        } else {
            self.transposed_weight("lm_head.weight")?
        };
        self.graph.node_to("MatMul", &[&normed, &head], vec![], OUTPUT);
        Ok(())
    }

    fn shared(&mut self) -> Result<Shared> {
        let shape = self.op("Shape", &[INPUT]);
        let (zero, one) = (self.graph.ints(&[0]), self.graph.ints(&[1]));
        let length = self.op("Gather", &[&shape, &one]);
        let (cosine, sine) = rotary_tables(self.config);
        let table = [self.config.max_position_embeddings, self.config.head_dim() / 2];
        let cosine = self.floats("rotary_cosine", &table, &cosine, self.stored)?;
        let sine = self.floats("rotary_sine", &table, &sine, self.stored)?;
        let int32 = || vec![int_attribute("to", i64::from(DataType::Int32 as i32))];
        let (cosine, sine, lengths) = match self.attention {
            Attention::GroupQuery => {
                let batch = self.op("Gather", &[&shape, &zero]);
                let last = self.op("Sub", &[&length, &one]);
                let last = self.graph.node("Cast", &[&last], int32());
                let last = self.op("Expand", &[&last, &batch]);
                let total = self.op("Squeeze", &[&length]);
                let total = self.graph.node("Cast", &[&total], int32());
                (cosine, sine, [last, total])
            }
            Attention::Standard => {
                let cosine = self.op("Slice", &[&cosine, &zero, &length, &zero]);
                let sine = self.op("Slice", &[&sine, &zero, &length, &zero]);
                (cosine, sine, [String::new(), String::new()])
            }
        };
        let eps = self.floats("rms_norm_eps", &[], &[self.config.rms_norm_eps as f32], Stored::F32)?;
        let two = self.floats("two", &[], &[2.0], Stored::F32)?;
        let half = (self.config.head_dim() / 2) as i64;
        let halves = [0, half, 2 * half].map(|bound| self.graph.ints(&[bound]));
        let last_axis = self.graph.ints(&[-1]);
        Ok(Shared { cosine, sine, lengths, eps, two, halves, last_axis })
    }

    /// `x` times a factor, which is 1 in most families.
    fn scaled(&mut self, x: String, factor: f64) -> Result<String> {
        #[allow(clippy::float_cmp, reason = "1 is what a config.json says, or what it leaves out")]
        if factor == 1.0 {
            return Ok(x);
        }
        let name = format!("factor_{factor}");
        let factor = if self.graph.has(&name) {
            name
        } else {
            self.floats(&name, &[], &[factor as f32], self.stored)?
        };
        Ok(self.op("Mul", &[&x, &factor]))
    }

    fn cast(&mut self, x: &str, to: DataType) -> String {
        if self.stored == Stored::F32 {
            return x.to_owned();
        }
        self.graph.node("Cast", &[x], vec![int_attribute("to", i64::from(to as i32))])
    }

    /// `x / sqrt(mean(x^2) + eps) * weight`.
    fn rms_norm(&mut self, x: &str, weight: &str, shared: &Shared) -> Result<String> {
        let x = self.cast(x, DataType::Float);
        let square = self.op("Pow", &[&x, &shared.two]);
        let mean = match self.attention {
            // Axes are an attribute before version 18.
            Attention::GroupQuery => {
                self.graph.node("ReduceMean", &[&square], vec![ints_attribute("axes", &[-1])])
            }
            Attention::Standard => self.op("ReduceMean", &[&square, &shared.last_axis]),
        };
        let mean = self.op("Add", &[&mean, &shared.eps]);
        let root = self.op("Sqrt", &[&mean]);
        let normed = self.op("Div", &[&x, &root]);
        let normed = self.cast(&normed, data_type(self.stored));
        let weight = self.weight(weight)?;
        Ok(self.op("Mul", &[&normed, &weight]))
    }

    fn attention(&mut self, x: &str, prefix: &str, shared: &Shared) -> Result<String> {
        let ModelConfig { heads, kv_heads, .. } = *self.config;
        let query = self.projection(x, prefix, ('q', heads), shared)?;
        let key = self.projection(x, prefix, ('k', kv_heads), shared)?;
        let value = self.projection(x, prefix, ('v', kv_heads), shared)?;
        let scale = float_attribute("scale", self.config.attention_scale() as f32);
        let attended = match self.attention {
            Attention::GroupQuery => {
                let [last, total] = &shared.lengths;
                let inputs = [&*query, &key, &value, "", "", last, total, &shared.cosine, &shared.sine];
                let attributes = vec![
                    int_attribute("num_heads", heads as i64),
                    int_attribute("kv_num_heads", kv_heads as i64),
                    int_attribute("do_rotary", 1),
                    scale,
                ];
                let output = format!("{prefix}.attended");
                self.graph.push(NodeProto {
                    name: Some(format!("{prefix}.attention")),
                    op_type: Some("GroupQueryAttention".to_owned()),
                    domain: Some(MICROSOFT.to_owned()),
                    input: inputs.map(str::to_owned).to_vec(),
                    output: vec![output.clone()],
                    attribute: attributes,
                    ..Default::default()
                });
                output
            }
            Attention::Standard => {
                let query = self.split_heads(&query, heads);
                let query = self.rotate(&query, shared);
                let key = self.split_heads(&key, kv_heads);
                let key = self.rotate(&key, shared);
                let value = self.split_heads(&value, kv_heads);
                let attributes = vec![int_attribute("is_causal", 1), scale];
                let attended = self.graph.node("Attention", &[&query, &key, &value], attributes);
                let attended = self.transpose(&attended, &[0, 2, 1, 3]);
                self.reshape(&attended, &[0, 0, (heads * self.config.head_dim()) as i64])
            }
        };
        self.linear(&attended, &format!("{prefix}.o_proj.weight"))
    }

    /// Queries, keys or values of all heads, `[batch, sequence, heads * head_dim]`.
    fn projection(
        &mut self,
        x: &str,
        prefix: &str,
        (which, heads): (char, usize),
        shared: &Shared,
    ) -> Result<String> {
        let mut y = self.linear(x, &format!("{prefix}.{which}_proj.weight"))?;
        if self.config.variant.qkv_bias {
            let bias = self.weight(&format!("{prefix}.{which}_proj.bias"))?;
            y = self.op("Add", &[&y, &bias]);
        }
        if self.config.variant.qk_norm && which != 'v' {
            let head_dim = self.config.head_dim();
            let split = self.reshape(&y, &[0, 0, heads as i64, head_dim as i64]);
            let normed = self.rms_norm(&split, &format!("{prefix}.{which}_norm.weight"), shared)?;
            y = self.reshape(&normed, &[0, 0, (heads * head_dim) as i64]);
        }
        Ok(y)
    }

    /// `[batch, sequence, heads * head_dim]` to `[batch, heads, sequence, head_dim]`.
    fn split_heads(&mut self, x: &str, heads: usize) -> String {
        let split = self.reshape(x, &[0, 0, heads as i64, self.config.head_dim() as i64]);
        self.transpose(&split, &[0, 2, 1, 3])
    }

    /// Rotary embedding in the rotate-half form: dimension `i` is paired with `i + head_dim / 2`.
    fn rotate(&mut self, x: &str, shared: &Shared) -> String {
        let [start, middle, end] = &shared.halves;
        let first = self.op("Slice", &[x, start, middle, &shared.last_axis]);
        let second = self.op("Slice", &[x, middle, end, &shared.last_axis]);
        let mut product = |x: &str, angles: &str| self.op("Mul", &[x, angles]);
        let first_cosine = product(&first, &shared.cosine);
        let second_sine = product(&second, &shared.sine);
        let second_cosine = product(&second, &shared.cosine);
        let first_sine = product(&first, &shared.sine);
        let turned_first = self.op("Sub", &[&first_cosine, &second_sine]);
        let turned_second = self.op("Add", &[&second_cosine, &first_sine]);
        self.graph.node("Concat", &[&turned_first, &turned_second], vec![int_attribute("axis", -1)])
    }

    /// `(silu(x G^T) * (x U^T)) D^T`.
    fn mlp(&mut self, x: &str, prefix: &str) -> Result<String> {
        let gate = self.linear(x, &format!("{prefix}.gate_proj.weight"))?;
        let up = self.linear(x, &format!("{prefix}.up_proj.weight"))?;
        let sigmoid = self.op("Sigmoid", &[&gate]);
        let silu = self.op("Mul", &[&gate, &sigmoid]);
        let inner = self.op("Mul", &[&silu, &up]);
        self.linear(&inner, &format!("{prefix}.down_proj.weight"))
    }

    fn linear(&mut self, x: &str, weight: &str) -> Result<String> {
        let weight = self.transposed_weight(weight)?;
        Ok(self.op("MatMul", &[x, &weight]))
    }

    fn op(&mut self, op_type: &str, inputs: &[&str]) -> String {
        self.graph.node(op_type, inputs, vec![])
    }

    fn reshape(&mut self, x: &str, shape: &[i64]) -> String {
        let shape = self.graph.ints(shape);
        self.op("Reshape", &[x, &shape])
    }

    fn transpose(&mut self, x: &str, permutation: &[i64]) -> String {
        self.graph.node("Transpose", &[x], vec![ints_attribute("perm", permutation)])
    }

    /// Moves a weight into the graph as it is.
    fn weight(&mut self, name: &str) -> Result<String> {
        let NamedTensor { name, shape, values } = self.take(name)?;
        self.floats(&name, &shape, &values, self.stored)
    }

    /// Moves a matrix `[out, in]` into the graph as `[in, out]`, the order in which ONNX multiplies.
    fn transposed_weight(&mut self, name: &str) -> Result<String> {
        let NamedTensor { name, shape, values } = self.take(name)?;
        let [rows, columns] = shape[..] else {
            bail!("weight {name} has shape {shape:?}, expected a matrix")
        };
        let mut transposed = Vec::with_capacity(values.len());
        for column in 0..columns {
            transposed.extend((0..rows).map(|row| values[row * columns + column]));
        }
        self.floats(&name, &[columns, rows], &transposed, self.stored)
    }

    fn take(&mut self, name: &str) -> Result<NamedTensor> {
        self.weights.remove(name).with_context(|| format!("weight {name} is missing or used twice"))
    }

    fn floats(&mut self, name: &str, shape: &[usize], values: &[f32], stored: Stored) -> Result<String> {
        let dims: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        let bytes = stored.encode(name, values)?;
        let mut tensor =
            TensorProto { name: Some(name.to_owned()), ..raw_tensor(data_type(stored), &dims, Bytes::new()) };
        match &mut self.external {
            // Shapes and settings stay where every tool finds them.
            Some(external) if bytes.len() >= PAGE_BYTES => {
                tensor.raw_data = None;
                external.take(&mut tensor, &bytes)?;
            }
            _ => tensor.raw_data = Some(bytes.into()),
        }
        Ok(self.graph.constant(tensor))
    }
}
