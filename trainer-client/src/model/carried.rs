//! What a published folder holds beside a shape and weights, and what of it goes along with weights that have learnt.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use sluice_text::json;

use super::config::{CONFIG_FILE, ModelConfig};
use crate::run::files::write_whole;
use crate::run::tensors::Stored;

/// What of a published folder belongs to the model and not to its tokenizer.
const MODEL_FILES: [&str; 1] = ["generation_config.json"];
/// What stands beside a `tokenizer.json`, which a run writes by itself.
const TOKENIZER_FILES: [&str; 8] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];
/// The names of a tensor type in `config.json`, by age.
const DTYPE_KEYS: [&str; 2] = ["dtype", "torch_dtype"];

/// What a folder holds beside a shape and weights, to be handed on: its `config.json` with keys that nothing here looks at,
/// such as the tokens that begin and end a text, and its side files.
#[derive(Clone, Debug, Default)]
pub struct Carried {
    config: Map<String, Value>,
    files: Vec<(&'static str, Vec<u8>)>,
}

impl Carried {
    /// Reads what is there beside the weights.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let json = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config = json::from_slice(&json).with_context(|| format!("cannot use {}", path.display()))?;
        let mut files = Vec::new();
        for name in MODEL_FILES.into_iter().chain(TOKENIZER_FILES) {
            let path = folder.join(name);
            match fs::read(&path) {
                Ok(bytes) => files.push((name, bytes)),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot read {}", path.display()));
                }
            }
        }
        Ok(Self { config, files })
    }

    /// The token that begins a text, where `config.json` names one and no list.
    pub fn bos_token(&self) -> Option<u32> {
        self.config.get("bos_token_id")?.as_u64()?.try_into().ok()
    }

    /// The same without what belongs to the tokenizer, where another one has taken its place.
    #[must_use]
    pub fn without_tokenizer(mut self) -> Self {
        self.files.retain(|(name, _)| MODEL_FILES.contains(name));
        self
    }

    /// The text of `config.json` for weights that are stored so: as it was read, but for the type of the tensors and for the
    /// longest sequence that `config` allows where that `is_exact`; made anew where nothing was read.
    fn config(&self, config: &ModelConfig, stored: Stored, is_exact: bool) -> Result<String> {
        let made: Map<String, Value>;
        let mut map = if self.config.is_empty() {
            made = serde_json::from_str(&config.to_hugging_face()).context("cannot make a config.json")?;
            made
        } else {
            self.config.clone()
        };
        for key in DTYPE_KEYS {
            map.insert(key.to_owned(), stored.torch_name().into());
        }
        let longest = Value::from(config.max_position_embeddings);
        if is_exact && map.get("max_position_embeddings") != Some(&longest) {
            map.insert("max_position_embeddings".to_owned(), longest);
        }
        Ok(format!("{:#}\n", Value::Object(map)))
    }

    /// Writes `config.json` and the side files into a folder of the whole model.
    pub fn write(&self, folder: &Path, config: &ModelConfig, stored: Stored) -> Result<()> {
        write_whole(&folder.join(CONFIG_FILE), self.config(config, stored, false)?.as_bytes())?;
        for (name, bytes) in &self.files {
            write_whole(&folder.join(name), bytes)?;
        }
        Ok(())
    }

    /// As [`Carried::write`], for a graph, which sees no longer sequence than the decoder.
    pub fn write_for_graph(&self, folder: &Path, config: &ModelConfig, stored: Stored) -> Result<()> {
        self.write(folder, config, stored)?;
        write_whole(&folder.join(CONFIG_FILE), self.config(config, stored, true)?.as_bytes())
    }
}
