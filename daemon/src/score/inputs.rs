//! Inputs that only a generating model needs: made constant, so that scoring feeds none of them.
//!
//! A whole window is given at once, so the cache of keys and values (`past_key_values.*`) is empty in every run. The
//! empty tensors are made inside the graph, of the batch's size and in the cache's own type.

use sluice_schemas::graph::{GraphBuilder, int_attribute, raw_tensor, tensor_attribute};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::tensor_shape_proto::dimension;
use sluice_schemas::onnx::{GraphProto, NodeProto, TensorProto, ValueInfoProto, type_proto};

use super::graft_error::GraftError;
use super::names::{ATTENTION_MASK, POSITION_IDS, ROWS_INPUT, TARGETS_INPUT, TOKEN_IDS, TOKEN_TYPE_IDS};

/// Replaces the inputs that are the same in every run by what they are; says which, and what each became.
///
/// An input that Sluice neither feeds nor can settle is an error that names it.
pub(super) fn settle(graph: &mut GraphProto) -> Result<Vec<(String, &'static str)>, GraftError> {
    let mut builder = GraphBuilder::new("sluice/input/");
    let mut settled = Vec::new();
    for input in wanted(graph) {
        let name = input.name().to_owned();
        let what = match name.as_str() {
            TOKEN_IDS | ATTENTION_MASK | POSITION_IDS | ROWS_INPUT | TARGETS_INPUT => continue,
            "num_logits_to_keep" | "logits_to_keep" => keep_all_logits(&mut builder, input),
            "cache_position" => count_positions(&mut builder, input),
            _ if name.starts_with("past_key_values") || name.starts_with("past_") => {
                empty_cache(&mut builder, input)?
            }
            _ => {
                let why = "which Sluice does not know; export it with input_ids, attention_mask, position_ids \
                           and past_key_values alone";
                return Err(GraftError::UnknownInput { name, why: why.to_owned() });
            }
        };
        settled.push((name, what));
    }
    graph.input.retain(|input| !settled.iter().any(|(name, _)| name == input.name()));
    let (nodes, initializers) = builder.finish();
    graph.initializer.extend(initializers);
    // First of all, because nodes stand in topological order.
    graph.node.splice(0..0, nodes);
    Ok(settled)
}

/// Makes the segments of a token classifier 0 everywhere, for a document stands by itself; says whether it asked for them. A
/// language model adds an embedding for them that it was not trained with.
pub(super) fn settle_token_types(graph: &mut GraphProto) -> Option<(String, &'static str)> {
    let input = wanted(graph).find(|input| input.name() == TOKEN_TYPE_IDS)?;
    let element = element(input);
    let mut builder = GraphBuilder::new("sluice/token_types/");
    let shape = builder.node("Shape", &[TOKEN_IDS], vec![]);
    let zero = raw_tensor(DataType::Int64, &[1], 0_i64.to_le_bytes().to_vec().into());
    let zeros = builder.node("ConstantOfShape", &[&shape], vec![tensor_attribute("value", zero)]);
    cast_to(&mut builder, &zeros, element, TOKEN_TYPE_IDS);
    graph.input.retain(|input| input.name() != TOKEN_TYPE_IDS);
    let (nodes, initializers) = builder.finish();
    graph.initializer.extend(initializers);
    // First of all, because nodes stand in topological order.
    graph.node.splice(0..0, nodes);
    Some((TOKEN_TYPE_IDS.to_owned(), "0, for a document by itself"))
}

/// The inputs that must be fed. Files of IR version 3 list their weights among the inputs.
pub(super) fn wanted(graph: &GraphProto) -> impl Iterator<Item = &ValueInfoProto> {
    let is_stored =
        |input: &ValueInfoProto| graph.initializer.iter().any(|tensor| tensor.name() == input.name());
    graph.input.iter().filter(move |input| !is_stored(input))
}

/// Element type of a graph's input.
pub(super) fn element(input: &ValueInfoProto) -> DataType {
    tensor_type(input).and_then(|tensor| DataType::try_from(tensor.elem_type()).ok()).unwrap_or_default()
}

