//! The loss head: rewrites a causal language model so that it returns losses and never whole logits.
//!
//! The graph's last MatMul and what stands between it and `logits` (a bias, a scale, a soft cap, a cast) move into
//! a Loop over blocks of rows, followed by a float32 LogSoftmax and a gather of the target's log-probability:
//!
//! ```text
//! hidden [batch, sequence, width] -> Flatten -> [batch * sequence, width]
//! Loop over blocks of at most 512 of the rows asked for:
//!     Gather rows -> MatMul -> (what stood after it) -> Cast f32 -> LogSoftmax -> GatherElements(targets) -> Neg
//! ```
//!
//! Only the rows asked for pass through the head, so padding costs nothing there, and the memory is that of one
//! block of logits whatever the batch. Weights are never read, only referred to.

use std::collections::{HashMap, HashSet};

use sluice_schemas::graph::{Dim, GraphBuilder, graph_attribute, int_attribute, tensor_info};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto, type_proto,
};

/// Input of flat positions (`row * length + position`) whose next token is scored, int64 `[n]`, `n >= 1`.
pub const ROWS_INPUT: &str = "sluice_rows";
/// Input of the token ids that those positions predict, int64 `[n]`.
pub const TARGETS_INPUT: &str = "sluice_targets";
/// Output of losses in nats, float32 `[n]`.
pub const LOSS_OUTPUT: &str = "sluice_loss";
/// Output of entropies in nats, float32 `[n]`, where they were asked for.
pub const ENTROPY_OUTPUT: &str = "sluice_entropy";

/// Rows of logits that exist at one time.
const BLOCK_ROWS: i64 = 512;
/// First opset in which Squeeze and ReduceSum take their axes as inputs and LogSoftmax works on one axis.
const OPSET_MIN: i64 = 13;
const LOGITS: &str = "logits";

/// Why a graph has no place for a loss head.
#[derive(Debug, thiserror::Error)]
pub enum GraftError {
    /// A file without a graph.
    #[error("the ONNX file holds no graph")]
    NoGraph,
    /// A model that is no language model, or was exported without its head.
    #[error(
        "the graph has no output named `logits` (its outputs: {outputs}); export the model as a causal language model"
    )]
    NoLogits {
        /// The outputs there are.
        outputs: String,
    },
    /// An opset from before the operators that the head is made of.
    #[error("the graph uses opset {found} of the standard domain; export it with opset {OPSET_MIN} or later")]
    OldOpset {
        /// The graph's opset.
        found: i64,
    },
    /// Something between the head and the logits that cannot be moved.
    #[error(
        "cannot graft a loss head: looking back from `logits` for the head's MatMul, met node `{node}` ({op_type}), {why}"
    )]
    UnknownHead {
        /// The node's name.
        node: String,
        /// Its operator.
        op_type: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// What was found in a graph and done to it.
#[derive(Debug, Clone)]
pub struct GraftReport {
    /// Name and operator of the head's matrix product.
    pub head: String,
    /// Operators between the head and the logits, in order.
    pub after_head: Vec<String>,
    /// Number of logits for each token, where the graph says so.
    pub vocabulary: Option<u32>,
    /// Element type of the head's weights, where the graph says so.
    pub weight_type: Option<DataType>,
}

/// Replaces the `logits` of `model` by losses, and where `entropies` says so by entropies too; every other output
/// goes away.
pub fn graft(model: &mut ModelProto, entropies: bool) -> Result<GraftReport, GraftError> {
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
    let vocabulary = last_dimension(logits);

    let found = find_head(graph)?;
    let head = &graph.node[found.head];
    let weight = head.input.get(1).and_then(|name| behind(graph, name));
    let report = GraftReport {
        head: format!("{} ({})", head.name(), head.op_type()),
        after_head: found.tail.iter().map(|&node| graph.node[node].op_type().to_owned()).collect(),
        vocabulary: vocabulary.or_else(|| weight_columns(head, weight)),
        weight_type: weight.and_then(|tensor| DataType::try_from(tensor.data_type()).ok()),
    };
    replace(graph, &found, entropies);
    Ok(report)
}

/// Indices of the nodes that make logits of hidden states.
struct Head {
    head: usize,
    /// The nodes after it, in order, each with the input that carries the logits.
    tail: Vec<usize>,
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
        let refuse = |why| GraftError::UnknownHead {
            node: node.name().to_owned(),
            op_type: node.op_type().to_owned(),
            why,
        };
        let moving: Vec<&String> = node
            .input
            .iter()
            .filter(|input| !input.is_empty() && !constants.contains(input.as_str()))
            .collect();
        match node.op_type() {
            "MatMul" | "Gemm" | "FusedMatMul" | "MatMulNBits" => {
                if moving.len() != 1 || node.input.first() != moving.first().copied() {
                    return Err(refuse("whose first input alone should change from run to run"));
                }
                if node.attribute.iter().any(|a| a.name() == "transA" && a.i() != 0) {
                    return Err(refuse("which transposes its hidden states"));
                }
                tail.reverse();
                return Ok(Head { head: index, tail });
            }
            "Cast" | "Identity" | "Mul" | "Div" | "Add" | "Sub" | "Tanh" => {
                let [carrier] = moving.as_slice() else {
                    return Err(refuse("with several inputs that change from run to run"));
                };
                tail.push(index);
                value = carrier;
            }
            _ => return Err(refuse("which is neither a matrix product nor an elementwise operator")),
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
        if all_constant && !random {
            constants.extend(node.output.iter().map(String::as_str));
        }
    }
    constants
}

/// The stored tensor from which the constant `name` is made, such as the embedding that a tied head transposes.
fn behind<'a>(graph: &'a GraphProto, name: &str) -> Option<&'a TensorProto> {
    let mut name = name;
    // Bounded: a chain cannot be longer than the graph.
    for _ in 0..=graph.node.len() {
        if let Some(tensor) = graph.initializer.iter().find(|tensor| tensor.name() == name) {
            return Some(tensor);
        }
        let node = graph.node.iter().find(|node| node.output.iter().any(|output| output == name))?;
        if node.op_type() == "Constant" {
            return node.attribute.iter().find_map(|attribute| attribute.t.as_ref());
        }
        name = node.input.first()?;
    }
    None
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
fn weight_columns(head: &NodeProto, weight: Option<&TensorProto>) -> Option<u32> {
    let weight = weight?;
    let stored_as_given = head.input.get(1).is_some_and(|name| name == weight.name());
    let transposed = head.attribute.iter().any(|a| a.name() == "transB" && a.i() != 0);
    let columns = match (head.op_type(), weight.dims.as_slice()) {
        ("MatMul" | "Gemm" | "FusedMatMul", &[rows, columns]) => {
            // A transposition on the way to the product, or in it, swaps the two.
            if stored_as_given == transposed { rows } else { columns }
        }
        _ => return None,
    };
    u32::try_from(columns).ok()
}

