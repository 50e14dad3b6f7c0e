//! A checkpoint as an ONNX model, in a Hugging Face style folder that the daemon can score with.
//!
//! Standard operators of opset 17 in single precision, from `input_ids` alone: positions and the causal mask come
//! from the input's shape, so padding on the right changes no real token. Norms are spelled the way ONNX Runtime's
//! optimizer recognises them.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use prost::Message;
use sluice_schemas::graph::{Dim, GraphBuilder, int_attribute, ints_attribute, raw_tensor, tensor_info};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{GraphProto, ModelProto, OperatorSetIdProto};

use crate::failure::Classify;
use crate::model::ModelConfig;
use crate::model::checkpoint::read_weights;
use crate::model::config::CONFIG_FILE;
use crate::model::decoder::rotary_tables;
use crate::run::files::write_whole;
use crate::run::tensors::NamedTensor;
use crate::text::TOKENIZER_FILE;
use crate::training::learner::WEIGHTS_FILE;

/// File name of the exported graph and its weights.
pub const MODEL_FILE: &str = "model.onnx";
/// Input: token ids, int64 `[batch, sequence]`.
pub const INPUT: &str = "input_ids";
/// Output: f32 `[batch, sequence, vocab]`; position `i` predicts token `i + 1`.
pub const OUTPUT: &str = "logits";

const IR_VERSION: i64 = 8;
const OPSET: i64 = 17;
/// Protobuf messages end at 2 GiB; the margin is for all that is not weights.
const MODEL_BYTES_MAX: usize = (1 << 31) - (1 << 20);

