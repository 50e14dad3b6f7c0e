//! bfloat16 models on the CPU: ONNX Runtime's CPU provider has no kernels for bfloat16, so the graph is made to
//! compute in float32. (float16 it widens by itself; where a layer is tried in single precision, it is widened here.)
//!
//! The weights stay as they are stored; a Cast stands behind each, which ONNX Runtime works out once, as it loads. They
//! are exact in float32, so the losses are at least as good as in bfloat16.

use sluice_schemas::graph::int_attribute;
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};

use super::constant::floats;

const FLOAT: i32 = DataType::Float as i32;

/// Makes a model that computes in `narrow`, a format of 16 bits, compute in float32; false where it does not compute in it.
pub(super) fn widen(model: &mut ModelProto, narrow: DataType) -> bool {
    let narrow = narrow as i32;
    let mut changed = false;
    if let Some(graph) = model.graph.as_mut() {
        widen_graph(graph, narrow, &mut changed);
    }
    for function in &mut model.functions {
        widen_nodes(&mut function.node, narrow, &mut changed);
    }
    changed
}

fn widen_graph(graph: &mut GraphProto, narrow: i32, changed: &mut bool) {
    widen_nodes(&mut graph.node, narrow, changed);
    let mut casts = Vec::new();
    for tensor in graph.initializer.iter_mut().filter(|tensor| tensor.data_type() == narrow) {
        let name = tensor.name().to_owned();
        let stored = format!("sluice/narrow/{name}");
        tensor.name = Some(stored.clone());
        casts.push(NodeProto {
            name: Some(format!("sluice/widen/{name}")),
            op_type: Some("Cast".to_owned()),
            input: vec![stored],
            output: vec![name],
            attribute: vec![int_attribute("to", i64::from(FLOAT))],
            ..Default::default()
        });
    }
    *changed |= !casts.is_empty();
    graph.node.splice(0..0, casts);
    // What is left of it is worked out anew.
    graph.value_info.clear();
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        use sluice_schemas::onnx::type_proto::Value::TensorType;
        if let Some(TensorType(tensor)) = value.r#type.as_mut().and_then(|of| of.value.as_mut())
            && tensor.elem_type() == narrow
        {
            tensor.elem_type = Some(FLOAT);
            *changed = true;
        }
    }
}

fn widen_nodes(nodes: &mut [NodeProto], narrow: i32, changed: &mut bool) {
    for node in nodes {
        // Cast says where to, some generators say which type, and both by number.
        let names_a_type =
            matches!(node.op_type(), "Cast" | "EyeLike" | "RandomNormalLike" | "RandomUniformLike");
        for attribute in &mut node.attribute {
            if names_a_type
                && matches!(attribute.name(), "to" | "dtype")
                && attribute.i() == i64::from(narrow)
            {
                attribute.i = Some(i64::from(FLOAT));
                *changed = true;
            }
            widen_attribute(attribute, narrow, changed);
        }
    }
}

fn widen_attribute(attribute: &mut AttributeProto, narrow: i32, changed: &mut bool) {
    if let Some(tensor) = attribute.t.as_mut().filter(|tensor| tensor.data_type() == narrow)
        && let Some(values) = floats(tensor)
    {
        let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        *tensor = TensorProto {
            name: tensor.name.take(),
            dims: std::mem::take(&mut tensor.dims),
            data_type: Some(FLOAT),
            raw_data: Some(raw.into()),
            ..Default::default()
        };
        *changed = true;
    }
    if let Some(graph) = attribute.g.as_mut() {
        widen_graph(graph, narrow, changed);
    }
}