fn tensor_type(input: &ValueInfoProto) -> Option<&type_proto::Tensor> {
    match input.r#type.as_ref()?.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some(tensor),
        _ => None,
    }
}

/// Sizes of an input's dimensions; nothing where one changes from run to run.
fn dimensions(input: &ValueInfoProto) -> Option<Vec<Option<i64>>> {
    let shape = tensor_type(input)?.shape.as_ref()?;
    let size = |value: &Option<dimension::Value>| match value {
        Some(dimension::Value::DimValue(size)) => Some(*size),
        _ => None,
    };
    Some(shape.dim.iter().map(|dim| size(&dim.value)).collect())
}

/// 0, which asks for the logits of every position.
fn keep_all_logits(builder: &mut GraphBuilder, input: &ValueInfoProto) -> &'static str {
    let (bytes, element) = match element(input) {
        DataType::Int32 => (0_i32.to_le_bytes().to_vec(), DataType::Int32),
        _ => (0_i64.to_le_bytes().to_vec(), DataType::Int64),
    };
    let dims = vec![1; dimensions(input).map_or(0, |dims| dims.len())];
    let zero =
        TensorProto { name: Some(input.name().to_owned()), ..raw_tensor(element, &dims, bytes.into()) };
    builder.constant(zero);
    "0, for all positions"
}

/// 0, 1, 2, … up to the length of a row.
fn count_positions(builder: &mut GraphBuilder, input: &ValueInfoProto) -> &'static str {
    let shape = builder.node("Shape", &[TOKEN_IDS], vec![]);
    let axis = builder.int(1);
    let length = builder.node("Gather", &[&shape, &axis], vec![]);
    let (start, step) = (builder.int(0), builder.int(1));
    let positions = builder.node("Range", &[&start, &length, &step], vec![]);
    cast_to(builder, &positions, element(input), input.name());
    "0, 1, 2, …"
}

/// A cache of no positions, of the batch's size.
fn empty_cache(builder: &mut GraphBuilder, input: &ValueInfoProto) -> Result<&'static str, GraftError> {
    let refuse = |why: &str| GraftError::UnknownInput { name: input.name().to_owned(), why: why.to_owned() };
    let dims = dimensions(input).ok_or_else(|| refuse("whose shape the graph does not say"))?;
    // [batch, heads, past, width], or with heads and past the other way round: the size that changes is the past's.
    let changing: Vec<usize> = (1..dims.len()).filter(|&axis| dims[axis].is_none()).collect();
    let &[past] = changing.as_slice() else {
        return Err(refuse(
            "a cache in whose shape not just the batch and the past change from run to run; export it with a \
             cache of [batch, heads, past, width], or without one (`use_cache=False`)",
        ));
    };
    let batch = if let Some(size) = dims[0] {
        builder.ints(&[size])
    } else {
        let shape = builder.node("Shape", &[TOKEN_IDS], vec![]);
        let first = builder.ints(&[0]);
        builder.node("Gather", &[&shape, &first], vec![])
    };
    let rest: Vec<i64> =
        (1..dims.len()).map(|axis| if axis == past { 0 } else { dims[axis].unwrap_or(0) }).collect();
    let rest = builder.ints(&rest);
    let shape = builder.node("Concat", &[&batch, &rest], vec![int_attribute("axis", 0)]);
    let zero = raw_tensor(DataType::Float, &[1], 0.0_f32.to_le_bytes().to_vec().into());
    let empty = builder.node("ConstantOfShape", &[&shape], vec![tensor_attribute("value", zero)]);
    cast_to(builder, &empty, element(input), input.name());
    Ok("an empty cache")
}

fn cast_to(builder: &mut GraphBuilder, value: &str, element: DataType, name: &str) {
    builder.push(NodeProto {
        name: Some(format!("sluice/input/{name}")),
        op_type: Some("Cast".to_owned()),
        input: vec![value.to_owned()],
        output: vec![name.to_owned()],
        attribute: vec![int_attribute("to", i64::from(i32::from(element)))],
        ..Default::default()
    });
}
