//! The tables of rotary angles that a graph holds.

use std::path::Path;

use anyhow::Context as _;
use sluice_schemas::onnx::tensor_proto::DataLocation;
use sluice_schemas::onnx::{GraphProto, NodeProto, TensorProto};

use super::claims::Rotation;
use super::constant::{constant_tensor, floats, inlined};
use super::findings::{are_frequencies, may_be_frequencies};

/// Every table of `graph`: frequencies by themselves, and the cosines and sines that rotary operators are given. Tables in
/// external data are read from `data_folder`.
pub(super) fn rotations(graph: &GraphProto, data_folder: Option<&Path>) -> anyhow::Result<Vec<Rotation>> {
    let mut found: Vec<Rotation> = Vec::new();
    let constants = graph.node.iter().filter_map(constant_tensor);
    for tensor in graph.initializer.iter().chain(constants).filter(|tensor| may_be_frequencies(tensor)) {
        if let Some(values) = values(tensor, data_folder)?.filter(|values| are_frequencies(values)) {
            found.push(Rotation { frequencies: values.into_iter().map(f64::from).collect(), factor: 1.0 });
        }
    }
    let mut seen = Vec::new();
    for [cosines, sines] in graph.node.iter().filter_map(tables) {
        let stored = |name: &str| graph.initializer.iter().find(|tensor| tensor.name() == name);
        let (Some(cosines), Some(sines)) = (stored(cosines), stored(sines)) else { continue };
        if seen.contains(&cosines.name()) {
            continue;
        }
        seen.push(cosines.name());
        let &[positions, pairs] = cosines.dims.as_slice() else { continue };
        if positions < 2 || cosines.dims != sines.dims {
            continue;
        }
        if let (Some(cosines), Some(sines)) = (values(cosines, data_folder)?, values(sines, data_folder)?) {
            // Position 1 is turned by the frequencies themselves, which are not above 1.
            let pairs = pairs as usize;
            let row = || cosines.iter().zip(&sines).skip(pairs).take(pairs);
            let angle = |(cosine, sine): (&f32, &f32)| f64::from(*sine).atan2(f64::from(*cosine));
            let factor =
                row().next().map_or(1.0, |(cosine, sine)| f64::from(*cosine).hypot(f64::from(*sine)));
            found.push(Rotation { frequencies: row().map(angle).collect(), factor });
        }
    }
    Ok(found)
}

/// Names of the cosines and sines that a node rotates by.
fn tables(node: &NodeProto) -> Option<[&str; 2]> {
    let first = match node.op_type() {
        "GroupQueryAttention" => 7,
        "RotaryEmbedding" if node.domain() == "com.microsoft" => 2,
        "RotaryEmbedding" => 1,
        _ => return None,
    };
    Some([node.input.get(first)?, node.input.get(first + 1)?])
}

fn values(tensor: &TensorProto, data_folder: Option<&Path>) -> anyhow::Result<Option<Vec<f32>>> {
    Ok(match data_folder {
        Some(folder) if tensor.data_location() == DataLocation::External => floats(
            &inlined(tensor, folder)
                .with_context(|| format!("cannot read `{}` from the model's external data", tensor.name()))?,
        ),
        _ => floats(tensor),
    })
}
