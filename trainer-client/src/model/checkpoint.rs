//! Weights in a Hugging Face style folder: one file or several with an index, by whatever wrapper's names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::config::ModelConfig;
use super::weights::in_order;
use crate::run::files::write_json;
use crate::run::tensors::{NamedTensor, Pending, Stored, TensorFile, write_pending};
use crate::training::learner::WEIGHTS_FILE;

/// File name of the optimizer's moments and step count.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// File name of the weights that an improvement is measured over.
pub const HISTORY_FILE: &str = "history.safetensors";
/// Which of several files holds which weight.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// What weights files say of themselves, for transformers.
pub(crate) const WEIGHTS_METADATA: (&str, &str) = ("format", "pt");

/// Parts of a weight's name that wrappers put there: `torch.compile`, DDP, FSDP and activation checkpointing.
const WRAPPERS: [&str; 4] = ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];
/// A weight that every model has.
const EMBEDDING: &str = "embed_tokens.weight";
/// What stands before the names of the decoder's body.
const BODY: &str = "model.";

/// The content of [`INDEX_FILE`].
#[derive(Serialize, Deserialize)]
struct Index {
    #[serde(default)]
    metadata: BTreeMap<String, serde_json::Value>,
    /// File of each weight, by name.
    weight_map: BTreeMap<String, String>,
}

/// Reads the weights of a Hugging Face style folder and checks that they are those of `config`, in the order of
/// [`specs`](super::weights::specs). Those in 16 bits are widened.
pub fn read_weights(folder: &Path, config: &ModelConfig) -> Result<Vec<NamedTensor>> {
    let mut weights = read_files(folder)?;
    unwrap_names(&mut weights);
    weights.retain(|weight| {
        // Some tools store these beside the weights; they are computed.
        let copy_of_embedding = config.tie_word_embeddings && weight.name == "lm_head.weight";
        !copy_of_embedding && !weight.name.ends_with(".rotary_emb.inv_freq")
    });
    in_order(config, weights).with_context(|| format!("cannot use the weights in {}", folder.display()))
}

/// All tensors of the folder's weights files, by the names in them.
fn read_files(folder: &Path) -> Result<Vec<NamedTensor>> {
    let whole = folder.join(WEIGHTS_FILE);
    if whole.exists() {
        let mut file = TensorFile::open(&whole)?;
        return file.names().iter().map(|name| file.read(name)).collect();
    }
    let path = folder.join(INDEX_FILE);
    if !path.exists() {
        bail!(
            "{} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{}",
            folder.display(),
            if folder.join("pytorch_model.bin").exists()
                || folder.join("pytorch_model.bin.index.json").exists()
            {
                ", but PyTorch's pickled weights: have transformers load them and save them again"
            } else {
                ""
            }
        );
    }
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let Index { weight_map, .. } = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not an index of weights", path.display()))?;
    let mut weights = Vec::with_capacity(weight_map.len());
    for shard in weight_map.values().collect::<BTreeSet<_>>() {
        ensure!(
            Path::new(shard).file_name().is_some_and(|name| name == shard.as_str()),
            "{} names a file outside its folder: {shard}",
            path.display()
        );
        let mut file = TensorFile::open(&folder.join(shard))?;
        for (name, _) in weight_map.iter().filter(|(_, of)| *of == shard) {
            weights.push(file.read(name)?);
        }
    }
    Ok(weights)
}

/// Takes off what wrappers have put into names.
fn unwrap_names(weights: &mut [NamedTensor]) {
    for weight in weights.iter_mut() {
        let parts = weight.name.split('.').filter(|part| !WRAPPERS.contains(part));
        weight.name = parts.collect::<Vec<_>>().join(".");
    }
    // What else stands before the embedding's name, stands before all: a module that holds the model, or nothing at all where
    // only the body was saved.
    let embeddings = weights.iter().filter_map(|weight| weight.name.strip_suffix(EMBEDDING));
    let Some(before) = embeddings.min_by_key(|before| before.len()).map(str::to_owned) else { return };
    let (outer, inner) = match before.strip_suffix(BODY) {
        Some(outer) => (outer.to_owned(), ""),
        None => (before, BODY),
    };
    for weight in weights {
        if let Some(name) = weight.name.strip_prefix(&outer) {
            weight.name = format!("{inner}{name}");
        }
    }
}

/// Writes weights as transformers does: one file, or several with an index where they are more than `shard_bytes_max`. A
/// weight that is larger by itself has a file of its own.
pub fn write_weights(
    folder: &Path,
    tensors: Vec<Pending<'_>>,
    stored: Stored,
    shard_bytes_max: usize,
) -> Result<()> {
    let total: usize = tensors.iter().map(|tensor| tensor.bytes(stored)).sum();
    let mut shards: Vec<Vec<Pending<'_>>> = vec![vec![]];
    let mut bytes = 0;
    for tensor in tensors {
        let own = tensor.bytes(stored);
        if bytes + own > shard_bytes_max && bytes > 0 {
            shards.push(vec![]);
            bytes = 0;
        }
        bytes += own;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    if shards.len() == 1 {
        let only = shards.pop().unwrap_or_default();
        return write_pending(&folder.join(WEIGHTS_FILE), only, stored, WEIGHTS_METADATA);
    }
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (number, shard) in (1..).zip(shards) {
        let name = format!("model-{number:05}-of-{count:05}.safetensors");
        weight_map.extend(shard.iter().map(|tensor| (tensor.name().to_owned(), name.clone())));
        write_pending(&folder.join(&name), shard, stored, WEIGHTS_METADATA)?;
    }
    let metadata = BTreeMap::from([("total_size".to_owned(), total.into())]);
    write_json(&folder.join(INDEX_FILE), &Index { metadata, weight_map })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unwrapped(names: &[&str]) -> Vec<String> {
        let tensor = |name: &&str| NamedTensor { name: (*name).to_owned(), shape: vec![0], values: vec![] };
        let mut weights: Vec<_> = names.iter().map(tensor).collect();
        unwrap_names(&mut weights);
        weights.into_iter().map(|weight| weight.name).collect()
    }

    #[test]
    fn names_lose_what_wrappers_put_there() {
        let own = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"];
        assert_eq!(unwrapped(&own), own);
        for prefix in ["_orig_mod.", "module.", "module._orig_mod.", "base.", "model.", "a.b.model."] {
            let wrapped = own.map(|name| format!("{prefix}{name}"));
            assert_eq!(unwrapped(&wrapped.each_ref().map(String::as_str)), own, "{prefix}");
        }
        let inside = "model.layers.0._checkpoint_wrapped_module.mlp._fsdp_wrapped_module.up_proj.weight";
        assert_eq!(unwrapped(&[own[0], inside, own[2]]), own);
        let body = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight"];
        assert_eq!(unwrapped(&body), own[..2]);
    }
}
