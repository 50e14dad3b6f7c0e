//! A tiny model, a batch for it, and ways to compare what comes of them.

use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_trainer::model::{ModelConfig, Variant};

pub fn tiny(tie_word_embeddings: bool) -> ModelConfig {
    ModelConfig {
        vocab_size: 50,
        hidden_size: 16,
        intermediate_size: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        max_position_embeddings: 16,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings,
        variant: Variant::default(),
    }
}

/// Two rows of twelve: packed pieces, and padding at the end of the second row.
pub fn packed_batch() -> Batch {
    let lengths: [&[usize]; 2] = [&[5, 7], &[4, 6]];
    let mut batch = Batch { rows: 2, len: 12, ..Batch::default() };
    for (row, pieces) in lengths.iter().enumerate() {
        for (piece, &length) in pieces.iter().enumerate() {
            for position in 0..length {
                batch.tokens.push(((row * 31 + piece * 17 + position * 7) % 50) as u32);
                batch.segments.push(piece as u32 + 1);
                batch.positions.push(position as u32);
                let next = ((row * 31 + piece * 17 + (position + 1) * 7) % 50) as u32;
                batch.targets.push(if position + 1 < length { next } else { NO_TARGET });
            }
        }
        while batch.tokens.len() < (row + 1) * batch.len {
            batch.tokens.push(0);
            batch.segments.push(0);
            batch.positions.push(0);
            batch.targets.push(NO_TARGET);
        }
    }
    batch
}

pub fn every_target(losses: &[f32]) -> Vec<u32> {
    (0u32..).zip(losses).filter(|(_, loss)| !loss.is_nan()).map(|(position, _)| position).collect()
}

pub fn every_second_target(losses: &[f32]) -> Vec<u32> {
    every_target(losses).into_iter().step_by(2).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub fn largest_difference(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - b).abs()).fold(0.0, f64::max)
}
