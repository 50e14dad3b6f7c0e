//! What can be known of a graph's values without running it: sizes of dimensions, element types, and the values of small
//! constants and of what is computed from shapes. It is for guesses, which are tried afterwards; what is not known is left
//! out, and less is recognised.

use std::collections::HashMap;

use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::tensor_shape_proto::dimension;
use sluice_schemas::onnx::{NodeProto, TensorProto, ValueInfoProto, type_proto};

use super::dims::{Dims, broadcast, keeps_shape, multiplied, place, product, squeezed, unsqueezed};
use super::index::{Index, int, ints};
use crate::score::constant::{floats, integers};

/// Most elements of an integer tensor that is taken for a shape, an axis or a bound.
const SHAPE_MAX: i64 = 16;

/// What is known of a graph's values, by name.
#[derive(Default)]
pub(super) struct Shapes<'a> {
    dims: HashMap<&'a str, Dims>,
    types: HashMap<&'a str, DataType>,
    /// Vectors and single numbers of integers, such as shapes.
    integers: HashMap<&'a str, Dims>,
    /// Single floating-point numbers.
    scalars: HashMap<&'a str, f64>,
}

impl<'a> Shapes<'a> {
    /// Follows the graph's nodes in their order.
    pub(super) fn of(index: &Index<'a>) -> Self {
        let mut shapes = Self::default();
        for tensor in &index.graph.initializer {
            shapes.store(tensor.name(), tensor);
        }
        for input in &index.graph.input {
            shapes.declare(input);
        }
        // Of what no rule here knows, the exporter may have said it.
        let said: HashMap<&str, &ValueInfoProto> =
            index.graph.value_info.iter().map(|value| (value.name(), value)).collect();
        for node in &index.graph.node {
            shapes.follow(node);
            for output in &node.output {
                if let Some(value) = said.get(output.as_str())
                    && !(shapes.dims.contains_key(output.as_str())
                        && shapes.types.contains_key(output.as_str()))
                {
                    shapes.declare(value);
                }
            }
        }
        shapes
    }

    /// Sizes of a value's dimensions.
    pub(super) fn dims(&self, value: &str) -> Option<&Dims> {
        self.dims.get(value)
    }

    /// Element type of a value.
    pub(super) fn element(&self, value: &str) -> Option<DataType> {
        self.types.get(value).copied()
    }

    /// The one number that a value is in every run.
    pub(super) fn scalar(&self, value: &str) -> Option<f64> {
        match self.scalars.get(value) {
            Some(&number) => Some(number),
            None => match self.integers.get(value)?.as_slice() {
                &[Some(number)] => Some(number as f64),
                _ => None,
            },
        }
    }

    fn store(&mut self, name: &'a str, tensor: &TensorProto) {
        self.dims.insert(name, tensor.dims.iter().map(|&size| Some(size)).collect());
        let Ok(element) = DataType::try_from(tensor.data_type()) else { return };
        self.types.insert(name, element);
        let size = product(&tensor.dims).unwrap_or(i64::MAX);
        if matches!(element, DataType::Int64 | DataType::Int32) && tensor.dims.len() < 2 && size <= SHAPE_MAX
        {
            if let Some(values) = integers(tensor) {
                self.integers.insert(name, values.into_iter().map(Some).collect());
            }
        } else if size == 1
            && let Some(&[value]) = floats(tensor).as_deref()
        {
            self.scalars.insert(name, f64::from(value));
        }
    }

    fn declare(&mut self, value: &'a ValueInfoProto) {
        let Some(type_proto::Value::TensorType(tensor)) =
            value.r#type.as_ref().and_then(|of| of.value.as_ref())
        else {
            return;
        };
        if let Ok(element) = DataType::try_from(tensor.elem_type()) {
            self.types.insert(value.name(), element);
        }
        let Some(shape) = &tensor.shape else { return };
        let size = |dim: &Option<dimension::Value>| match dim {
            Some(dimension::Value::DimValue(size)) => Some(*size),
            _ => None,
        };
        self.dims.insert(value.name(), shape.dim.iter().map(|dim| size(&dim.value)).collect());
    }

