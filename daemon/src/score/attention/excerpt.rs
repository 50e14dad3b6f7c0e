//! The nodes of one layer's attention as a model of their own, whose inputs are queries, keys, values and what masks are
//! made of. It holds no weights, so it is loaded and run in no time.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use sluice_schemas::graph::{Dim, tensor_info};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{GraphProto, NodeProto, TensorProto, ValueInfoProto};

use super::dims::{Dims, product};
use super::find::Spelled;
use super::index::Index;
use super::shapes::Shapes;
use crate::score::constant::{constant_tensor, floats, integers};
use crate::score::names::{ATTENTION_MASK, POSITION_IDS, TOKEN_IDS};

/// Most nodes and elements of a stored tensor that belong to attention alone.
const NODES_MAX: usize = 1000;
const ELEMENTS_MAX: i64 = 1 << 22;
/// Largest number that is taken for a length. Larger ones stand for "without end", or for what masks add.
const LENGTH_MAX: i64 = 1 << 30;
const FLOAT_LENGTH_MAX: f32 = 32768.0;

/// One layer's attention, cut out of its model.
pub(super) struct Excerpt {
    /// Its nodes and what they need; the output is that of the attention.
    pub(super) graph: GraphProto,
    /// Inputs of queries, keys and values, each once, with their sizes.
    pub(super) operands: BTreeMap<String, Dims>,
    /// Inputs of which the shape alone is read, with their sizes.
    pub(super) shapes_only: BTreeMap<String, Dims>,
    /// The largest number in it that may be a length: beyond it, the nodes know of no length at which anything changes.
    pub(super) length_max: i64,
}

/// Cuts `spelled` out, or says why it does not stand alone.
pub(super) fn excerpt(
    index: &Index<'_>,
    shapes: &Shapes<'_>,
    spelled: &Spelled,
) -> Result<Excerpt, &'static str> {
    let mut operands = BTreeMap::new();
    for operand in [&spelled.query, &spelled.key, &spelled.value] {
        let dims = shapes.dims(&operand.value).ok_or("whose operands have no known shape")?;
        operands.insert(operand.value.clone(), dims.clone());
    }
    let mut cut = Cut {
        index,
        shapes,
        inside: &spelled.inside,
        nodes: BTreeSet::new(),
        stored: BTreeSet::new(),
        inputs: BTreeSet::from([TOKEN_IDS.to_owned()]),
        shapes_only: BTreeMap::new(),
    };
    cut.follow(&spelled.output, &operands)?;
    let mut graph = GraphProto {
        name: Some("attention".to_owned()),
        node: cut.nodes.iter().map(|&at| index.graph.node[at].clone()).collect(),
        initializer: cut.stored.iter().filter_map(|name| index.initializer(name)).cloned().collect(),
        ..Default::default()
    };
    for name in &cut.inputs {
        let input = index.graph.input.iter().find(|input| input.name() == name);
        graph.input.push(input.ok_or("which reads an input that Sluice does not feed")?.clone());
    }
    let given: Vec<ValueInfoProto> = operands
        .iter()
        .map(|(name, dims)| (name, dims, spelled.element))
        .chain(cut.shapes_only.iter().map(|(name, dims)| (name, dims, DataType::Float)))
        .map(|(name, dims, element)| tensor_info(name, element, &free(dims)))
        .collect();
    graph.input.extend(given);
    let length_max =
        graph.node.iter().filter_map(constant_tensor).chain(&graph.initializer).map(largest_length);
    let length_max = length_max.chain(graph.node.iter().map(largest_attribute)).max().unwrap_or(1);
    Ok(Excerpt { graph, operands, shapes_only: cut.shapes_only, length_max })
}

fn free(dims: &Dims) -> Vec<Dim<'static>> {
    let names = ["batch", "length"];
    let mut free = names.into_iter();
    dims.iter()
        .map(|size| match size {
            Some(size) => Dim::Fixed(*size),
            None => Dim::Named(free.next().unwrap_or("other")),
        })
        .collect()
}