fn replace(graph: &mut GraphProto, found: &Head, entropies: bool) {
    let head = graph.node[found.head].clone();
    let tail: Vec<NodeProto> = found.tail.iter().map(|&index| graph.node[index].clone()).collect();
    let hidden = head.input[0].clone();

    let mut main = GraphBuilder::new("sluice/");
    let zero = main.ints(&[0]);
    let one = main.ints(&[1]);
    let block_max = main.ints(&[BLOCK_ROWS]);
    let minus_one = main.ints(&[-1]);
    let flat = main.node("Flatten", &[&hidden], vec![int_attribute("axis", -1)]);
    let count = main.node("Shape", &[ROWS_INPUT], vec![]);
    // Blocks of nearly equal size: ceil(count / ceil(count / 512)).
    let blocks = ceil_div(&mut main, &count, &block_max, &one);
    let block = ceil_div(&mut main, &count, &blocks, &one);
    let trip_count = main.node("Squeeze", &[&blocks], vec![]);
    let block_scalar = main.node("Squeeze", &[&block], vec![]);
    let (start, step) = (main.int(0), main.int(1));
    let offsets = main.node("Range", &[&start, &block_scalar, &step], vec![]);
    let last = main.node("Sub", &[&count, &one], vec![]);

    let body = loop_body(&head, &tail, &Outer { flat, block, offsets, last, one: one.clone() }, entropies);
    let mut outputs = vec![LOSS_OUTPUT];
    if entropies {
        outputs.push(ENTROPY_OUTPUT);
    }
    main.push(NodeProto {
        name: Some("sluice/Loop".to_owned()),
        op_type: Some("Loop".to_owned()),
        input: vec![trip_count, String::new()],
        output: outputs.iter().map(|output| format!("sluice/blocks/{output}")).collect(),
        attribute: vec![graph_attribute("body", body)],
        ..Default::default()
    });
    for output in &outputs {
        // The last block may repeat its last row to be as long as the others.
        let joined = main.node("Reshape", &[&format!("sluice/blocks/{output}"), &minus_one], vec![]);
        main.node_to("Slice", &[&joined, &zero, &count], vec![], output);
    }

    let removed: HashSet<usize> = found.tail.iter().copied().chain([found.head]).collect();
    let mut index = 0;
    graph.node.retain(|_| {
        index += 1;
        !removed.contains(&(index - 1))
    });
    let (nodes, initializers) = main.finish();
    graph.node.extend(nodes);
    graph.initializer.extend(initializers);
    let asked = [Dim::Named("sluice_n")];
    graph.input.extend([ROWS_INPUT, TARGETS_INPUT].map(|name| tensor_info(name, DataType::Int64, &asked)));
    graph.output = outputs.iter().map(|output| tensor_info(output, DataType::Float, &asked)).collect();
}

