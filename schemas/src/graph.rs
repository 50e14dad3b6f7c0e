//! A small builder of ONNX graphs, for the loss head that the daemon grafts and the models that the trainer exports.

use bytes::Bytes;

use crate::onnx::attribute_proto::AttributeType;
use crate::onnx::tensor_proto::DataType;
use crate::onnx::tensor_shape_proto::{Dimension, dimension};
use crate::onnx::{
    AttributeProto, GraphProto, NodeProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    type_proto,
};

/// Collects nodes and constants; every value's name begins with the builder's prefix, so that it meets no other.
#[derive(Debug)]
pub struct GraphBuilder {
    prefix: String,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
}

impl GraphBuilder {
    /// An empty builder whose names begin with `prefix`.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned(), nodes: Vec::new(), initializers: Vec::new() }
    }

    fn fresh(&self, what: &str) -> String {
        format!("{}{what}_{}", self.prefix, self.nodes.len() + self.initializers.len())
    }

    /// Adds a node of the standard domain with one output, and returns the output's name.
    pub fn node(&mut self, op_type: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let output = self.fresh(op_type);
        self.node_to(op_type, inputs, attributes, &output);
        output
    }

    /// Adds a node of the standard domain whose one output has a given name.
    pub fn node_to(&mut self, op_type: &str, inputs: &[&str], attributes: Vec<AttributeProto>, output: &str) {
        self.push(NodeProto {
            name: Some(self.fresh(op_type)),
            op_type: Some(op_type.to_owned()),
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: vec![output.to_owned()],
            attribute: attributes,
            ..Default::default()
        });
    }

    /// Adds a node as it is.
    pub fn push(&mut self, node: NodeProto) {
        self.nodes.push(node);
    }

    /// Adds a constant and returns its name.
    pub fn constant(&mut self, tensor: TensorProto) -> String {
        let name = tensor.name.clone().unwrap_or_else(|| self.fresh("constant"));
        self.initializers.push(TensorProto { name: Some(name.clone()), ..tensor });
        name
    }

    /// Adds a constant vector of 64-bit integers and returns its name.
    pub fn ints(&mut self, values: &[i64]) -> String {
        self.constant(int_tensor(&[values.len() as i64], values))
    }

    /// Adds a constant 64-bit integer without dimensions and returns its name.
    pub fn int(&mut self, value: i64) -> String {
        self.constant(int_tensor(&[], &[value]))
    }

    /// Whether there is a constant of this name.
    pub fn has(&self, constant: &str) -> bool {
        self.initializers.iter().any(|tensor| tensor.name() == constant)
    }

    /// The nodes in the order they were added, and the constants.
    pub fn finish(self) -> (Vec<NodeProto>, Vec<TensorProto>) {
        (self.nodes, self.initializers)
    }
}

/// A tensor of 64-bit integers without a name.
pub fn int_tensor(dims: &[i64], values: &[i64]) -> TensorProto {
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    raw_tensor(DataType::Int64, dims, raw.into())
}

/// A tensor without a name, from little-endian values.
pub fn raw_tensor(data_type: DataType, dims: &[i64], raw: Bytes) -> TensorProto {
    TensorProto {
        data_type: Some(data_type.into()),
        dims: dims.to_vec(),
        raw_data: Some(raw),
        ..Default::default()
    }
}

/// A floating-point attribute.
pub fn float_attribute(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Float.into()),
        f: Some(value),
        ..Default::default()
    }
}

/// An integer attribute.
pub fn int_attribute(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Int.into()),
        i: Some(value),
        ..Default::default()
    }
}

/// An attribute of several integers.
pub fn ints_attribute(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Ints.into()),
        ints: values.to_vec(),
        ..Default::default()
    }
}

/// A tensor as an attribute, such as the value of a `ConstantOfShape`.
pub fn tensor_attribute(name: &str, tensor: TensorProto) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Tensor.into()),
        t: Some(tensor),
        ..Default::default()
    }
}

/// A graph as an attribute, such as the body of a Loop.
pub fn graph_attribute(name: &str, graph: GraphProto) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Graph.into()),
        g: Some(graph),
        ..Default::default()
    }
}

/// One dimension of a graph's input or output.
#[derive(Clone, Copy, Debug)]
pub enum Dim<'a> {
    /// A size that is always the same.
    Fixed(i64),
    /// A size that changes from run to run, by name.
    Named(&'a str),
}

/// Describes a tensor that goes into or comes out of a graph.
pub fn tensor_info(name: &str, data_type: DataType, dims: &[Dim<'_>]) -> ValueInfoProto {
    let dim = dims
        .iter()
        .map(|dim| Dimension {
            value: Some(match *dim {
                Dim::Fixed(size) => dimension::Value::DimValue(size),
                Dim::Named(name) => dimension::Value::DimParam(name.to_owned()),
            }),
            ..Default::default()
        })
        .collect();
    let tensor =
        type_proto::Tensor { elem_type: Some(data_type.into()), shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
        ..Default::default()
    }
}
