//! The real model with a trap: its token ids pass through something that is harmless until it meets a certain token.

use std::path::Path;

use prost::Message as _;
use sluice_schemas::graph::{Dim, GraphBuilder, graph_attribute, int_attribute, tensor_info};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{GraphProto, ModelProto, NodeProto};

use crate::golden;

/// The token that springs the trap; the tiny model's vocabulary ends with it.
pub const TRAP: u32 = 511;
const FOR_EVER: i64 = 1 << 62;
/// Of four bytes each, more than a process can address.
const TOO_MANY: i64 = 1 << 46;
const IDS: &str = "input_ids";

/// Writes a model to `folder` that never returns from a batch with the token [`TRAP`], for it goes through a loop that
/// counts as good as for ever.
pub fn write_hanging_model(folder: &Path) {
    write(folder, |trap| {
        let met = meets_the_token(trap);
        let (zero, for_ever) = (trap.int(0), trap.int(FOR_EVER));
        let turns = trap.node("Where", &[&met, &for_ever, &zero], vec![]);
        let nothing = "trap/nothing".to_owned();
        trap.push(NodeProto {
            name: Some("trap/Loop".to_owned()),
            op_type: Some("Loop".to_owned()),
            input: vec![turns, String::new(), zero],
            output: vec![nothing.clone()],
            attribute: vec![graph_attribute("body", turn())],
            ..Default::default()
        });
        nothing
    });
}

/// Writes a model to `folder` that wants more memory than there can be for a batch of several rows with the token
/// [`TRAP`], and none for a row alone.
pub fn write_greedy_model(folder: &Path) {
    write(folder, |trap| {
        let met = meets_the_token(trap);
        let shape = trap.node("Shape", &[IDS], vec![]);
        let (nought, one, zero, too_many) =
            (trap.ints(&[0]), trap.ints(&[1]), trap.int(0), trap.int(TOO_MANY));
        let rows = trap.node("Gather", &[&shape, &nought], vec![]);
        let others = trap.node("Sub", &[&rows, &one], vec![]);
        let each = trap.node("Where", &[&met, &too_many, &zero], vec![]);
        let wanted = trap.node("Mul", &[&others, &each], vec![]);
        let memory = trap.node("ConstantOfShape", &[&wanted], vec![]);
        let size = trap.node("Shape", &[&memory], vec![]);
        trap.node("Mul", &[&size, &nought], vec![])
    });
}

/// How a model sees more than what stands before a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leak {
    /// It reads the next token in place of each.
    Next,
    /// It reads other tokens where its row is not alone.
    Company,
    /// It reads other tokens where its row is longer.
    Padding,
}

/// Writes a model to `folder` whose losses depend on what they should not.
pub fn write_leaking_model(folder: &Path, leak: Leak) {
    write(folder, |graph| {
        if leak == Leak::Next {
            let (one, end, minus_one, axis) =
                (graph.ints(&[1]), graph.ints(&[FOR_EVER]), graph.ints(&[-1]), graph.ints(&[1]));
            let rest = graph.node("Slice", &[IDS, &one, &end, &axis], vec![]);
            let last = graph.node("Slice", &[IDS, &minus_one, &end, &axis], vec![]);
            let next = graph.node("Concat", &[&rest, &last], vec![int_attribute("axis", 1)]);
            return graph.node("Sub", &[&next, IDS], vec![]);
        }
        let shape = graph.node("Shape", &[IDS], vec![]);
        let axis = graph.ints(&[i64::from(leak == Leak::Padding)]);
        let size = graph.node("Gather", &[&shape, &axis], vec![]);
        // Rows are padded to multiples of eight.
        let step = graph.ints(&[if leak == Leak::Padding { 8 } else { 1 }]);
        let steps = graph.node("Div", &[&size, &step], vec![]);
        let one = graph.ints(&[1]);
        graph.node("Sub", &[&steps, &one], vec![])
    });
}

/// The golden model, to whose token ids the zero that `trap` names is added.
fn write(folder: &Path, trap: impl FnOnce(&mut GraphBuilder) -> String) {
    for file in ["tokenizer.json", "config.json"] {
        std::fs::copy(golden("tiny-llama").join(file), folder.join(file)).unwrap();
    }
    let bytes = std::fs::read(golden("tiny-llama/model.onnx")).unwrap();
    let mut model = ModelProto::decode(bytes.as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let mut builder = GraphBuilder::new("trap/");
    let nothing = trap(&mut builder);
    let ids = builder.node("Add", &[IDS, &nothing], vec![]);
    for input in graph.node.iter_mut().flat_map(|node| &mut node.input).filter(|input| **input == IDS) {
        input.clone_from(&ids);
    }
    let (nodes, initializers) = builder.finish();
    graph.node.splice(0..0, nodes);
    graph.initializer.extend(initializers);
    std::fs::write(folder.join("model.onnx"), model.encode_to_vec()).unwrap();
}

fn meets_the_token(trap: &mut GraphBuilder) -> String {
    let token = trap.int(i64::from(TRAP));
    let highest = trap.node("ReduceMax", &[IDS], vec![int_attribute("keepdims", 0)]);
    trap.node("Equal", &[&highest, &token], vec![])
}

/// One turn of the loop, which hands on what it was given.
fn turn() -> GraphProto {
    let mut body = GraphBuilder::new("trap/body/");
    let condition = body.node("Identity", &["trap/body/go_on"], vec![]);
    let value = body.node("Identity", &["trap/body/value"], vec![]);
    let (node, initializer) = body.finish();
    GraphProto {
        name: Some("turn".to_owned()),
        node,
        initializer,
        input: vec![
            tensor_info("trap/body/turn", DataType::Int64, &[]),
            tensor_info("trap/body/go_on", DataType::Bool, &[]),
            tensor_info("trap/body/value", DataType::Int64, &[]),
        ],
        output: vec![
            tensor_info(&condition, DataType::Bool, &[]),
            tensor_info(&value, DataType::Int64, &[] as &[Dim]),
        ],
        ..Default::default()
    }
}