    fn follow(&mut self, node: &'a NodeProto) {
        let Some(output) = node.output.first() else { return };
        if node.op_type() == "Constant" {
            self.constant(node, output);
            return;
        }
        if node.op_type() == "Split" {
            self.split(node);
            return;
        }
        if let Some(dims) = self.dims_of(node) {
            self.dims.insert(output, dims);
        }
        if let Some(element) = self.element_of(node) {
            self.types.insert(output, element);
        }
        if let Some(values) = self.integers_of(node) {
            self.integers.insert(output, values);
        } else if let Some(value) = self.scalar_of(node) {
            self.scalars.insert(output, value);
        }
    }

    fn constant(&mut self, node: &'a NodeProto, output: &'a str) {
        for attribute in &node.attribute {
            match attribute.name() {
                "value" => {
                    if let Some(tensor) = &attribute.t {
                        self.store(output, tensor);
                    }
                }
                "value_int" => {
                    self.integers.insert(output, vec![Some(attribute.i())]);
                    self.dims.insert(output, Vec::new());
                }
                "value_ints" => {
                    self.dims.insert(output, vec![Some(attribute.ints.len() as i64)]);
                    self.integers.insert(output, attribute.ints.iter().map(|&value| Some(value)).collect());
                }
                "value_float" => {
                    self.scalars.insert(output, f64::from(attribute.f()));
                    self.dims.insert(output, Vec::new());
                }
                _ => {}
            }
        }
    }

    fn split(&mut self, node: &'a NodeProto) {
        let Some(input) = node.input.first().and_then(|input| self.dims(input)).cloned() else { return };
        let Some(axis) = place(int(node, "axis").unwrap_or(0), input.len()) else { return };
        let given = node.input.get(1).and_then(|sizes| self.integers.get(sizes.as_str())).cloned();
        let parts = node.output.len() as i64;
        let equal = input[axis].filter(|size| size.checked_rem(parts) == Some(0)).map(|size| size / parts);
        let sizes: Dims = match (given, ints(node, "split")) {
            (Some(sizes), _) => sizes,
            (None, Some(sizes)) => sizes.iter().map(|&size| Some(size)).collect(),
            (None, None) => vec![equal; node.output.len()],
        };
        for (output, size) in node.output.iter().zip(sizes) {
            let mut dims = input.clone();
            dims[axis] = size;
            self.dims.insert(output, dims);
            if let Some(element) = self.element(&node.input[0]) {
                self.types.insert(output, element);
            }
        }
    }

    fn input_dims(&self, node: &NodeProto, at: usize) -> Option<&Dims> {
        self.dims(node.input.get(at)?)
    }

    /// The integers of an input, where each of them is known.
    fn known(&self, node: &NodeProto, at: usize) -> Option<Vec<i64>> {
        self.integers.get(node.input.get(at)?.as_str())?.iter().copied().collect()
    }

    /// The axes of a node, which are an attribute in older opsets and an input in newer ones.
    fn axes(&self, node: &NodeProto) -> Option<Vec<i64>> {
        ints(node, "axes").map(<[i64]>::to_vec).or_else(|| self.known(node, 1))
    }

