//! The shape of a Llama-style decoder, to and from Hugging Face's `config.json`.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sluice_text::json;

/// File name of a model's configuration in a Hugging Face style folder.
pub const CONFIG_FILE: &str = "config.json";

/// Standard deviation of freshly made matrices, as in Llama.
pub const INITIAL_DEVIATION: f64 = 0.02;

/// Largest size of anything in a model: more is a mistake, and products of such sizes still fit.
const SIZE_MAX: usize = 1 << 24;

/// The shape of a Llama-style decoder; sizes are counts of elements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Number of token ids: ids run from 0 to `vocab_size - 1`.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Number of query heads; divides `hidden_size`.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Longest sequence in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Added to the mean square inside a root mean square norm.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Whether the LM head is the token embedding itself.
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

fn default_rope_theta() -> f64 {
    10_000.0
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

/// The keys of `config.json` that decide how a Llama model computes, under Hugging Face's names and defaults.
#[derive(Deserialize)]
struct HuggingFaceConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
}

impl ModelConfig {
    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.heads
    }

    /// Checks that the sizes fit together; the error names the field and what would be right.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            ensure!(
                (1..=SIZE_MAX).contains(&value),
                "{field} of the model must be between 1 and {SIZE_MAX}, not {value}"
            );
        }
        let Self { hidden_size, heads, kv_heads, .. } = self;
        ensure!(
            hidden_size.is_multiple_of(*heads),
            "hidden_size {hidden_size} is not a multiple of heads {heads}: choose sizes that divide"
        );
        ensure!(
            self.head_dim().is_multiple_of(2),
            "head width {} (hidden_size {hidden_size} / heads {heads}) is odd, but rotary embeddings pair \
             dimensions: make it even",
            self.head_dim()
        );
        ensure!(
            heads.is_multiple_of(*kv_heads),
            "heads {heads} is not a multiple of kv_heads {kv_heads}: choose sizes that divide"
        );
        ensure!(
            self.rope_theta.is_finite() && self.rope_theta > 1.0,
            "rope_theta {} must be above 1 (Llama uses 10000)",
            self.rope_theta
        );
        ensure!(
            self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0,
            "rms_norm_eps {} must be above 0 (Llama uses 1e-6 or 1e-5)",
            self.rms_norm_eps
        );
        Ok(())
    }

    /// Reads `config.json` in `folder`; fails if it is not a Llama model that this decoder computes exactly.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let json = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::from_hugging_face(&json).with_context(|| format!("cannot use {}", path.display()))
    }

    /// Parses a Hugging Face `config.json`.
    pub fn from_hugging_face(json: &[u8]) -> Result<Self> {
        let file: HuggingFaceConfig = json::from_slice(json).context("not a Llama configuration")?;
        ensure!(file.model_type == "llama", "model_type is \"{}\", expected \"llama\"", file.model_type);
        if let Some(activation) = &file.hidden_act {
            ensure!(activation == "silu", "hidden_act is \"{activation}\", but only \"silu\" is implemented");
        }
        for (key, bias) in [("attention_bias", file.attention_bias), ("mlp_bias", file.mlp_bias)] {
            ensure!(!bias.unwrap_or(false), "{key} is true, but layers with biases are not implemented");
        }
        let config = Self {
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            layers: file.num_hidden_layers,
            heads: file.num_attention_heads,
            kv_heads: file.num_key_value_heads.unwrap_or(file.num_attention_heads),
            max_position_embeddings: file.max_position_embeddings.unwrap_or(2048),
            rope_theta: rope_theta(&file)?,
            rms_norm_eps: file.rms_norm_eps.unwrap_or_else(default_rms_norm_eps),
            tie_word_embeddings: file.tie_word_embeddings.unwrap_or(false),
        };
        config.validate()?;
        if let Some(head_dim) = file.head_dim {
            ensure!(
                head_dim == config.head_dim(),
                "head_dim is {head_dim}, but only hidden_size / num_attention_heads = {} is implemented",
                config.head_dim()
            );
        }
        Ok(config)
    }

    /// The text of a Hugging Face `config.json` for a `LlamaForCausalLM` in single precision.
    pub fn to_hugging_face(&self) -> String {
        let value = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim(),
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "attention_dropout": 0.0,
            "initializer_range": INITIAL_DEVIATION,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": true,
            // transformers reads `dtype` from version 4.56 on and `torch_dtype` before.
            "dtype": "float32",
            "torch_dtype": "float32",
        });
        format!("{value:#}\n")
    }
}

/// The rotary base, from `rope_theta` or from the `rope_parameters` of transformers 5.
fn rope_theta(file: &HuggingFaceConfig) -> Result<f64> {
    let mut theta = file.rope_theta;
    for scaling in [&file.rope_scaling, &file.rope_parameters].into_iter().flatten() {
        match scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str) {
            None | Some("default") => {}
            Some(kind) => {
                bail!("rotary embeddings are scaled (\"{kind}\"), but only \"default\" is implemented")
            }
        }
        theta = theta.or_else(|| scaling.get("rope_theta").and_then(Value::as_f64));
    }
    Ok(theta.unwrap_or_else(default_rope_theta))
}
