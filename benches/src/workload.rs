//! What is scored: documents of lognormal lengths; and what it costs: the weights that take part in products.

use std::path::Path;

use anyhow::Context as _;
use prost::Message as _;
use serde_json::Value;
use sluice_schemas::onnx::{ModelProto, NodeProto};

/// A seeded lognormal distribution of lengths.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// Median length in tokens.
    pub median: f64,
    /// Standard deviation of the logarithm of a length.
    pub sigma: f64,
    /// Longest document in tokens.
    pub longest: usize,
}

impl Lengths {
    /// `count` documents, their ids below `vocabulary`, the same ones every time.
    pub fn documents(&self, count: usize, vocabulary: u32) -> Vec<Vec<u32>> {
        let mut random = fastrand::Rng::with_seed(17);
        (0..count)
            .map(|_| {
                // Box-Muller.
                let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
                let deviate = radius * (std::f64::consts::TAU * random.f64()).cos();
                let len = (self.median * (self.sigma * deviate).exp()) as usize;
                (0..len.clamp(2, self.longest)).map(|_| random.u32(0..vocabulary)).collect()
            })
            .collect()
    }
}

/// What a model's products cost for each token.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Weights before the head, which every token meets.
    pub body: u64,
    /// Weights of the head, which every scored token meets.
    pub head: u64,
    /// Elements of the queries of one token, in all layers.
    pub queries: u64,
}

impl Cost {
    /// Counts the weights of the products in `folder`'s model, of which the head is the last, and reads the shape of its
    /// attention from `config.json`.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        let (body, head) = weights_of_products(folder).context("cannot count the model's weights")?;
        let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
        let number = |key: &str| config[key].as_u64();
        let width = match (number("head_dim"), number("num_attention_heads")) {
            (Some(width), Some(heads)) => Some(width * heads),
            _ => number("hidden_size"),
        };
        let (width, layers) = (width.context("no width")?, number("num_hidden_layers").context("no layers")?);
        Ok(Self { body, head, queries: width * layers })
    }

    /// Floating-point operations of products with weights: two for each weight and token ("2N").
    pub fn of_weights(self, tokens: usize, scored: usize) -> f64 {
        2.0 * (tokens as f64 * self.body as f64 + scored as f64 * self.head as f64)
    }

    /// Floating-point operations of causal attention over a sequence of `len` tokens, without its weights: two products
    /// (queries with keys, shares with values), two operations for each element of a query and each token that it sees.
    /// The masked half is not counted, as in FlashAttention-2 (arXiv 2307.08691, section 4.1).
    pub fn of_attention(self, len: usize) -> f64 {
        let seen = len as f64 * (len as f64 + 1.0) / 2.0;
        4.0 * self.queries as f64 * seen
    }
}

/// Weights of the products before the head, and of the head.
fn weights_of_products(folder: &Path) -> anyhow::Result<(u64, u64)> {
    let model = ModelProto::decode(std::fs::read(folder.join("model.onnx"))?.as_slice())?;
    let graph = model.graph.context("the file holds no graph")?;
    let size = |name: &str| {
        // A tied head multiplies by a transposition of the embedding.
        let through = graph.node.iter().find(|node| node.output.iter().any(|output| output == name));
        let name = through.and_then(|node| node.input.first()).map_or(name, String::as_str);
        graph.initializer.iter().find(|tensor| tensor.name() == name).map_or(0, |tensor| {
            if tensor.dims.len() == 2 { tensor.dims.iter().product::<i64>() as u64 } else { 0 }
        })
    };
    let is_product = |node: &&NodeProto| matches!(node.op_type(), "MatMul" | "Gemm" | "FusedMatMul");
    let products: Vec<u64> = graph
        .node
        .iter()
        .filter(is_product)
        .filter_map(|node| node.input.get(1))
        .map(|weight| size(weight))
        .collect();
    let head = products.last().copied().context("the model has no matrix product")?;
    Ok((products.iter().sum::<u64>() - head, head))
}