    fn dims_of(&self, node: &NodeProto) -> Option<Dims> {
        let first = self.input_dims(node, 0);
        match node.op_type() {
            "Shape" => Some(vec![Some(first?.len() as i64)]),
            "Transpose" => {
                let perm = ints(node, "perm")?;
                perm.iter().map(|&axis| first?.get(usize::try_from(axis).ok()?).copied()).collect()
            }
            "Reshape" => self.reshaped(node),
            "Unsqueeze" => unsqueezed(first?, &self.axes(node)?),
            "Squeeze" => squeezed(first?, &self.axes(node)?),
            "Expand" => match self.integers.get(node.input.get(1)?.as_str()) {
                Some(wanted) => broadcast(first?, wanted),
                // Dimensions of one may become any; the others stay.
                None => Some(first?.iter().map(|size| size.filter(|&size| size != 1)).collect()),
            },
            "Gather" => {
                let axis = place(int(node, "axis").unwrap_or(0), first?.len())?;
                let inner = self.input_dims(node, 1)?;
                Some([&first?[..axis], inner, &first?[axis + 1..]].concat())
            }
            "MatMul" | "MatMulInteger" => multiplied(first?, self.input_dims(node, 1)?),
            "MatMulNBits" => {
                let (_, rows) = first?.split_last()?;
                Some([rows, &[int(node, "N")]].concat())
            }
            "Gemm" => {
                let weight = self.input_dims(node, 1)?;
                let columns = usize::from(int(node, "transB").unwrap_or(0) == 0);
                Some(vec![*first?.first()?, *weight.get(columns)?])
            }
            "Concat" => self.joined(node),
            "Slice" => self.sliced(node),
            "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin"
                if int(node, "keepdims").unwrap_or(1) == 1 =>
            {
                let mut dims = first?.clone();
                for axis in self.axes(node)? {
                    *dims.get_mut(place(axis, first?.len())?)? = Some(1);
                }
                Some(dims)
            }
            "Range" => Some(vec![None]),
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Where" | "And" | "Or" | "Equal" | "Less"
            | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "Max" | "Min" => {
                // What is not known is taken for something that spreads over the rest, such as angles over heads.
                let mut known = (0..node.input.len()).filter_map(|at| self.input_dims(node, at));
                let first = known.next()?.clone();
                known.try_fold(first, |dims, other| broadcast(&dims, other))
            }
            op if keeps_shape(op) => first.cloned(),
            _ => None,
        }
    }

    fn element_of(&self, node: &NodeProto) -> Option<DataType> {
        match node.op_type() {
            "Cast" => DataType::try_from(int(node, "to")? as i32).ok(),
            "Shape" | "Size" | "NonZero" => Some(DataType::Int64),
            "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Not"
            | "IsNaN" | "IsInf" => Some(DataType::Bool),
            "MatMulInteger" => Some(DataType::Int32),
            "DynamicQuantizeLinear" | "QuantizeLinear" | "ConstantOfShape" => None,
            "Where" | "DequantizeLinear" => self.element(node.input.get(1)?),
            _ => self.element(node.input.first()?),
        }
    }

    fn reshaped(&self, node: &NodeProto) -> Option<Dims> {
        let input = self.input_dims(node, 0)?;
        let wanted = self.integers.get(node.input.get(1)?.as_str())?;
        let copies = int(node, "allowzero").unwrap_or(0) == 0;
        let mut dims: Dims = Vec::new();
        for (at, size) in wanted.iter().enumerate() {
            dims.push(if copies && *size == Some(0) { *input.get(at)? } else { *size });
        }
        if let Some(rest) = dims.iter().position(|&size| size == Some(-1)) {
            let changing = |dims: &Dims| dims.iter().filter(|size| size.is_none()).count();
            let known = |dims: &Dims| product(&dims.iter().flatten().copied().collect::<Vec<_>>());
            // What changes from run to run is the batch and the length, and as many of them stand on both sides.
            dims[rest] = Some(1);
            let (all, others) = (known(input)?, known(&dims)?);
            let is_told = changing(input) == changing(&dims) && others > 0 && all % others == 0;
            dims[rest] = is_told.then(|| all / others);
        }
        Some(dims)
    }

    fn joined(&self, node: &NodeProto) -> Option<Dims> {
        let mut dims = self.input_dims(node, 0)?.clone();
        let axis = place(int(node, "axis")?, dims.len())?;
        for at in 1..node.input.len() {
            let other = self.input_dims(node, at)?.get(axis)?;
            dims[axis] = dims[axis].zip(*other).and_then(|(one, other)| one.checked_add(other));
        }
        Some(dims)
    }

