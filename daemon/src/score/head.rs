//! Building the loss head: the graph's own matrix product and what follows it, in a Loop over blocks of rows; without the
//! Loop where no batch asks for more rows than one block has.
//!
//! ```text
//! hidden [batch, sequence, width] -> Flatten -> [batch * sequence, width]
//! Loop over blocks of the rows asked for:
//!     Gather rows -> MatMul -> (what stood after it) -> Cast f32 -> LogSoftmax -> GatherElements(targets) -> Neg
//! ```
//!
//! The cast stays: no operator of ONNX Runtime's inference builds takes 16-bit logits and gives losses of 32 (ADR 49).
//!
//! Only the rows asked for pass through the head, so padding costs nothing there, and the memory is that of one
//! block of logits whatever the batch. Weights are never read, only referred to.

use std::collections::{HashMap, HashSet};

use sluice_schemas::graph::{
    Dim, GraphBuilder, graph_attribute, int_attribute, raw_tensor, tensor_attribute, tensor_info,
};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{GraphProto, NodeProto};

use super::names::{ENTROPY_OUTPUT, LOSS_OUTPUT, POSITIONS_OUTPUT, ROWS_INPUT, TARGETS_INPUT};
use crate::device::Device;

/// Rows of logits that exist at one time on a CPU: few enough for its caches.
const BLOCK_ROWS: i64 = 512;
/// What a block may take on a GPU, where each one is some fifteen kernels to start.
const BLOCK_BYTES_GPU: i64 = 2 << 30;
/// Of a block, for each logit: the product in 16 bits, the same in 32, and their logarithms of probabilities.
const BYTES_A_LOGIT: i64 = 2 + 4 + 4;

/// Rows of a block on `device`, for so many logits a row where that is known.
fn block_rows(device: Device, vocabulary: Option<u32>) -> i64 {
    match (device, vocabulary) {
        (Device::Cpu, _) | (_, None | Some(0)) => BLOCK_ROWS,
        (_, Some(logits)) => {
            (BLOCK_BYTES_GPU / (BYTES_A_LOGIT * i64::from(logits))).clamp(BLOCK_ROWS, 1 << 16)
        }
    }
}

/// Indices of the nodes that make logits of hidden states.
pub(super) struct Head {
    /// The matrix product.
    pub(super) head: usize,
    /// The nodes after it, in order.
    pub(super) tail: Vec<usize>,
}

/// Whether a node changes the shape of the logits and nothing else, so that a head that flattens them needs none.
pub(super) fn only_reshapes(op_type: &str) -> bool {
    matches!(op_type, "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Identity")
}

/// What the loss head is made for.
#[derive(Clone, Copy, Debug)]
pub struct HeadOptions {
    /// Where the model runs, which decides how many rows of logits exist at one time.
    pub device: Device,
    /// Whether entropies are asked for beside losses.
    pub entropies: bool,
    /// Most rows that are asked for at once; where they are one block there is no loop. Without it there always is.
    pub rows_max: Option<usize>,
}

impl HeadOptions {
    /// Losses alone, of any number of rows.
    pub fn losses(device: Device) -> Self {
        Self { device, entropies: false, rows_max: None }
    }
}

/// Puts the loss head in the place of `found`; a row has `vocabulary` logits, where that is known.
pub(super) fn replace(graph: &mut GraphProto, found: &Head, vocabulary: Option<u32>, options: HeadOptions) {
    let HeadOptions { device, entropies, rows_max } = options;
    let head = graph.node[found.head].clone();
    let tail: Vec<NodeProto> = found.tail.iter().map(|&index| graph.node[index].clone()).collect();
    let hidden = head.input[0].clone();

    let mut main = GraphBuilder::new("sluice/");
    let zero = main.ints(&[0]);
    let one = main.ints(&[1]);
    let flat = main.node("Flatten", &[&hidden], vec![int_attribute("axis", -1)]);
    // How many positions there are hidden states of: fewer than tokens, where the model was exported to generate.
    let flat_shape = main.node("Shape", &[&flat], vec![]);
    main.node_to("Gather", &[&flat_shape, &zero], vec![], POSITIONS_OUTPUT);
    // What lies beyond the end would fail on the CPU and be zeros on a GPU; so it is neither, and the count tells.
    let last_position = main.node("Sub", &[POSITIONS_OUTPUT, &one], vec![]);
    let rows = main.node("Min", &[ROWS_INPUT, &last_position], vec![]);
    let mut outputs = vec![LOSS_OUTPUT];
    if entropies {
        outputs.push(ENTROPY_OUTPUT);
    }
    let what = (entropies, vocabulary == Some(1));
    let asked = Asked { flat: &flat, rows: &rows, targets: TARGETS_INPUT, one: &one };
    let block = block_rows(device, vocabulary);
    if rows_max.is_some_and(|rows| rows as i64 <= block) {
        let values = block_outputs(&mut main, &head, &tail, &asked, what);
        for (value, output) in values.iter().zip(&outputs) {
            main.node_to("Identity", &[value], vec![], output);
        }
    } else {
        loop_over_blocks(&mut main, &asked, block, &outputs, |outer| loop_body(&head, &tail, outer, what));
    }
    let (nodes, initializers) = main.finish();
    graph.node.extend(nodes);
    graph.initializer.extend(initializers);
    let asked = [Dim::Named("sluice_n")];
    graph.input.extend([ROWS_INPUT, TARGETS_INPUT].map(|name| tensor_info(name, DataType::Int64, &asked)));
    graph.output = outputs.iter().map(|output| tensor_info(output, DataType::Float, &asked)).collect();
    graph.output.push(tensor_info(POSITIONS_OUTPUT, DataType::Int64, &[Dim::Fixed(1)]));
    prune(graph);
}

