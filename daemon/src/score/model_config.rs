//! What scoring needs of a model's `config.json`.

use anyhow::{Context as _, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The keys of `config.json` that scoring needs.
#[derive(Debug)]
pub(super) struct ModelConfig {
    pub(super) vocab_size: Option<u32>,
    pub(super) max_position_embeddings: Option<u32>,
    pub(super) final_logit_softcapping: Option<f32>,
    /// One id, or a list; of several none is the one.
    bos_token_id: Value,
}

/// The value of a key; null stands for one that is not there. An error names the key.
pub(super) fn key<T: DeserializeOwned>(config: &Value, name: &str) -> anyhow::Result<Option<T>> {
    serde_json::from_value(config[name].clone()).with_context(|| format!("`{name}`"))
}

impl ModelConfig {
    /// Takes the keys out of a configuration.
    pub(super) fn new(config: &Value) -> anyhow::Result<Self> {
        if !config.is_object() {
            bail!("it holds no JSON object");
        }
        Ok(Self {
            vocab_size: key(config, "vocab_size")?,
            max_position_embeddings: key(config, "max_position_embeddings")?,
            final_logit_softcapping: key(config, "final_logit_softcapping")?,
            bos_token_id: config["bos_token_id"].clone(),
        })
    }

    /// The token that the model saw at the start of every document, where it is one.
    pub(super) fn bos_token(&self) -> Option<u32> {
        let id = match self.bos_token_id.as_array().map(Vec::as_slice) {
            Some([only]) => only.as_u64(),
            Some(_) => None,
            None => self.bos_token_id.as_u64(),
        };
        id.and_then(|id| u32::try_from(id).ok())
    }
}