fn ceil_div(graph: &mut GraphBuilder, numerator: &str, denominator: &str, one: &str) -> String {
    let sum = graph.node("Add", &[numerator, denominator], vec![]);
    let sum = graph.node("Sub", &[&sum, one], vec![]);
    graph.node("Div", &[&sum, denominator], vec![])
}

/// Values of the main graph that the Loop's body reads.
struct Outer {
    flat: String,
    block: String,
    offsets: String,
    last: String,
    one: String,
}

fn loop_body(head: &NodeProto, tail: &[NodeProto], outer: &Outer, entropies: bool) -> GraphProto {
    let mut body = GraphBuilder::new("sluice/body/");
    let start = body.node("Mul", &["sluice/body/iteration", &outer.block], vec![]);
    let index = body.node("Add", &[&outer.offsets, &start], vec![]);
    let index = body.node("Min", &[&index, &outer.last], vec![]);
    let rows = body.node("Gather", &[ROWS_INPUT, &index], vec![]);
    let targets = body.node("Gather", &[TARGETS_INPUT, &index], vec![]);
    let mut hidden = body.node("Gather", &[&outer.flat, &rows], vec![]);
    if head.op_type() != "Gemm" {
        // A batch of one sequence, so that what follows meets the rank it was made for.
        let zero = body.ints(&[0]);
        hidden = body.node("Unsqueeze", &[&hidden, &zero], vec![]);
    }
    let mut value = hidden;
    let mut carried = head.input[0].clone();
    for node in [head].into_iter().chain(tail) {
        let output = format!("sluice/body/{}", node.output[0]);
        let mut moved = node.clone();
        for input in moved.input.iter_mut().filter(|input| **input == carried) {
            input.clone_from(&value);
        }
        carried.clone_from(&node.output[0]);
        moved.output = vec![output.clone()];
        body.push(moved);
        value = output;
    }
    let logits = body.node("Flatten", &[&value], vec![int_attribute("axis", -1)]);
    let logits =
        body.node("Cast", &[&logits], vec![int_attribute("to", i64::from(i32::from(DataType::Float)))]);
    let log_probabilities = body.node("LogSoftmax", &[&logits], vec![int_attribute("axis", -1)]);
    let targets = body.node("Unsqueeze", &[&targets, &outer.one], vec![]);
    let chosen = body.node("GatherElements", &[&log_probabilities, &targets], vec![int_attribute("axis", 1)]);
    let chosen = body.node("Squeeze", &[&chosen, &outer.one], vec![]);
    let loss = body.node("Neg", &[&chosen], vec![]);
    let condition = body.node("Identity", &["sluice/body/condition"], vec![]);

    let mut output = vec![
        tensor_info(&condition, DataType::Bool, &[]),
        tensor_info(&loss, DataType::Float, &[Dim::Named("sluice_block")]),
    ];
    if entropies {
        let probabilities = body.node("Exp", &[&log_probabilities], vec![]);
        let terms = body.node("Mul", &[&probabilities, &log_probabilities], vec![]);
        let sum = body.node("ReduceSum", &[&terms, &outer.one], vec![int_attribute("keepdims", 0)]);
        let entropy = body.node("Neg", &[&sum], vec![]);
        output.push(tensor_info(&entropy, DataType::Float, &[Dim::Named("sluice_block")]));
    }
    let (node, initializer) = body.finish();
    GraphProto {
        name: Some("sluice_loss_head".to_owned()),
        node,
        initializer,
        input: vec![
            tensor_info("sluice/body/iteration", DataType::Int64, &[]),
            tensor_info("sluice/body/condition", DataType::Bool, &[]),
        ],
        output,
        ..Default::default()
    }
}
