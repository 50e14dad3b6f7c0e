//! The operators that compute attention in one: ONNX Runtime's `GroupQueryAttention`, and the standard `Attention`.

use sluice_schemas::graph::{GraphBuilder, float_attribute, int_attribute, ints_attribute};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{AttributeProto, NodeProto};

use super::find::{Layout, Operand, Spelled};
use crate::device::Device;
use crate::score::names::TOKEN_IDS;

/// Domain of ONNX Runtime's own operators.
pub(super) const MICROSOFT: &str = "com.microsoft";

/// An operator that computes attention in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// ONNX Runtime's `GroupQueryAttention`, which is causal by itself.
    GroupQuery,
    /// The standard `Attention`, of opset 23 and later.
    Standard,
}

impl Operator {
    /// The operator that has a fused kernel on `device` for attention of `element`: `GroupQueryAttention` has one for any
    /// type on the CPU and for 16 bits on CUDA.
    pub(super) fn on(device: Device, element: DataType) -> Self {
        match device {
            Device::Cuda(_) if element == DataType::Float => Self::Standard,
            Device::Cpu | Device::Cuda(_) => Self::GroupQuery,
        }
    }

    /// Its name in a graph.
    pub fn name(self) -> &'static str {
        match self {
            Self::GroupQuery => "GroupQueryAttention",
            Self::Standard => "Attention",
        }
    }
}

/// Values that every layer reads: where each row ends, and the number of positions; both int32.
pub(super) struct Lengths {
    last: String,
    total: String,
}

impl Lengths {
    /// Adds them to a graph. Padding stands on the right, where nothing real sees it, so each row is as long as the batch.
    pub(super) fn new(graph: &mut GraphBuilder) -> Self {
        let shape = graph.node("Shape", &[TOKEN_IDS], vec![]);
        let (zero, one) = (graph.ints(&[0]), graph.ints(&[1]));
        let int32 = || vec![int_attribute("to", i64::from(DataType::Int32 as i32))];
        let length = graph.node("Gather", &[&shape, &one], vec![]);
        let batch = graph.node("Gather", &[&shape, &zero], vec![]);
        let last = graph.node("Sub", &[&length, &one], vec![]);
        let last = graph.node("Cast", &[&last], int32());
        let last = graph.node("Expand", &[&last, &batch], vec![]);
        let total = graph.node("Squeeze", &[&length], vec![]);
        let total = graph.node("Cast", &[&total], int32());
        Self { last, total }
    }
}

/// Adds `operator` for what is spelled out as `spelled`, with its result as `output`.
pub(super) fn build(
    graph: &mut GraphBuilder,
    operator: Operator,
    spelled: &Spelled,
    lengths: &Lengths,
    output: &str,
) {
    let Spelled { query, key, value, width, .. } = spelled;
    let attended = match operator {
        Operator::GroupQuery => {
            let [q, k, v] = [query, key, value].map(|operand| flat(graph, operand, *width));
            let mut attributes =
                vec![int_attribute("num_heads", query.heads), int_attribute("kv_num_heads", key.heads)];
            attributes.extend(numbers(spelled));
            let attended = format!("{output}/sluice/attended");
            graph.push(NodeProto {
                name: Some(format!("{output}/sluice/GroupQueryAttention")),
                op_type: Some(operator.name().to_owned()),
                domain: Some(MICROSOFT.to_owned()),
                input: [&*q, &k, &v, "", "", &lengths.last, &lengths.total].map(str::to_owned).to_vec(),
                output: vec![attended.clone()],
                attribute: attributes,
                ..Default::default()
            });
            let split = graph.ints(&[0, 0, query.heads, *width]);
            let split = graph.node("Reshape", &[&attended, &split], vec![]);
            turned(graph, &split)
        }
        Operator::Standard => {
            let [q, k, v] = [query, key, value].map(|operand| heads_first(graph, operand, *width));
            let mut attributes = vec![int_attribute("is_causal", 1)];
            attributes.extend(numbers(spelled));
            graph.node(operator.name(), &[&q, &k, &v], attributes)
        }
    };
    let last = if spelled.output_element == spelled.element { "Identity" } else { "Cast" };
    let to = int_attribute("to", i64::from(spelled.output_element as i32));
    graph.node_to(last, &[&attended], if last == "Cast" { vec![to] } else { vec![] }, output);
}

fn numbers(spelled: &Spelled) -> Vec<AttributeProto> {
    let mut numbers = vec![float_attribute("scale", spelled.scale as f32)];
    if let Some(cap) = spelled.soft_cap {
        numbers.push(float_attribute("softcap", cap as f32));
    }
    numbers
}

/// `[batch, length, heads, width]` to `[batch, heads, length, width]`, and back.
fn turned(graph: &mut GraphBuilder, value: &str) -> String {
    graph.node("Transpose", &[value], vec![ints_attribute("perm", &[0, 2, 1, 3])])
}

/// `[batch, length, heads * width]`. The sizes are spelled out, so that a wrong guess of them is an error and no loss.
fn flat(graph: &mut GraphBuilder, operand: &Operand, width: i64) -> String {
    let value = match operand.layout {
        Layout::Flat => return operand.value.clone(),
        Layout::HeadsLast => operand.value.clone(),
        Layout::HeadsFirst => turned(graph, &operand.value),
    };
    let joined = graph.ints(&[0, 0, operand.heads * width]);
    graph.node("Reshape", &[&value, &joined], vec![])
}

fn heads_first(graph: &mut GraphBuilder, operand: &Operand, width: i64) -> String {
    match operand.layout {
        Layout::HeadsFirst => operand.value.clone(),
        Layout::HeadsLast => turned(graph, &operand.value),
        Layout::Flat => {
            let split = graph.ints(&[0, 0, operand.heads, width]);
            let split = graph.node("Reshape", &[&operand.value, &split], vec![]);
            turned(graph, &split)
        }
    }
}
