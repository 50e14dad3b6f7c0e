//! The shape of a Llama-style decoder. How it is read from and written to Hugging Face's `config.json` is in
//! [`hugging_face`](super::hugging_face).

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::rope::RopeScaling;

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
    /// Number of query heads; divides `hidden_size`, unless heads have a width of their own.
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
    /// What is other than in Llama.
    #[serde(default, skip_serializing_if = "Variant::is_llama")]
    pub variant: Variant,
}

pub(super) fn default_rope_theta() -> f64 {
    10_000.0
}

pub(super) fn default_rms_norm_eps() -> f64 {
    1e-6
}

/// What a family of models changes in Llama's layers, or adds to them. The default is Llama itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Variant {
    /// Width of one attention head, where it is not `hidden_size / heads` (Qwen3).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Whether the projections of queries, keys and values have biases (Qwen2).
    pub qkv_bias: bool,
    /// Whether each head's query and key go through a root mean square norm (Qwen3).
    pub qk_norm: bool,
    /// How rotary frequencies are scaled for contexts longer than those that a model was first trained on.
    pub rope_scaling: RopeScaling,
    /// What is multiplied where (Granite).
    pub scales: Scales,
}

impl Variant {
    /// Whether it is Llama itself.
    pub fn is_llama(&self) -> bool {
        *self == Self::default()
    }
}

/// Factors of Granite, all 1 in other families.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scales {
    /// Of embedded tokens.
    pub embedding: f64,
    /// Of products of queries and keys; none for `1 / sqrt(head_dim)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention: Option<f64>,
    /// Of what attention and MLP add to the residual stream.
    pub residual: f64,
    /// What logits are divided by.
    pub logits: f64,
}

impl Default for Scales {
    fn default() -> Self {
        Self { embedding: 1.0, attention: None, residual: 1.0, logits: 1.0 }
    }
}

impl ModelConfig {
    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.variant.head_dim.unwrap_or(self.hidden_size / self.heads)
    }

    /// What products of queries and keys are multiplied with.
    pub fn attention_scale(&self) -> f64 {
        self.variant.scales.attention.unwrap_or(1.0 / (self.head_dim() as f64).sqrt())
    }

    /// Radians a position for each pair of a head's dimensions, `[head_dim / 2]`, and what cosines and sines are
    /// multiplied with.
    pub(crate) fn rotary_frequencies(&self) -> (Vec<f64>, f64) {
        self.variant.rope_scaling.frequencies(self.head_dim(), self.rope_theta)
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
        let Self { hidden_size, heads, kv_heads, variant, .. } = self;
        ensure!(
            variant.head_dim.is_some() || hidden_size.is_multiple_of(*heads),
            "hidden_size {hidden_size} is not a multiple of heads {heads}: choose sizes that divide"
        );
        ensure!(
            (1..=SIZE_MAX).contains(&self.head_dim()) && self.head_dim().is_multiple_of(2),
            "head width {} (head_dim, or hidden_size {hidden_size} / heads {heads}) is odd or out of range, but rotary \
             embeddings pair dimensions: make it even",
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
        let Scales { embedding, attention, residual, logits } = variant.scales;
        let factors = [
            ("embedding_multiplier", Some(embedding)),
            ("attention_multiplier", attention),
            ("residual_multiplier", Some(residual)),
            ("logits_scaling", Some(logits)),
        ];
        for (name, factor) in factors {
            ensure!(
                factor.is_none_or(|factor| factor.is_finite() && factor != 0.0),
                "{name} of the model must be a number other than 0"
            );
        }
        variant.rope_scaling.validate()
    }
}
