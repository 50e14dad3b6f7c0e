//! Tensors in safetensors files, written so that a reader never sees half a file.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::config::ModelConfig;
use super::weights::{NamedTensor, in_order};

/// File name of the weights in a Hugging Face style folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// File name of the optimizer's moments and step count.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// File name of the weights that an improvement is measured over.
pub const HISTORY_FILE: &str = "history.safetensors";

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
    write_file(path, &file)
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

/// Reads the weights of a Hugging Face style folder and checks that they are those of `config`, in the order of
/// [`specs`](super::weights::specs).
pub fn read_weights(folder: &Path, config: &ModelConfig) -> Result<Vec<NamedTensor>> {
    let path = folder.join(WEIGHTS_FILE);
    let (mut weights, _) = read_tensors(&path)?;
    weights.retain(|weight| {
        // Some tools store these beside the weights; they are computed.
        let copy_of_embedding = config.tie_word_embeddings && weight.name == "lm_head.weight";
        !copy_of_embedding && !weight.name.ends_with(".rotary_emb.inv_freq")
    });
    in_order(config, weights).with_context(|| format!("cannot use {}", path.display()))
}

/// Writes a file under a temporary name, flushes it to disk and renames it into place.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
