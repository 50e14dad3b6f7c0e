//! The attention graft: attention that a graph spells out (products, mask, `Softmax`) becomes one operator, for which ONNX
//! Runtime has a fused kernel and which keeps no `[length, length]` scores.
//!
//! `find.rs` recognises a layer by its structure, `excerpt.rs` cuts it out, `trial.rs` runs it beside the operator, and only
//! where both agree is it replaced. Its rotary embedding, biases and norms stand before it and stay as they are.

mod dims;
mod excerpt;
mod find;
mod index;
mod operator;
mod shapes;
mod trial;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use sluice_schemas::graph::GraphBuilder;
use sluice_schemas::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto};

use super::claims::{Bound, LayerFacts};
use super::head::{prune, reads};
use crate::device::Device;
use find::{Spelled, Unknown};
use index::Index;
pub use operator::Operator;
use operator::{Lengths, build};
use shapes::Shapes;
use trial::{Bench, admit, differs};

/// Operators that are attention already.
const FUSED: [&str; 5] =
    ["Attention", "GroupQueryAttention", "MultiHeadAttention", "PagedAttention", "SparseAttention"];

/// What became of a model's attention.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionReport {
    /// Operators that attention was already, as the model was exported, and how many there are of each.
    pub exported: BTreeMap<String, usize>,
    /// Operators that took the place of attention that was spelled out, and how many there are of each.
    pub fused: BTreeMap<&'static str, usize>,
    /// Layers that stay spelled out, those with the same reason together.
    pub left: Vec<Left>,
    /// What is known of each layer.
    pub(super) layers: Vec<LayerFacts>,
}

/// Layers whose attention stays spelled out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// The layers, counted from 0 in the order of the graph's `Softmax` nodes.
    pub layers: Vec<usize>,
    /// The first layer's node at which recognising ended.
    pub node: String,
    /// What about it is not what one operator computes.
    pub why: String,
}

/// What the graft is given beside the graph.
#[derive(Clone, Copy, Debug)]
pub(super) struct Surroundings<'a> {
    /// Path of ONNX Runtime's library, in which trials run on the CPU.
    pub(super) library: &'a Path,
    /// Folder of the model's external data.
    pub(super) data_folder: Option<&'a Path>,
    /// Longest sequence that the model was made for.
    pub(super) context_max: Option<u32>,
    /// Where the model is to run.
    pub(super) device: Device,
    /// Names of the inputs that became constants.
    pub(super) settled: &'a [(String, &'static str)],
}

/// Replaces attention that is spelled out in `model`. Fails where ONNX Runtime cannot be had.
pub(super) fn fuse(model: &mut ModelProto, around: Surroundings<'_>) -> anyhow::Result<AttentionReport> {
    let bench = Bench {
        library: around.library,
        data_folder: around.data_folder,
        context_max: around.context_max,
        ir_version: model.ir_version,
        opsets: model.opset_import.clone(),
    };
    let Some(graph) = model.graph.as_mut() else { return Ok(AttentionReport::default()) };
    let mut report = AttentionReport { exported: exported(graph), ..Default::default() };
    let attention = graph.node.iter().filter(|node| FUSED.contains(&node.op_type()));
    report.layers = attention.map(facts).collect();
    let mut fused = Vec::new();
    {
        let index = Index::new(graph);
        let shapes = Shapes::of(&index);
        let settled: HashSet<String> = around.settled.iter().map(|(name, _)| name.clone()).collect();
        let softmaxes = graph.node.iter().filter(|node| node.op_type() == "Softmax");
        for (layer, softmax) in softmaxes.enumerate() {
            let unknown = match find::around(&index, &shapes, &settled, softmax) {
                Err(unknown) => unknown_of(&unknown),
                Ok(spelled) => {
                    let operator = Operator::on(around.device, spelled.element);
                    let why = match can_admit(&bench, operator) {
                        Err(why) => Some(why.to_owned()),
                        Ok(()) => match excerpt::excerpt(&index, &shapes, &spelled) {
                            Err(why) => Some(why.to_owned()),
                            Ok(excerpt) => differs(&bench, &excerpt, &spelled, operator)?,
                        },
                    };
                    match why {
                        None => {
                            report.layers.push(LayerFacts {
                                window: Bound::Without,
                                soft_cap: spelled.soft_cap.into(),
                                biased: Some(false),
                            });
                            fused.push((operator, spelled));
                            continue;
                        }
                        Some(why) => (softmax.name().to_owned(), why),
                    }
                }
            };
            report.layers.push(LayerFacts::default());
            leave(&mut report.left, layer, unknown);
        }
    }
    for (operator, _) in &fused {
        *report.fused.entry(operator.name()).or_default() += 1;
    }
    replace(graph, &fused);
    for (operator, _) in &fused {
        admit(model, *operator);
    }
    Ok(report)
}

