//! Tensors in safetensors files.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::run::files::write_whole;

/// A tensor on the host, row-major: a weight, gradient or moment of a model, or what a run has measured.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Its name; for a weight that of Hugging Face, such as `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// `[out, in]` for a matrix, `[width]` for a norm.
    pub shape: Vec<usize>,
    /// `shape.product()` values.
    pub values: Vec<f32>,
}

/// Writes f32 tensors with one metadata entry (transformers insists on `format: pt` for weights).
pub fn write_tensors(path: &Path, tensors: &[NamedTensor], metadata: (&str, &str)) -> Result<()> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|tensor| tensor.values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let mut views = Vec::with_capacity(tensors.len());
    for (tensor, bytes) in tensors.iter().zip(&bytes) {
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)
            .with_context(|| format!("cannot lay out tensor {} for {}", tensor.name, path.display()))?;
        views.push((tensor.name.as_str(), view));
    }
    let metadata = HashMap::from([(metadata.0.to_owned(), metadata.1.to_owned())]);
    let file = safetensors::serialize(views, Some(metadata))
        .with_context(|| format!("cannot lay out {}", path.display()))?;
    write_whole(path, &file)
}

/// Reads an f32 safetensors file: its tensors and its metadata.
pub fn read_tensors(path: &Path) -> Result<(Vec<NamedTensor>, HashMap<String, String>)> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let damaged = || format!("{} is not a whole safetensors file: it may be damaged", path.display());
    let (_, header) = SafeTensors::read_metadata(&bytes).with_context(damaged)?;
    let file = SafeTensors::deserialize(&bytes).with_context(damaged)?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            bail!(
                "tensor {name} in {} is {:?}, expected F32: convert the file first",
                path.display(),
                view.dtype()
            );
        }
        let values =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        tensors.push(NamedTensor { name: name.to_owned(), shape: view.shape().to_vec(), values });
    }
    Ok((tensors, header.metadata().clone().unwrap_or_default()))
}