struct Cut<'a, 'b> {
    index: &'b Index<'a>,
    shapes: &'b Shapes<'a>,
    inside: &'b HashSet<String>,
    nodes: BTreeSet<usize>,
    stored: BTreeSet<String>,
    inputs: BTreeSet<String>,
    shapes_only: BTreeMap<String, Dims>,
}

impl Cut<'_, '_> {
    /// Collects what `output` is computed from, back to `operands`.
    fn follow(&mut self, output: &str, operands: &BTreeMap<String, Dims>) -> Result<(), &'static str> {
        let mut waiting = vec![output.to_owned()];
        let mut seen = HashSet::new();
        while let Some(value) = waiting.pop() {
            if value.is_empty() || operands.contains_key(&value) || !seen.insert(value.clone()) {
                continue;
            }
            if self.index.is_stored(&value) {
                let size = self.index.initializer(&value).and_then(|tensor| product(&tensor.dims));
                if size.is_none_or(|size| size > ELEMENTS_MAX) {
                    return Err("which reads weights beside its queries, keys and values");
                }
                self.stored.insert(value);
                continue;
            }
            let Some(at) = self.index.producer_at(&value) else {
                if !matches!(value.as_str(), TOKEN_IDS | ATTENTION_MASK | POSITION_IDS) {
                    return Err("which reads an input that Sluice does not feed");
                }
                self.inputs.insert(value);
                continue;
            };
            let node = &self.index.graph.node[at];
            if node.attribute.iter().any(|attribute| attribute.g.is_some()) {
                return Err("whose mask is made by nodes inside of other nodes");
            }
            self.nodes.insert(at);
            if self.nodes.len() > NODES_MAX {
                return Err("which is made of more than attention is made of");
            }
            match node.input.first() {
                Some(of) if node.op_type() == "Shape" && self.is_hidden_state(of) => {
                    let dims = self.shapes.dims(of).cloned().unwrap_or_default();
                    if !operands.contains_key(of) {
                        self.shapes_only.insert(of.clone(), dims);
                    }
                }
                _ => waiting.extend(node.input.iter().cloned()),
            }
        }
        // What the nodes compute cannot also be given.
        self.shapes_only.retain(|name, _| !seen.contains(name));
        Ok(())
    }

    /// Whether a value, of which a mask reads the shape, is the hidden states of layers below: its sizes are those of the
    /// batch and the length, and a width.
    fn is_hidden_state(&self, value: &str) -> bool {
        let is_computed = self.index.producer(value).is_some() && !self.inside.contains(value);
        let is_float = matches!(
            self.shapes.element(value),
            Some(DataType::Float | DataType::Float16 | DataType::Bfloat16)
        );
        let is_of_tokens = self
            .shapes
            .dims(value)
            .is_some_and(|dims| dims.len() > 2 && dims.iter().filter(|size| size.is_none()).count() == 2);
        is_computed && is_float && is_of_tokens
    }
}

/// The largest number in a stored tensor, or size of it, that may be a length.
fn largest_length(tensor: &TensorProto) -> i64 {
    let of_values = match integers(tensor) {
        Some(values) => values.into_iter().map(i64::saturating_abs).filter(|&value| value < LENGTH_MAX).max(),
        None => floats(tensor)
            .filter(|values| values.len() == 1)
            .and_then(|values| values.into_iter().find(|value| (0.0..FLOAT_LENGTH_MAX).contains(value)))
            .map(|value| value as i64),
    };
    of_values.unwrap_or(1).max(tensor.dims.iter().copied().max().unwrap_or(1))
}

/// The same for the numbers in a node's attributes.
fn largest_attribute(node: &NodeProto) -> i64 {
    let numbers = node
        .attribute
        .iter()
        .filter(|attribute| attribute.name().starts_with("value"))
        .flat_map(|of| of.ints.iter().copied().chain(of.i));
    numbers.map(i64::saturating_abs).filter(|&value| value < LENGTH_MAX).max().unwrap_or(1)
}