/// Removes the nodes that no output needs any more: the head that moved, and what was computed for outputs that went
/// away, such as a cache of keys and values.
pub(super) fn prune(graph: &mut GraphProto) {
    let producers: HashMap<&str, usize> = graph
        .node
        .iter()
        .enumerate()
        .flat_map(|(index, node)| node.output.iter().map(move |output| (output.as_str(), index)))
        .collect();
    let mut needed = vec![false; graph.node.len()];
    let mut open: Vec<&str> = graph.output.iter().map(sluice_schemas::onnx::ValueInfoProto::name).collect();
    while let Some(value) = open.pop() {
        if let Some(&index) = producers.get(value)
            && !std::mem::replace(&mut needed[index], true)
        {
            reads(&graph.node[index], &mut open);
        }
    }
    let mut keep = needed.iter();
    graph.node.retain(|_| keep.next().is_some_and(|&needed| needed));
    let made: HashSet<&str> = graph.node.iter().flat_map(|node| &node.output).map(String::as_str).collect();
    graph.value_info.retain(|value| made.contains(value.name()));
}

/// Adds the names of all values that `node` reads, those that its subgraphs read from outside included.
pub(super) fn reads<'a>(node: &'a NodeProto, names: &mut Vec<&'a str>) {
    names.extend(node.input.iter().map(String::as_str));
    for graph in node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()) {
        for inner in &graph.node {
            reads(inner, names);
        }
        // A subgraph may hand out a value of the graph around it.
        names.extend(graph.output.iter().map(sluice_schemas::onnx::ValueInfoProto::name));
    }
}

fn ceil_div(graph: &mut GraphBuilder, numerator: &str, denominator: &str, one: &str) -> String {
    let sum = graph.node("Add", &[numerator, denominator], vec![]);
    let sum = graph.node("Sub", &[&sum, one], vec![]);
    graph.node("Div", &[&sum, denominator], vec![])
}

/// Adds a Loop over blocks of at most `block_max` rows, and joins what it gives into `outputs`.
fn loop_over_blocks(
    main: &mut GraphBuilder,
    asked: &Asked,
    block_max: i64,
    outputs: &[&str],
    body: impl FnOnce(&Outer) -> GraphProto,
) {
    let (zero, minus_one, block_max) = (main.ints(&[0]), main.ints(&[-1]), main.ints(&[block_max]));
    let count = main.node("Shape", &[asked.rows], vec![]);
    // Blocks of nearly equal size: ceil(count / ceil(count / largest)).
    let blocks = ceil_div(main, &count, &block_max, asked.one);
    let block = ceil_div(main, &count, &blocks, asked.one);
    let trip_count = main.node("Squeeze", &[&blocks], vec![]);
    let block_scalar = main.node("Squeeze", &[&block], vec![]);
    let (start, step) = (main.int(0), main.int(1));
    let offsets = main.node("Range", &[&start, &block_scalar, &step], vec![]);
    let last = main.node("Sub", &[&count, asked.one], vec![]);
    let body = body(&Outer { asked, block, offsets, last });
    main.push(NodeProto {
        name: Some("sluice/Loop".to_owned()),
        op_type: Some("Loop".to_owned()),
        input: vec![trip_count, String::new()],
        output: outputs.iter().map(|output| format!("sluice/blocks/{output}")).collect(),
        attribute: vec![graph_attribute("body", body)],
        ..Default::default()
    });
    for output in outputs {
        // The last block may repeat its last row to be as long as the others.
        let joined = main.node("Reshape", &[&format!("sluice/blocks/{output}"), &minus_one], vec![]);
        main.node_to("Slice", &[&joined, &zero, &count], vec![], output);
    }
}

/// Names of the values that a block of rows is computed of.
#[derive(Clone, Copy)]
struct Asked<'a> {
    /// Hidden states, `[batch * sequence, width]`.
    flat: &'a str,
    /// Rows of them, `[n]`.
    rows: &'a str,
    /// A target for each, `[n]`.
    targets: &'a str,
    /// The number 1, as an axis.
    one: &'a str,
}

