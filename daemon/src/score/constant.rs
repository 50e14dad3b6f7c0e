//! Reading the constants of a graph: which stored tensor stands behind a value, and what small ones hold.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use half::{bf16, f16};
use sluice_schemas::graph::raw_tensor;
use sluice_schemas::onnx::tensor_proto::{DataLocation, DataType};
use sluice_schemas::onnx::{GraphProto, NodeProto, StringStringEntryProto, TensorProto};

/// A stored tensor, and whether a value made of it has its two dimensions swapped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored<'a> {
    /// The tensor.
    pub(super) tensor: &'a TensorProto,
    /// Whether an odd number of transpositions stands between.
    pub(super) transposed: bool,
}

/// The stored tensor from which the constant `name` is made by transpositions and casts, such as the embedding that a
/// tied head transposes.
pub(super) fn behind<'a>(graph: &'a GraphProto, name: &str) -> Option<Stored<'a>> {
    let mut name = name;
    let mut transposed = false;
    // Bounded: a chain cannot be longer than the graph.
    for _ in 0..=graph.node.len() {
        if let Some(tensor) = graph.initializer.iter().find(|tensor| tensor.name() == name) {
            return Some(Stored { tensor, transposed });
        }
        let node = graph.node.iter().find(|node| node.output.iter().any(|output| output == name))?;
        match node.op_type() {
            "Constant" => {
                return constant_tensor(node).map(|tensor| Stored { tensor, transposed });
            }
            "Transpose" => transposed = !transposed,
            "Cast" | "Identity" | "DequantizeLinear" => {}
            _ => return None,
        }
        name = node.input.first()?;
    }
    None
}

/// The tensor that a `Constant` node holds.
pub(super) fn constant_tensor(node: &NodeProto) -> Option<&TensorProto> {
    node.attribute.iter().find_map(|attribute| attribute.t.as_ref())
}

/// The one value of the constant `name`.
pub(super) fn scalar(graph: &GraphProto, name: &str) -> Option<f32> {
    match floats(behind(graph, name)?.tensor)?.as_slice() {
        &[value] => Some(value),
        _ => None,
    }
}

/// The values of a tensor of floating-point numbers that is stored in the graph itself.
pub(super) fn floats(tensor: &TensorProto) -> Option<Vec<f32>> {
    if tensor.data_location() == DataLocation::External {
        return None;
    }
    let raw = tensor.raw_data.as_deref().filter(|raw| !raw.is_empty());
    let halves = |convert: fn(u16) -> f32| match raw {
        Some(raw) => raw.chunks_exact(2).map(|b| convert(u16::from_le_bytes([b[0], b[1]]))).collect(),
        None => tensor.int32_data.iter().map(|&bits| convert(bits as u16)).collect::<Vec<f32>>(),
    };
    match DataType::try_from(tensor.data_type()).ok()? {
        DataType::Float => Some(match raw {
            Some(raw) => raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            None => tensor.float_data.clone(),
        }),
        DataType::Float16 => Some(halves(|bits| f16::from_bits(bits).to_f32())),
        DataType::Bfloat16 => Some(halves(|bits| bf16::from_bits(bits).to_f32())),
        _ => None,
    }
}

/// The values of a tensor of integers that is stored in the graph itself.
pub(super) fn integers(tensor: &TensorProto) -> Option<Vec<i64>> {
    if tensor.data_location() == DataLocation::External {
        return None;
    }
    let raw = tensor.raw_data.as_deref().filter(|raw| !raw.is_empty());
    match (DataType::try_from(tensor.data_type()).ok()?, raw) {
        (DataType::Int64, Some(raw)) => {
            raw.chunks_exact(8).map(|bytes| bytes.try_into().ok().map(i64::from_le_bytes)).collect()
        }
        (DataType::Int64, None) => Some(tensor.int64_data.clone()),
        (DataType::Int32, Some(raw)) => raw
            .chunks_exact(4)
            .map(|bytes| bytes.try_into().ok().map(|bytes| i64::from(i32::from_le_bytes(bytes))))
            .collect(),
        (DataType::Int32, None) => Some(tensor.int32_data.iter().map(|&value| i64::from(value)).collect()),
        _ => None,
    }
}

/// A small tensor of external data with its values in itself.
pub(super) fn inlined(tensor: &TensorProto, folder: &Path) -> anyhow::Result<TensorProto> {
    let entries = &tensor.external_data;
    let entry =
        |key: &str| entries.iter().find(|entry| entry.key() == key).map(StringStringEntryProto::value);
    let bytes_each = match DataType::try_from(tensor.data_type()) {
        Ok(DataType::Float) => 4,
        Ok(DataType::Float16 | DataType::Bfloat16) => 2,
        // Frequencies in another type are none that `floats` reads.
        _ => 0,
    };
    let mut file = File::open(folder.join(entry("location").unwrap_or_default()))?;
    // The shape is the file's word: no memory is had for more than the data can hold.
    let elements = tensor.dims.iter().try_fold(1_u64, |all, &dim| all.checked_mul(u64::try_from(dim).ok()?));
    let bytes = elements
        .and_then(|all| all.checked_mul(bytes_each))
        .filter(|&bytes| file.metadata().is_ok_and(|data| bytes <= data.len()));
    let Some(bytes) = bytes else {
        anyhow::bail!(
            "the tensor `{}` is said to be of shape {:?}, which its external data cannot hold; export or copy the model again",
            tensor.name(),
            tensor.dims
        );
    };
    let mut raw = vec![0; bytes as usize];
    file.seek(SeekFrom::Start(entry("offset").map_or(Ok(0), str::parse)?))?;
    file.read_exact(&mut raw)?;
    let mut inlined = raw_tensor(DataType::Undefined, &tensor.dims, raw.into());
    inlined.data_type = tensor.data_type;
    Ok(inlined)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::*;

    #[test]
    fn a_shape_that_the_data_cannot_hold_is_an_error_and_takes_no_memory() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("data"), 1.5_f32.to_le_bytes()).unwrap();
        let location = StringStringEntryProto { key: Some("location".into()), value: Some("data".into()) };
        let tensor = |dims: &[i64]| TensorProto {
            external_data: vec![location.clone()],
            ..raw_tensor(DataType::Float, dims, vec![].into())
        };
        let read = inlined(&tensor(&[1]), folder.path()).unwrap();
        assert_eq!(floats(&read).unwrap().len(), 1);
        for dims in [&[2][..], &[1 << 40], &[1 << 40, 1 << 40], &[-1], &[i64::MIN, 2]] {
            let error = inlined(&tensor(dims), folder.path()).unwrap_err().to_string();
            assert!(error.contains("cannot hold"), "{error}");
        }
    }
}
