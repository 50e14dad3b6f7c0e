//! Writes checkpoints of small models that have learnt a little, each with every log-probability it gives to a text, for
//! `tests/transformers/check` to hold against Hugging Face's Llama.

use std::path::Path;

use anyhow::Context;
use serde_json::json;
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig, Variant};
use sluice_trainer::training::learner::Learner;

const VOCABULARY: usize = 300;
const LEN: usize = 40;

fn main() -> anyhow::Result<()> {
    let folder = std::env::args_os().nth(1).context("give the folder to write to")?;
    for tied in [false, true] {
        let name = if tied { "tied" } else { "untied" };
        write(&Path::new(&folder).join(name), tied)?;
    }
    Ok(())
}

fn write(folder: &Path, tie_word_embeddings: bool) -> anyhow::Result<()> {
    let config = ModelConfig {
        vocab_size: VOCABULARY,
        hidden_size: 64,
        intermediate_size: 96,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        max_position_embeddings: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings,
        variant: Variant::default(),
    };
    let tokens: Vec<u32> = (0..LEN).map(|index| (index * index * 7 % VOCABULARY) as u32).collect();
    let mut learner = BurnLearner::new(config, AdamWConfig::default(), 5)?;
    // A few steps, so that no weight is as it was made and no norm is 1.
    let text = rows(&tokens, 1, |_, index| tokens.get(index + 1).copied().unwrap_or(NO_TARGET));
    for _ in 0..30 {
        learner.step(&text, 1e-2, &mut |losses| {
            (0..).zip(losses).filter(|(_, loss)| !loss.is_nan()).map(|(index, _)| index).collect()
        });
    }
    // Row v asks for the loss of token v at every position, so all rows together are the whole distribution.
    let losses = learner.losses(&rows(&tokens, VOCABULARY, |row, _| row as u32));
    let log_probabilities: Vec<Vec<f32>> =
        (0..LEN).map(|index| (0..VOCABULARY).map(|row| -losses[row * LEN + index]).collect()).collect();
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    learner.save(folder)?;
    let path = folder.join("log_probabilities.json");
    let content = json!({ "tokens": tokens, "log_probabilities": log_probabilities });
    std::fs::write(&path, content.to_string()).with_context(|| format!("cannot write {}", path.display()))
}

/// The same tokens in every row, with targets of their own.
fn rows(tokens: &[u32], count: usize, target: impl Fn(usize, usize) -> u32) -> Batch {
    Batch {
        rows: count,
        len: LEN,
        tokens: tokens.repeat(count),
        segments: vec![1; count * LEN],
        positions: (0..count).flat_map(|_| 0..LEN as u32).collect(),
        targets: (0..count * LEN).map(|index| target(index / LEN, index % LEN)).collect(),
        ..Batch::default()
    }
}