/// Writes `model.onnx` and `config.json` into `out_folder` (made if missing) from the `model.safetensors` and
/// `config.json` of `checkpoint_folder`, and copies its `tokenizer.json` if there is one.
pub fn export_onnx(checkpoint_folder: &Path, out_folder: &Path) -> Result<()> {
    let config = ModelConfig::read(checkpoint_folder).or_data()?;
    let weights = read_weights(checkpoint_folder, &config).or_data()?;
    let bytes = size_of::<f32>() * weights.iter().map(|weight| weight.values.len()).sum::<usize>();
    ensure!(
        bytes <= MODEL_BYTES_MAX,
        "the weights in {} take {bytes} bytes, but one ONNX file holds at most 2 GiB: export such a model with \
         external data, for example with Hugging Face's optimum",
        checkpoint_folder.display()
    );
    let model = onnx_model(&config, weights)
        .with_context(|| format!("cannot export {}", checkpoint_folder.join(WEIGHTS_FILE).display()))?;
    fs::create_dir_all(out_folder).with_context(|| format!("cannot make folder {}", out_folder.display()))?;
    write_whole(&out_folder.join(MODEL_FILE), &model.encode_to_vec())?;
    write_whole(&out_folder.join(CONFIG_FILE), config.to_hugging_face().as_bytes())?;
    let tokenizer = checkpoint_folder.join(TOKENIZER_FILE);
    match fs::read(&tokenizer) {
        Ok(bytes) => write_whole(&out_folder.join(TOKENIZER_FILE), &bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", tokenizer.display())),
    }
}

/// The decoder as an ONNX model.
fn onnx_model(config: &ModelConfig, weights: Vec<NamedTensor>) -> Result<ModelProto> {
    let weights = weights.into_iter().map(|weight| (weight.name.clone(), weight)).collect();
    let mut exporter = Exporter { config, weights, graph: GraphBuilder::new("") };
    exporter.decoder()?;
    if let Some(name) = exporter.weights.keys().min() {
        bail!("weight {name} is not part of this model: use the config.json that belongs to the weights");
    }
    let (node, initializer) = exporter.graph.finish();
    let (batch, sequence) = (Dim::Named("batch"), Dim::Named("sequence"));
    let vocab = Dim::Fixed(config.vocab_size as i64);
    let graph = GraphProto {
        name: Some("llama".to_owned()),
        node,
        initializer,
        input: vec![tensor_info(INPUT, DataType::Int64, &[batch, sequence])],
        output: vec![tensor_info(OUTPUT, DataType::Float, &[batch, sequence, vocab])],
        ..Default::default()
    };
    Ok(ModelProto {
        ir_version: Some(IR_VERSION),
        opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(OPSET) }],
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
    graph: GraphBuilder,
}

/// Values that every layer uses.
struct Shared {
    /// Cosines and sines of the sequence's positions, `[sequence, head_dim / 2]`.
    cosine: String,
    sine: String,
    /// Zero where a position may look and minus infinity where it must not, `[sequence, sequence]`.
    mask: String,
    eps: String,
    two: String,
    scale: String,
    /// Where the halves of a head begin and end, and the axis they lie on.
    halves: [String; 3],
    last_axis: String,
}

impl Exporter<'_> {
    fn decoder(&mut self) -> Result<()> {
        let shared = self.shared();
        let embedding = self.weight("model.embed_tokens.weight")?;
        let mut x = self.op("Gather", &[&embedding, INPUT]);
        for layer in 0..self.config.layers {
            let prefix = format!("model.layers.{layer}");
            let normed = self.rms_norm(&x, &format!("{prefix}.input_layernorm.weight"), &shared)?;
            let attended = self.attention(&normed, &format!("{prefix}.self_attn"), &shared)?;
            x = self.op("Add", &[&x, &attended]);
            let normed = self.rms_norm(&x, &format!("{prefix}.post_attention_layernorm.weight"), &shared)?;
            let output = self.mlp(&normed, &format!("{prefix}.mlp"))?;
            x = self.op("Add", &[&x, &output]);
        }
        let normed = self.rms_norm(&x, "model.norm.weight", &shared)?;
        let head = if self.config.tie_word_embeddings {
            self.transpose(&embedding, &[1, 0])
        } else {
            self.transposed_weight("lm_head.weight")?
        };
        self.graph.node_to("MatMul", &[&normed, &head], vec![], OUTPUT);
        Ok(())
    }

    fn shared(&mut self) -> Shared {
        let shape = self.op("Shape", &[INPUT]);
        let (zero, one) = (self.graph.ints(&[0]), self.graph.ints(&[1]));
        let length = self.op("Gather", &[&shape, &one]);
        let (cosine, sine) = rotary_tables(self.config);
        let table = [self.config.max_position_embeddings, self.config.head_dim() / 2];
        let mut angles = |name: &str, values: Vec<f32>| {
            let table = self.floats(name, &table, &values);
            self.op("Slice", &[&table, &zero, &length, &zero])
        };
        let (cosine, sine) = (angles("rotary_cosine", cosine), angles("rotary_sine", sine));
        let minus_infinity = self.floats("minus_infinity", &[], &[f32::NEG_INFINITY]);
        let square = self.graph.node("Concat", &[&length, &length], vec![int_attribute("axis", 0)]);
        let nowhere = self.op("Expand", &[&minus_infinity, &square]);
        let diagonal = self.graph.int(1);
        let mask = self.graph.node("Trilu", &[&nowhere, &diagonal], vec![int_attribute("upper", 1)]);
        let eps = self.floats("rms_norm_eps", &[], &[self.config.rms_norm_eps as f32]);
        let two = self.floats("two", &[], &[2.0]);
        let scale = 1.0 / (self.config.head_dim() as f64).sqrt();
        let scale = self.floats("attention_scale", &[], &[scale as f32]);
        let half = (self.config.head_dim() / 2) as i64;
        let halves = [0, half, 2 * half].map(|bound| self.graph.ints(&[bound]));
        let last_axis = self.graph.ints(&[-1]);
        Shared { cosine, sine, mask, eps, two, scale, halves, last_axis }
    }

    /// `x / sqrt(mean(x^2) + eps) * weight`.
    fn rms_norm(&mut self, x: &str, weight: &str, shared: &Shared) -> Result<String> {
        let square = self.op("Pow", &[x, &shared.two]);
        let mean = self.graph.node("ReduceMean", &[&square], vec![ints_attribute("axes", &[-1])]);
        let mean = self.op("Add", &[&mean, &shared.eps]);
        let root = self.op("Sqrt", &[&mean]);
        let normed = self.op("Div", &[x, &root]);
        let weight = self.weight(weight)?;
        Ok(self.op("Mul", &[&normed, &weight]))
    }

    fn attention(&mut self, x: &str, prefix: &str, shared: &Shared) -> Result<String> {
        let ModelConfig { heads, kv_heads, .. } = *self.config;
        let query = self.linear(x, &format!("{prefix}.q_proj.weight"))?;
        let query = self.split_heads(&query, heads);
        let query = self.rotate(&query, shared);
        let mut query = self.op("Mul", &[&query, &shared.scale]);
        let key = self.linear(x, &format!("{prefix}.k_proj.weight"))?;
        let key = self.split_heads(&key, kv_heads);
        let mut key = self.rotate(&key, shared);
        let value = self.linear(x, &format!("{prefix}.v_proj.weight"))?;
        let mut value = self.split_heads(&value, kv_heads);
        let grouped = kv_heads < heads;
        if grouped {
            // [batch, kv_heads, heads / kv_heads, sequence, head_dim] against a key for each kv head.
            let shares = (heads / kv_heads) as i64;
            query = self.reshape(&query, &[0, kv_heads as i64, shares, -1, self.config.head_dim() as i64]);
            let axis = self.graph.ints(&[2]);
            key = self.op("Unsqueeze", &[&key, &axis]);
            value = self.op("Unsqueeze", &[&value, &axis]);
        }
        let key = self.transpose(&key, if grouped { &[0, 1, 2, 4, 3] } else { &[0, 1, 3, 2] });
        let scores = self.op("MatMul", &[&query, &key]);
        let scores = self.op("Add", &[&scores, &shared.mask]);
        let probabilities = self.graph.node("Softmax", &[&scores], vec![int_attribute("axis", -1)]);
        let mut attended = self.op("MatMul", &[&probabilities, &value]);
        if grouped {
            attended = self.reshape(&attended, &[0, heads as i64, -1, self.config.head_dim() as i64]);
        }
        let attended = self.transpose(&attended, &[0, 2, 1, 3]);
        let attended = self.reshape(&attended, &[0, 0, self.config.hidden_size as i64]);
        self.linear(&attended, &format!("{prefix}.o_proj.weight"))
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
        Ok(self.floats(&name, &shape, &values))
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
        Ok(self.floats(&name, &[columns, rows], &transposed))
    }

    fn take(&mut self, name: &str) -> Result<NamedTensor> {
        self.weights.remove(name).with_context(|| format!("weight {name} is missing or used twice"))
    }

    fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) -> String {
        let dims: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut tensor = raw_tensor(DataType::Float, &dims, Bytes::from(raw));
        tensor.name = Some(name.to_owned());
        self.graph.constant(tensor)
    }
}
