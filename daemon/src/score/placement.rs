//! What ran where: the nodes of a model by provider and operator, as ONNX Runtime's profile of one batch has them.
//!
//! A provider that cannot be had is an error, but a single node that it has no kernel for is given to the CPU without a
//! word. That is right for the arithmetic of shapes, and for nothing else. ONNX Runtime can list what was given to whom
//! (`Session_GetEpGraphAssignmentInfo`), but `ort` has no safe call for it; a profile says what happened, too.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context as _, bail};

use crate::device::Device;

/// ONNX Runtime's name of its CPU provider.
const CPU: &str = "CPUExecutionProvider";

/// Parts of the names of operators on which a model's time goes. A `Gather` is one of an embedding or of hidden states where
/// it is not of integers.
const HEAVY: [&str; 10] = [
    "MatMul",
    "Gemm",
    "Einsum",
    "Conv",
    "Attention",
    "Normalization",
    "RotaryEmbedding",
    "Softmax",
    "MoE",
    "Gather",
];

/// The nodes that ran in one batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    rows: BTreeMap<Kind, BTreeSet<String>>,
}

/// What nodes are counted by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// ONNX Runtime's name of the provider that they ran on.
    pub provider: String,
    /// Their operator.
    pub operator: String,
    /// Element type of their first input that is a tensor, as ONNX Runtime names it.
    pub element: String,
}

/// An event of a profile, in the trace format of Chromium.
#[derive(serde::Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    name: String,
    #[serde(default)]
    args: serde_json::Value,
}

impl Placement {
    /// Reads a profile.
    pub fn from_profile(json: &[u8]) -> anyhow::Result<Self> {
        let events: Vec<Event> =
            serde_json::from_slice(json).context("ONNX Runtime's profile is not what it used to be")?;
        let mut rows: BTreeMap<Kind, BTreeSet<String>> = BTreeMap::new();
        for event in events.iter().filter(|event| event.cat == "Node") {
            let Some(node) = event.name.strip_suffix("_kernel_time") else { continue };
            let text = |key: &str| event.args[key].as_str().unwrap_or_default().to_owned();
            let first = event.args["input_type_shape"]
                .as_array()
                .into_iter()
                .flatten()
                .find_map(|input| input.as_object()?.keys().next());
            let kind = Kind {
                provider: text("provider"),
                operator: text("op_name"),
                element: first.cloned().unwrap_or_default(),
            };
            // The nodes of a Loop run many times.
            rows.entry(kind).or_default().insert(node.to_owned());
        }
        if rows.is_empty() {
            bail!("ONNX Runtime's profile of a batch names no nodes");
        }
        Ok(Self { rows })
    }

    /// The kinds of nodes, how many there are of each, and one of their names.
    pub fn rows(&self) -> impl Iterator<Item = (&Kind, usize, &str)> {
        self.rows
            .iter()
            .map(|(kind, nodes)| (kind, nodes.len(), nodes.first().map(String::as_str).unwrap_or_default()))
    }

    /// Refuses heavy work that ran on the CPU though the model was meant for a GPU.
    pub fn check(&self, device: Device) -> Result<(), Misplaced> {
        if device == Device::Cpu {
            return Ok(());
        }
        let nodes: Vec<String> = self
            .rows()
            .filter(|(kind, ..)| kind.provider == CPU && is_heavy(kind))
            .map(|(kind, count, node)| {
                let Kind { operator, element, .. } = kind;
                let more = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
                format!("`{node}` ({operator} of {element}){more}")
            })
            .collect();
        if nodes.is_empty() { Ok(()) } else { Err(Misplaced { device, nodes }) }
    }
}

/// Nodes that would make a GPU wait for the CPU in every batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misplaced {
    /// Where the model was meant to run.
    pub device: Device,
    /// The nodes, with their operators and types.
    pub nodes: Vec<String>,
}

impl fmt::Display for Misplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the model was to run on {}, and ONNX Runtime has no kernel there for {}, which ran on the CPU; export the model \
             in float16 or bfloat16, or run it with model.device = \"cpu\"",
            self.device,
            self.nodes.join(", ")
        )
    }
}

impl std::error::Error for Misplaced {}

/// Whether nodes of a kind are what a model's time goes on: large operators, of floating-point numbers or quantized ones. What
/// computes with shapes is of 64-bit integers.
fn is_heavy(kind: &Kind) -> bool {
    let of_numbers = !matches!(kind.element.as_str(), "int64" | "int32" | "bool" | "string" | "");
    of_numbers && HEAVY.iter().any(|part| kind.operator.contains(part))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn event(node: &str, operator: &str, provider: &str, element: &str) -> serde_json::Value {
        serde_json::json!({
            "cat": "Node",
            "name": format!("{node}_kernel_time"),
            "args": {"op_name": operator, "provider": provider, "input_type_shape": [{element: [2, 3]}]},
        })
    }

    fn placement(events: &[serde_json::Value]) -> Placement {
        Placement::from_profile(&serde_json::to_vec(events).unwrap()).unwrap()
    }

    #[test]
    fn heavy_nodes_on_the_cpu_are_named_and_shapes_are_not() {
        const CUDA: &str = "CUDAExecutionProvider";
        let light = [
            event("/shape", "Gather", CPU, "int64"),
            event("/range", "Range", CPU, "int64"),
            event("/size", "MatMul", CPU, "int64"),
            event("/head", "MatMul", CUDA, "float16"),
            event("/norm", "SimplifiedLayerNormalization", CUDA, "float16"),
            event("/cast", "Cast", CPU, "float"),
            serde_json::json!({"cat": "Session", "name": "model_run"}),
        ];
        assert_eq!(placement(&light).check(Device::Cuda(0)), Ok(()));
        assert_eq!(placement(&light).rows().count(), 6);
        for (operator, element) in [
            ("GroupQueryAttention", "float"),
            ("Attention", "float"),
            ("MatMulNBits", "float16"),
            ("FusedGemm", "float"),
            ("SkipSimplifiedLayerNormalization", "float16"),
            ("LayerNormalization", "float"),
            ("Softmax", "float16"),
            ("LogSoftmax", "float"),
            ("GatherElements", "float"),
            ("GatherBlockQuantized", "uint8"),
            ("DynamicQuantizeMatMul", "float"),
        ] {
            let mut events = light.to_vec();
            events.extend([event("/a/1", operator, CPU, element), event("/a/2", operator, CPU, element)]);
            // Twice the same node, as in a Loop.
            events.push(event("/a/2", operator, CPU, element));
            let placement = placement(&events);
            let misplaced = placement.check(Device::Cuda(1)).unwrap_err();
            assert_eq!(misplaced.nodes, [format!("`/a/1` ({operator} of {element}) and 1 more")]);
            assert!(misplaced.to_string().contains("to run on cuda:1"), "{misplaced}");
            assert_eq!(placement.check(Device::Cpu), Ok(()));
        }
    }

    #[test]
    fn what_is_no_profile_is_an_error() {
        for wrong in ["", "{}", "[]", "[{\"cat\": \"Session\", \"name\": \"x\"}]"] {
            assert!(Placement::from_profile(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
