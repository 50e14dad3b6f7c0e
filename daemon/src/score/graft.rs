//! The loss head: rewrites a causal language model so that it returns losses and never whole logits.
//!
//! The graph's last matrix product and what stands between it and `logits` (a bias, a scale, a soft cap, a cast)
//! move into a Loop over blocks of rows (`head.rs`). This file looks for them, and refuses by name what it cannot
//! move. Inputs that only a generating model needs become constants (`inputs.rs`).

use std::collections::{HashMap, HashSet};

use sluice_schemas::onnx::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto, type_proto,
};

use super::constant::{Stored, behind, scalar};
pub use super::graft_error::GraftError;
use super::graft_error::OPSET_MIN;
pub use super::head::HeadOptions;
use super::head::{self, Head, only_reshapes};
use super::inputs;

/// Name of the output that is looked for.
pub(super) const LOGITS: &str = "logits";

/// What was found in a graph and done to it.
#[derive(Debug, Clone)]
pub struct GraftReport {
    /// Opset of the standard domain.
    pub opset: i64,
    /// Name and operator of the head's matrix product.
    pub head: String,
    /// Operators between the head and the logits, in order.
    pub after_head: Vec<String>,
    /// Bound of the logits, where they are capped softly: `cap * tanh(x / cap)`.
    pub soft_cap: Option<f32>,
    /// Number of logits for each token, where the graph says so.
    pub vocabulary: Option<u32>,
    /// Columns of the head's weight, where it can be found.
    pub columns: Option<u32>,
    /// Inputs of the graph that are constants now, with what stands for them.
    pub settled_inputs: Vec<(String, &'static str)>,
}

/// Replaces the `logits` of `model` by losses, and where `options` say so by entropies too; every other output,
/// and what was computed for it alone, goes away.
pub fn graft(model: &mut ModelProto, options: HeadOptions) -> Result<GraftReport, GraftError> {
    let opset = model
        .opset_import
        .iter()
        .find(|import| matches!(import.domain(), "" | "ai.onnx"))
        .map_or(0, OperatorSetIdProto::version);
    let graph = model.graph.as_mut().ok_or(GraftError::NoGraph)?;
    let Some(logits) = graph.output.iter().find(|output| output.name() == LOGITS) else {
        let outputs: Vec<_> = graph.output.iter().map(ValueInfoProto::name).collect();
        return Err(GraftError::NoLogits { outputs: outputs.join(", ") });
    };
    if opset < OPSET_MIN {
        return Err(GraftError::OldOpset { found: opset });
    }
    let declared = last_dimension(logits);
    let by_batch =
        |node: &&NodeProto| matches!(node.op_type(), "DynamicQuantizeLinear" | "DynamicQuantizeMatMul");
    if let Some(node) = graph.node.iter().find(by_batch) {
        let (node, op_type) = (node.name().to_owned(), node.op_type().to_owned());
        return Err(GraftError::QuantizedByBatch { node, op_type });
    }

    let found = find_head(graph)?;
    let head = &graph.node[found.head];
    let weight = head.input.get(1).and_then(|name| behind(graph, name));
    let columns = weight.and_then(|weight| weight_columns(head, weight));
    // The last dimension of single logits may be the length of a row, without one of their own.
    let vocabulary = if columns == Some(1) { columns } else { declared };
    if let (Some(logits), Some(columns)) = (vocabulary, columns)
        && logits != columns
    {
        return Err(refuse(head, "whose columns are not one for each logit"));
    }
    let mut report = GraftReport {
        opset,
        head: format!("{} ({})", head.name(), head.op_type()),
        after_head: found.tail.iter().map(|&node| graph.node[node].op_type().to_owned()).collect(),
        soft_cap: soft_cap(graph, &found),
        vocabulary: vocabulary.or(columns),
        columns,
        settled_inputs: Vec::new(),
    };
    head::replace(graph, &found, vocabulary.or(columns), options);
    report.settled_inputs = inputs::settle(graph)?;
    Ok(report)
}

fn refuse(node: &NodeProto, why: &'static str) -> GraftError {
    GraftError::UnknownHead { node: node.name().to_owned(), op_type: node.op_type().to_owned(), why }
}

fn find_head(graph: &GraphProto) -> Result<Head, GraftError> {
    let producers: HashMap<&str, usize> = graph
        .node
        .iter()
        .enumerate()
        .flat_map(|(index, node)| node.output.iter().map(move |output| (output.as_str(), index)))
        .collect();
    let constants = constants(graph);
    let mut tail = Vec::new();
    let mut value = LOGITS;
    loop {
        let Some(&index) = producers.get(value) else {
            return Err(GraftError::UnknownHead {
                node: value.to_owned(),
                op_type: "input".to_owned(),
                why: "which no node produces",
            });
        };
        let node = &graph.node[index];
        let moving: Vec<&String> = node
            .input
            .iter()
            .filter(|input| !input.is_empty() && !constants.contains(input.as_str()))
            .collect();
        match node.op_type() {
            "MatMul" | "Gemm" | "FusedMatMul" | "MatMulNBits" => {
                if moving.len() != 1 || node.input.first() != moving.first().copied() {
                    return Err(refuse(node, "whose first input alone should change from run to run"));
                }
                if node.attribute.iter().any(|a| a.name() == "transA" && a.i() != 0) {
                    return Err(refuse(node, "which transposes its hidden states"));
                }
                tail.reverse();
                return Ok(Head { head: index, tail });
            }
            // The shape may be computed from that of the input; the values come first.
            op if only_reshapes(op) => match node.input.first() {
                Some(first) if moving.contains(&first) => {
                    tail.push(index);
                    value = first;
                }
                _ => return Err(refuse(node, "which reshapes a constant")),
            },
            "Cast" | "Mul" | "Div" | "Add" | "Sub" | "Tanh" | "Where" | "Clip" => {
                let [carrier] = moving.as_slice() else {
                    return Err(refuse(node, "with several inputs that change from run to run"));
                };
                tail.push(index);
                value = carrier;
            }
            _ => return Err(refuse(node, "which is neither a matrix product nor an elementwise operator")),
        }
    }
}

/// Names of all values that are the same in every run.
fn constants(graph: &GraphProto) -> HashSet<&str> {
    let mut constants: HashSet<&str> = graph.initializer.iter().map(TensorProto::name).collect();
    // Nodes are in topological order, so one pass sees every input before its use.
    for node in &graph.node {
        let all_constant =
            node.input.iter().all(|input| input.is_empty() || constants.contains(input.as_str()));
        let random = node.op_type().starts_with("Random");
        // What a subgraph reads from outside does not show among its node's inputs.
        let nested = node.attribute.iter().any(|attribute| attribute.g.is_some());
        if all_constant && !random && !nested {
            constants.extend(node.output.iter().map(String::as_str));
        }
    }
    constants
}

/// The constant of `Div, Tanh, Mul` (or `Mul, Tanh, Mul`) among the nodes after the head.
fn soft_cap(graph: &GraphProto, found: &Head) -> Option<f32> {
    let tail: Vec<&NodeProto> = found
        .tail
        .iter()
        .map(|&index| &graph.node[index])
        .filter(|node| !only_reshapes(node.op_type()) && node.op_type() != "Cast")
        .collect();
    tail.windows(2).find(|pair| pair[0].op_type() == "Tanh" && pair[1].op_type() == "Mul").and_then(|pair| {
        let tanh = pair[0].output.first()?;
        let cap = pair[1].input.iter().find(|&input| input != tanh)?;
        scalar(graph, cap)
    })
}

fn last_dimension(value: &ValueInfoProto) -> Option<u32> {
    use sluice_schemas::onnx::tensor_shape_proto::dimension::Value::{DimParam, DimValue};
    let Some(type_proto::Value::TensorType(tensor)) = value.r#type.as_ref()?.value.as_ref() else {
        return None;
    };
    match tensor.shape.as_ref()?.dim.last()?.value.as_ref()? {
        DimValue(size) => u32::try_from(*size).ok().filter(|&size| size > 0),
        DimParam(_) => None,
    }
}

/// Number of logits, from the shape of a head's own weights.
fn weight_columns(head: &NodeProto, weight: Stored<'_>) -> Option<u32> {
    let transposed_inside = head.attribute.iter().any(|a| a.name() == "transB" && a.i() != 0);
    let columns =
        match (head.op_type(), weight.tensor.dims.as_slice()) {
            ("MatMul" | "Gemm" | "FusedMatMul", &[rows, columns]) => {
                if weight.transposed == transposed_inside { columns } else { rows }
            }
            _ => return None,
        };
    u32::try_from(columns).ok()
}