/// Values of the main graph that the Loop's body reads.
struct Outer<'a> {
    asked: &'a Asked<'a>,
    block: String,
    offsets: String,
    last: String,
}

/// The Loop's body: the losses of a block of rows.
fn loop_body(head: &NodeProto, tail: &[NodeProto], outer: &Outer, what: (bool, bool)) -> GraphProto {
    let Outer { asked, block, offsets, last } = outer;
    let mut body = GraphBuilder::new("sluice/body/");
    let start = body.node("Mul", &["sluice/body/iteration", block], vec![]);
    let index = body.node("Add", &[offsets, &start], vec![]);
    let index = body.node("Min", &[&index, last], vec![]);
    let rows = body.node("Gather", &[asked.rows, &index], vec![]);
    let targets = body.node("Gather", &[asked.targets, &index], vec![]);
    let of_block = Asked { rows: &rows, targets: &targets, ..**asked };
    let values = block_outputs(&mut body, head, tail, &of_block, what);
    // Always true. Handed on from the iteration before, it would be on a GPU, and each one would wait for it to come back.
    let always = raw_tensor(DataType::Bool, &[], vec![1].into());
    let condition = body.node("Constant", &[], vec![tensor_attribute("value", always)]);
    let outputs =
        values.iter().map(|value| tensor_info(value, DataType::Float, &[Dim::Named("sluice_block")]));
    let output = std::iter::once(tensor_info(&condition, DataType::Bool, &[])).chain(outputs).collect();
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

/// Adds what computes the losses of some rows, and their entropies where those are asked for; the names of these values.
fn block_outputs(
    graph: &mut GraphBuilder,
    head: &NodeProto,
    tail: &[NodeProto],
    asked: &Asked,
    (entropies, is_single): (bool, bool),
) -> Vec<String> {
    let mut hidden = graph.node("Gather", &[asked.flat, asked.rows], vec![]);
    if head.op_type() != "Gemm" {
        // A batch of one sequence, so that what follows meets the rank it was made for.
        let zero = graph.ints(&[0]);
        hidden = graph.node("Unsqueeze", &[&hidden, &zero], vec![]);
    }
    let mut value = hidden;
    let mut carried = head.input[0].clone();
    for node in [head].into_iter().chain(tail) {
        if only_reshapes(node.op_type()) {
            carried.clone_from(&node.output[0]);
            continue;
        }
        let output = format!("sluice/body/{}", node.output[0]);
        let mut moved = node.clone();
        for input in moved.input.iter_mut().filter(|input| **input == carried) {
            input.clone_from(&value);
        }
        carried.clone_from(&node.output[0]);
        moved.output = vec![output.clone()];
        graph.push(moved);
        value = output;
    }
    let logits = graph.node("Flatten", &[&value], vec![int_attribute("axis", -1)]);
    let mut logits =
        graph.node("Cast", &[&logits], vec![int_attribute("to", i64::from(i32::from(DataType::Float)))]);
    if is_single {
        // A single logit is yes or no: its sigmoid is its share of a softmax with a logit of 0 beside it.
        let beside = graph.ints(&[0, 0, 0, 1]);
        logits = graph.node("Pad", &[&logits, &beside], vec![]);
    }
    let log_probabilities = graph.node("LogSoftmax", &[&logits], vec![int_attribute("axis", -1)]);
    let targets = graph.node("Unsqueeze", &[asked.targets, asked.one], vec![]);
    let chosen =
        graph.node("GatherElements", &[&log_probabilities, &targets], vec![int_attribute("axis", 1)]);
    let chosen = graph.node("Squeeze", &[&chosen, asked.one], vec![]);
    let mut values = vec![graph.node("Neg", &[&chosen], vec![])];
    if entropies {
        let probabilities = graph.node("Exp", &[&log_probabilities], vec![]);
        let terms = graph.node("Mul", &[&probabilities, &log_probabilities], vec![]);
        let sum = graph.node("ReduceSum", &[&terms, asked.one], vec![int_attribute("keepdims", 0)]);
        values.push(graph.node("Neg", &[&sum], vec![]));
    }
    values
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_ROWS, block_rows};
    use crate::device::Device;

    #[test]
    fn a_gpu_takes_as_many_rows_as_fit_and_a_cpu_few() {
        assert_eq!(block_rows(Device::Cpu, Some(49_152)), BLOCK_ROWS);
        let gpu = |vocabulary| block_rows(Device::Cuda(0), vocabulary);
        assert_eq!(
            [Some(49_152), Some(128_256), Some(1 << 24), Some(100), None].map(gpu),
            [4369, 1674, 512, 65_536, 512]
        );
    }
}
