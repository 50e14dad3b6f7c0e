//! Weights in a Hugging Face style folder.

use std::path::Path;

use anyhow::{Context, Result};

use super::config::ModelConfig;
use super::weights::in_order;
use crate::run::tensors::{NamedTensor, read_tensors};
use crate::training::learner::WEIGHTS_FILE;

/// File name of the optimizer's moments and step count.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// File name of the weights that an improvement is measured over.
pub const HISTORY_FILE: &str = "history.safetensors";

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
