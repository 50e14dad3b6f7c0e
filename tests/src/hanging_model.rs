//! A reference model that never returns from a document with a certain token: the real model, whose token ids pass
//! through a loop that counts as good as for ever when it meets that token.

use std::path::Path;

use prost::Message as _;
use sluice_schemas::graph::{Dim, GraphBuilder, graph_attribute, int_attribute, tensor_info};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{GraphProto, ModelProto, NodeProto};

use crate::golden;

/// The token that no scorer survives; the tiny model's vocabulary ends with it.
pub const HANGS: u32 = 511;
const FOR_EVER: i64 = 1 << 62;
const IDS: &str = "input_ids";

/// Writes such a model to `folder`.
pub fn write_hanging_model(folder: &Path) {
    for file in ["tokenizer.json", "config.json"] {
        std::fs::copy(golden("tiny-llama").join(file), folder.join(file)).unwrap();
    }
    let bytes = std::fs::read(golden("tiny-llama/model.onnx")).unwrap();
    let mut model = ModelProto::decode(bytes.as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();

    let mut trap = GraphBuilder::new("trap/");
    let token = trap.int(i64::from(HANGS));
    let (zero, for_ever) = (trap.int(0), trap.int(FOR_EVER));
    let highest = trap.node("ReduceMax", &[IDS], vec![int_attribute("keepdims", 0)]);
    let met = trap.node("Equal", &[&highest, &token], vec![]);
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
    let ids = trap.node("Add", &[IDS, &nothing], vec![]);
    for input in graph.node.iter_mut().flat_map(|node| &mut node.input).filter(|input| **input == IDS) {
        input.clone_from(&ids);
    }
    let (nodes, initializers) = trap.finish();
    graph.node.splice(0..0, nodes);
    graph.initializer.extend(initializers);
    std::fs::write(folder.join("model.onnx"), model.encode_to_vec()).unwrap();
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
