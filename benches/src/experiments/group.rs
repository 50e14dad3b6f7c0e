//! Students of one size on one stream.

use serde::Serialize;
use sluice_trainer::model::{ModelConfig, Variant};

use super::kind::Kind;
use super::reference::Stream;

/// Tokens in a sequence, for every model of the experiments.
pub const SEQUENCE_LENGTH: usize = 256;
/// Sequences in a step.
pub const BATCH_SIZE: usize = 8;
/// A model that somebody else has trained: its own `config.json` says its shape.
pub const PRETRAINED: Size = Size { name: "pretrained", hidden: 0, layers: 0, heads: 0 };

/// A model size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Size {
    /// What it is called: about how many parameters.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
}

impl Size {
    /// The shape of the model, with a head of its own.
    pub fn config(self, vocabulary: usize) -> ModelConfig {
        ModelConfig {
            vocab_size: vocabulary,
            hidden_size: self.hidden,
            intermediate_size: (self.hidden * 8).div_ceil(3).next_multiple_of(64),
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.heads,
            max_position_embeddings: SEQUENCE_LENGTH,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            variant: Variant::default(),
        }
    }
}

/// Students of one size on one stream: each kind with each seed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Group {
    /// What they read, and who scores it.
    #[serde(flatten)]
    pub stream: Stream,
    /// How large they are.
    pub size: Size,
    /// What each learns from.
    pub kinds: Vec<Kind>,
    /// Steps of each.
    pub steps: u64,
    /// Steps between evaluations.
    pub eval_every: u64,
    /// A run of each kind with each.
    pub seeds: Vec<u64>,
}

impl Group {
    /// Its name, as in tables and file names.
    pub fn name(&self) -> String {
        format!("{}-{}", self.stream.name(), self.size.name)
    }
}