    fn sliced(&self, node: &NodeProto) -> Option<Dims> {
        let mut dims = self.input_dims(node, 0)?.clone();
        let (starts, ends) = (self.known(node, 1), self.known(node, 2));
        let axes = match node.input.get(3) {
            Some(_) => self.known(node, 3)?,
            None => (0..dims.len() as i64).collect(),
        };
        for (at, &axis) in axes.iter().enumerate() {
            let axis = place(axis, dims.len())?;
            let bound = |list: &Option<Vec<i64>>, size: i64| {
                let value = *list.as_ref()?.get(at)?;
                Some(if value < 0 { (value + size).max(0) } else { value.min(size) })
            };
            dims[axis] =
                dims[axis].and_then(|size| Some((bound(&ends, size)? - bound(&starts, size)?).max(0)));
        }
        // A step other than one is never used where sizes matter.
        node.input
            .get(4)
            .is_none_or(|_| self.known(node, 4).is_some_and(|s| s.iter().all(|&s| s == 1)))
            .then_some(dims)
    }

    fn integers_of(&self, node: &NodeProto) -> Option<Dims> {
        let given = |at: usize| self.integers.get(node.input.get(at)?.as_str());
        match node.op_type() {
            "Shape" => {
                let dims = self.input_dims(node, 0)?;
                let bound = |name: &str, otherwise: usize| match int(node, name) {
                    Some(value) if value < 0 => usize::try_from(value + dims.len() as i64).ok(),
                    Some(value) => usize::try_from(value).ok().map(|value| value.min(dims.len())),
                    None => Some(otherwise),
                };
                dims.get(bound("start", 0)?..bound("end", dims.len())?).map(<[_]>::to_vec)
            }
            "Gather" => {
                let values = given(0)?;
                let places = self.known(node, 1)?;
                places.iter().map(|&at| values.get(place(at, values.len())?).copied()).collect()
            }
            "Slice" => {
                let values = given(0)?;
                let at = |input: usize| {
                    let bound = *self.known(node, input)?.first()?;
                    let len = values.len() as i64;
                    usize::try_from(if bound < 0 { bound + len } else { bound }.clamp(0, len)).ok()
                };
                values.get(at(1)?..at(2)?).map(<[_]>::to_vec)
            }
            "Concat" => (0..node.input.len())
                .map(given)
                .collect::<Option<Vec<_>>>()
                .map(|all| all.into_iter().flatten().copied().collect()),
            "Unsqueeze" | "Squeeze" | "Identity" | "Reshape" => given(0).cloned(),
            "Cast" if matches!(self.element_of(node)?, DataType::Int64 | DataType::Int32) => {
                given(0).cloned()
            }
            "Add" | "Sub" | "Mul" | "Div" => {
                let (one, other) = (given(0)?, given(1)?);
                let compute = |one: &Option<i64>, other: &Option<i64>| {
                    let (one, other) = ((*one)?, (*other)?);
                    match node.op_type() {
                        "Add" => one.checked_add(other),
                        "Sub" => one.checked_sub(other),
                        "Mul" => one.checked_mul(other),
                        _ => one.checked_div(other),
                    }
                };
                (one.len() == other.len())
                    .then(|| one.iter().zip(other).map(|(a, b)| compute(a, b)).collect())
            }
            _ => None,
        }
    }

    fn scalar_of(&self, node: &NodeProto) -> Option<f64> {
        let given = |at: usize| self.scalar(node.input.get(at)?);
        match node.op_type() {
            "Cast" | "Identity" | "Unsqueeze" | "Squeeze" | "Reshape" => given(0),
            "Sqrt" => given(0).map(f64::sqrt),
            "Reciprocal" => given(0).map(f64::recip),
            "Neg" => given(0).map(|value| -value),
            "Mul" => Some(given(0)? * given(1)?),
            "Div" => Some(given(0)? / given(1)?),
            "Pow" => Some(given(0)?.powf(given(1)?)),
            _ => None,
        }
    }
}
