//! Floating point operations of training and scoring, from the shapes alone.
//!
//! `PaLM` (arXiv 2204.02311), appendix B: a token costs 6 N for the matrix products, forward and backward, and 12 L H Q T for
//! attention over T positions, where H Q is the width; a third of both is the forward pass. Here N leaves out the embedding,
//! which is looked up, and the head is counted apart from the body: its backward pass is done for kept tokens alone.

use serde::Serialize;

use super::backward::Backward;
use super::config::ModelConfig;

/// What one token costs a model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// Forward pass of a position through all layers, attention over a whole sequence included.
    pub body_forward: f64,
    /// Forward pass of a prediction through the head.
    pub head_forward: f64,
}

impl Cost {
    /// That of a model of this shape, in sequences of `length` tokens.
    pub fn of(config: &ModelConfig, length: usize) -> Self {
        let ModelConfig { vocab_size, hidden_size, intermediate_size, layers, kv_heads, .. } = *config;
        let attention = 2 * hidden_size * hidden_size + 2 * hidden_size * kv_heads * config.head_dim();
        let layer = attention + 3 * hidden_size * intermediate_size;
        let body = 2 * layers * layer + 4 * layers * hidden_size * length;
        Self { body_forward: body as f64, head_forward: (2 * vocab_size * hidden_size) as f64 }
    }

    /// Training: a forward pass of the body for each position and of the head for each prediction; twice as much again for the
    /// backward pass of the head at each kept token, and of the body at each position, or at each kept token.
    pub fn training(self, positions: u64, predictions: u64, kept: u64, backward: Backward) -> f64 {
        let differentiated = match backward {
            Backward::Exact => positions,
            Backward::Kept => kept,
        };
        let body = self.body_forward * (positions as f64 + 2.0 * differentiated as f64);
        body + self.head_forward * (predictions as f64 + 2.0 * kept as f64)
    }

    /// Scoring: a forward pass for each token that goes through the model.
    pub fn scoring(self, tokens: u64) -> f64 {
        (self.body_forward + self.head_forward) * tokens as f64
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::{Backward, Cost, ModelConfig};

    #[test]
    fn agrees_with_a_count_by_hand() {
        // Width 4, 2 layers, MLP width 64, vocabulary 10, sequences of 256: a layer has 4 * 16 + 3 * 256 = 832 weights, 2 FLOPs
        // each; attention is 4 * 4 * 256 = 4096 a layer.
        let config = r#"{"model_type": "llama", "vocab_size": 10, "hidden_size": 4, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": false}"#;
        let config = ModelConfig::from_hugging_face(config.as_bytes()).unwrap();
        let cost = Cost::of(&config, 256);
        assert_eq!(cost, Cost { body_forward: 2.0 * (1664.0 + 4096.0), head_forward: 80.0 });
        // Two positions, one of them a prediction that is kept: 6 * 11520 + 3 * 80.
        assert!((cost.training(2, 1, 1, Backward::Exact) - 69_360.0).abs() < 1e-9);
        assert!((cost.training(2, 1, 0, Backward::Exact) - 69_200.0).abs() < 1e-9);
        // Two positions forward and one of them backward: 4 * 11520 + 3 * 80.
        assert!((cost.training(2, 1, 1, Backward::Kept) - 46_320.0).abs() < 1e-9);
        assert!((cost.scoring(3) - 34_800.0).abs() < 1e-9);
    }
}
