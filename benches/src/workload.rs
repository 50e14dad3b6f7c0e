//! What is scored: documents of lognormal lengths; and what it costs: the weights that take part in products.

use std::path::Path;

use anyhow::Context as _;
use prost::Message as _;
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

/// Weights of a model that take part in matrix products.
#[derive(Clone, Copy, Debug)]
pub struct MatrixElements {
    /// Those before the head, which every token meets.
    pub body: u64,
    /// Those of the head, which every scored token meets.
    pub head: u64,
}

/// Counts the weights of the products in `folder`'s model; the head is the last product.
pub fn matrix_elements(folder: &Path) -> anyhow::Result<MatrixElements> {
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
    Ok(MatrixElements { body: products.iter().sum::<u64>() - head, head })
}
