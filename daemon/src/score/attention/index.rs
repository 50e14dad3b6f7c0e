//! Who makes and who reads each value of a graph.

use std::collections::HashMap;

use sluice_schemas::onnx::{AttributeProto, GraphProto, NodeProto, TensorProto};

use crate::score::constant::constant_tensor;

/// A graph with its nodes looked up by the values that they make and read.
pub(super) struct Index<'a> {
    /// The graph.
    pub(super) graph: &'a GraphProto,
    producers: HashMap<&'a str, usize>,
    consumers: HashMap<&'a str, Vec<usize>>,
    stored: HashMap<&'a str, &'a TensorProto>,
}

impl<'a> Index<'a> {
    pub(super) fn new(graph: &'a GraphProto) -> Self {
        let mut producers = HashMap::new();
        let mut consumers: HashMap<&str, Vec<usize>> = HashMap::new();
        for (at, node) in graph.node.iter().enumerate() {
            producers.extend(node.output.iter().map(|output| (output.as_str(), at)));
            for input in &node.input {
                consumers.entry(input.as_str()).or_default().push(at);
            }
        }
        let stored = graph.initializer.iter().map(|tensor| (tensor.name(), tensor)).collect();
        Self { graph, producers, consumers, stored }
    }

    /// The node that makes `value`, by its place in the graph.
    pub(super) fn producer_at(&self, value: &str) -> Option<usize> {
        self.producers.get(value).copied()
    }

    /// The node that makes `value`.
    pub(super) fn producer(&self, value: &str) -> Option<&'a NodeProto> {
        self.producer_at(value).map(|at| &self.graph.node[at])
    }

    /// The nodes that read `value`.
    pub(super) fn consumers(&self, value: &str) -> impl Iterator<Item = &'a NodeProto> {
        let places = self.consumers.get(value).map(Vec::as_slice).unwrap_or_default();
        places.iter().map(|&at| &self.graph.node[at])
    }

    /// The tensor that is stored as `value`: an initializer, or what a `Constant` holds.
    pub(super) fn tensor(&self, value: &str) -> Option<&'a TensorProto> {
        if let Some(tensor) = self.stored.get(value) {
            return Some(tensor);
        }
        self.producer(value).filter(|node| node.op_type() == "Constant").and_then(constant_tensor)
    }

    /// Whether an initializer has this name.
    pub(super) fn is_stored(&self, value: &str) -> bool {
        self.stored.contains_key(value)
    }

    /// The initializer of this name.
    pub(super) fn initializer(&self, value: &str) -> Option<&'a TensorProto> {
        self.stored.get(value).copied()
    }
}

/// An integer attribute of a node.
pub(super) fn int(node: &NodeProto, name: &str) -> Option<i64> {
    node.attribute.iter().find(|attribute| attribute.name() == name).map(AttributeProto::i)
}

/// An attribute of several integers.
pub(super) fn ints<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [i64]> {
    node.attribute
        .iter()
        .find(|attribute| attribute.name() == name)
        .map(|attribute| attribute.ints.as_slice())
}