fn exported(graph: &GraphProto) -> BTreeMap<String, usize> {
    let mut exported = BTreeMap::new();
    for node in graph.node.iter().filter(|node| FUSED.contains(&node.op_type())) {
        *exported.entry(node.op_type().to_owned()).or_default() += 1;
    }
    exported
}

/// What the attributes and inputs of an operator say. Only `GroupQueryAttention` is causal by itself; what others are given
/// as a mask is not looked into.
fn facts(node: &NodeProto) -> LayerFacts {
    const BIAS: usize = 10;
    if node.op_type() != "GroupQueryAttention" {
        return LayerFacts::default();
    }
    let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name() == name);
    let window = attribute("local_window_size").map(AttributeProto::i).filter(|&window| window > 0);
    let soft_cap = attribute("softcap").map(|of| f64::from(of.f())).filter(|&cap| cap > 0.0);
    let biased = node.input.get(BIAS).is_some_and(|bias| !bias.is_empty());
    LayerFacts { window: window.into(), soft_cap: soft_cap.into(), biased: Some(biased) }
}

fn unknown_of(unknown: &Unknown) -> (String, String) {
    (unknown.node.clone(), unknown.why.to_owned())
}

/// Whether a model of these operator sets may hold `operator`. From opset 18 on, no operator of a language model changed what
/// it computes, so a graph may be said to be of a later one.
fn can_admit(bench: &Bench<'_>, operator: Operator) -> Result<(), &'static str> {
    const OPSET_MIN: i64 = 18;
    let standard = bench.opsets.iter().find(|import| matches!(import.domain(), "" | "ai.onnx"));
    let opset = standard.map_or(0, OperatorSetIdProto::version);
    if operator == Operator::Standard && opset < OPSET_MIN {
        return Err(
            "is of 32 bits in a graph of an opset before 18, which cannot hold the operator for that",
        );
    }
    Ok(())
}

fn leave(left: &mut Vec<Left>, layer: usize, (node, why): (String, String)) {
    match left.iter_mut().find(|left| left.why == why) {
        Some(left) => left.layers.push(layer),
        None => left.push(Left { layers: vec![layer], node, why }),
    }
}

/// Puts the operators where the products with the values were; what only served those goes away.
fn replace(graph: &mut GraphProto, fused: &[(Operator, Spelled)]) {
    if fused.is_empty() {
        return;
    }
    let mut first = GraphBuilder::new("sluice/attention/");
    let lengths = Lengths::new(&mut first);
    let (nodes, initializers) = first.finish();
    graph.initializer.extend(initializers);
    let mut rewritten = nodes;
    for node in std::mem::take(&mut graph.node) {
        let at = fused.iter().position(|(_, spelled)| node.output.first() == Some(&spelled.output));
        let Some(layer) = at else {
            rewritten.push(node);
            continue;
        };
        let (operator, spelled) = &fused[layer];
        let mut builder = GraphBuilder::new(&format!("sluice/attention/{layer}/"));
        build(&mut builder, *operator, spelled, &lengths, &spelled.output);
        let (nodes, initializers) = builder.finish();
        rewritten.extend(nodes);
        graph.initializer.extend(initializers);
    }
    graph.node = rewritten;
    prune(graph);
    graph.value_info.clear();
    let mut read = Vec::new();
    graph.node.iter().for_each(|node| reads(node, &mut read));
    let read: HashSet<String> = read.into_iter().map(str::to_owned).collect();
    graph.input.retain(|input| read.contains(input.name()));
}
