//! What a model's weights are: of its matrix products, for what is beside them is little.

use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{GraphProto, NodeProto};
use sluice_schemas::record::Precision;

use super::constant::behind;

/// The arithmetic that most elements of the products' weights are in, of a graph as it was exported; float32 where no product
/// has stored weights.
pub(super) fn precision(graph: &GraphProto) -> Precision {
    let mut elements: Vec<(Precision, i64)> = Vec::new();
    for (precision, count) in graph.node.iter().filter_map(|node| weight(graph, node)) {
        match elements.iter_mut().find(|(known, _)| *known == precision) {
            Some((_, sum)) => *sum = sum.saturating_add(count),
            None => elements.push((precision, count)),
        }
    }
    elements.into_iter().max_by_key(|&(_, count)| count).map_or(Precision::F32, |(precision, _)| precision)
}

/// What the weights of a product are, and how many elements they have; none of a node that is no product with stored weights.
fn weight(graph: &GraphProto, node: &NodeProto) -> Option<(Precision, i64)> {
    let index = match node.op_type() {
        "MatMulNBits" => {
            let integer = |name: &str| node.attribute.iter().find(|attribute| attribute.name() == name)?.i;
            // The operator's own default.
            let bits = integer("bits").unwrap_or(4);
            let precision = if bits <= 4 { Precision::Int4 } else { Precision::Int8 };
            return Some((precision, integer("K")?.saturating_mul(integer("N")?)));
        }
        "MatMul"
        | "Gemm"
        | "FusedMatMul"
        | "MatMulInteger"
        | "MatMulIntegerToFloat"
        | "DynamicQuantizeMatMul"
        | "Attention"
        | "QAttention" => 1,
        "QLinearMatMul" => 3,
        _ => return None,
    };
    let tensor = behind(graph, node.input.get(index)?)?.tensor;
    let precision = match DataType::try_from(tensor.data_type()).ok()? {
        DataType::Float => Precision::F32,
        DataType::Float16 => Precision::F16,
        DataType::Bfloat16 => Precision::Bf16,
        DataType::Int8 | DataType::Uint8 => Precision::Int8,
        DataType::Int4 | DataType::Uint4 => Precision::Int4,
        _ => return None,
    };
    Some((precision, tensor.dims.iter().fold(1_i64, |all, &dim| all.saturating_mul(dim))))
}

#[cfg(test)]
mod tests {
    use sluice_schemas::graph::{int_attribute, raw_tensor};

    use super::*;

    fn product(op_type: &str, inputs: &[&str]) -> NodeProto {
        NodeProto {
            op_type: Some(op_type.to_owned()),
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: vec![format!("{op_type}/out")],
            ..Default::default()
        }
    }

    fn stored(name: &str, element: DataType, dims: &[i64]) -> sluice_schemas::onnx::TensorProto {
        let tensor = raw_tensor(element, dims, vec![].into());
        sluice_schemas::onnx::TensorProto { name: Some(name.to_owned()), ..tensor }
    }

    #[test]
    fn the_most_common_weights_of_products_count() {
        let head = (product("MatMul", &["x", "head"]), stored("head", DataType::Float, &[8, 100]));
        let body = (product("Gemm", &["x", "body"]), stored("body", DataType::Float16, &[8, 64]));
        // As large as all of them, and in no product.
        let embedding = stored("embedding", DataType::Bfloat16, &[8, 4096]);
        let graph = |nodes: &[NodeProto], initializer: Vec<_>| GraphProto {
            node: nodes.to_vec(),
            initializer,
            ..Default::default()
        };
        let of = |graph: &GraphProto| precision(graph);
        assert_eq!(of(&graph(&[], vec![embedding.clone()])), Precision::F32);
        let both = graph(&[head.0.clone(), body.0.clone()], vec![head.1.clone(), body.1.clone(), embedding]);
        assert_eq!(of(&both), Precision::F32);
        let more =
            graph(&[head.0.clone(), body.0.clone(), body.0.clone()], vec![head.1.clone(), body.1.clone()]);
        assert_eq!(of(&more), Precision::F16, "a float32 head over a 16-bit body");
        for (bits, expected) in [(4, Precision::Int4), (8, Precision::Int8)] {
            let mut packed = product("MatMulNBits", &["x", "packed", "scales"]);
            packed.attribute =
                vec![int_attribute("K", 64), int_attribute("N", 64), int_attribute("bits", bits)];
            assert_eq!(of(&graph(&[head.0.clone(), packed], vec![head.1.clone()])), expected);
        }
        let mut dequantized = product("DequantizeLinear", &["packed", "scale"]);
        dequantized.output = vec!["weight".to_owned()];
        let eight = graph(
            &[dequantized, product("MatMul", &["x", "weight"])],
            vec![stored("packed", DataType::Uint8, &[8, 8])],
        );
        assert_eq!(of(&eight), Precision::Int8);
    }
}
