//! Tests of [`super`]. No GPU is needed: with [`ACTS_AS_A_GPU`] the CPU takes the GPU's way through the model.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::cell::Cell;

use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::random::SplitMix64;
use sluice_feed::select::Needs;

use super::{DeviceName, reason};
use crate::model::optimizer::AdamWConfig;
use crate::model::{Backward, BurnLearner, ModelConfig, Variant};
use crate::training::learner::{Learner, Measured};

thread_local! {
    /// Of this thread alone: a device that is no CPU has no threads of the model's.
    pub(super) static ACTS_AS_A_GPU: Cell<bool> = const { Cell::new(false) };
}

#[test]
fn a_missing_driver_is_said_in_few_words() {
    let said = "thread 'main' panicked at src/lib.rs:200:5:\nUnable to dynamically load the \"cuda\" shared library - \
                searched for library names: [\"libcuda.so\", \"libcuda64.so\"]\nnote: run with `RUST_BACKTRACE=1`";
    assert_eq!(reason(said), "Unable to dynamically load the \"cuda\" shared library");
    assert_eq!(reason("Aborted"), "it did not answer");
}

#[test]
fn names_are_read_as_they_are_written() {
    for name in ["cpu", "cuda:0", "cuda:3"] {
        assert_eq!(name.parse::<DeviceName>().map(|device| device.to_string()), Ok(name.to_owned()));
    }
    assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(0)));
    for wrong in ["gpu", "cuda:", "cuda:x", "cuda0", ""] {
        assert!(wrong.parse::<DeviceName>().is_err(), "{wrong}");
    }
}

const ROWS: usize = 3;
const LEN: usize = 24;
const VOCABULARY: usize = 600;

fn config(kv_heads: usize, tie_word_embeddings: bool) -> ModelConfig {
    ModelConfig {
        vocab_size: VOCABULARY,
        hidden_size: 32,
        intermediate_size: 48,
        layers: 2,
        heads: 4,
        kv_heads,
        max_position_embeddings: LEN,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings,
        variant: Variant::default(),
    }
}

/// Two documents in each row.
fn batch() -> Batch {
    let mut random = SplitMix64::keyed(3, 0);
    let tokens: Vec<u32> = (0..ROWS * LEN).map(|_| random.below(VOCABULARY) as u32).collect();
    let starts = |index: usize| index.is_multiple_of(LEN) || index % LEN == 10;
    let next = |index: usize| index + 1 == tokens.len() || starts(index + 1);
    let targets = (0..tokens.len()).map(|i| if next(i) { NO_TARGET } else { tokens[i + 1] }).collect();
    let within = |index: usize| index % LEN;
    Batch {
        rows: ROWS,
        len: LEN,
        targets,
        segments: (0..tokens.len()).map(|i| u32::from(within(i) >= 10) + 1).collect(),
        positions: (0..tokens.len()).map(|i| (within(i) % 10) as u32).collect(),
        reference: vec![f32::NAN; tokens.len()],
        reference_entropy: vec![],
        tokens,
    }
}

/// Two thirds of the targets.
fn kept(batch: &Batch) -> Vec<u32> {
    let targets = (0..).zip(&batch.targets).filter(|&(_, &target)| target != NO_TARGET);
    targets.map(|(position, _)| position).filter(|position| position % 3 != 0).collect()
}

/// What three steps of two micro-batches measured, and the weights after them.
fn train(config: ModelConfig, backward: Backward, recomputes: bool) -> (Vec<Measured>, Vec<f32>) {
    let mut learner = BurnLearner::new(config, AdamWConfig::default(), 1).unwrap();
    learner.keep_history(0.5);
    learner.recompute_activations(recomputes);
    learner.flow_through(backward);
    let needs = Needs { entropy: true, history_loss: true, ..Needs::default() };
    let batch = batch();
    let mut measured = Vec::new();
    for _ in 0..3 {
        for _ in 0..2 {
            learner.accumulate(&batch, needs, &mut |found| {
                measured.push(found.clone());
                kept(&batch)
            });
        }
        assert!(learner.update(1e-2).gradient_norm > 0.0);
    }
    (measured, learner.weights().into_iter().flat_map(|weight| weight.values).collect())
}

fn worst(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    assert!(left.iter().zip(right).all(|(a, b)| a.is_nan() == b.is_nan()));
    left.iter().zip(right).filter(|(a, _)| !a.is_nan()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn tensor_operations_train_as_the_passes_of_the_cpu_do() {
    for (kv_heads, tied, backward) in [
        (4, false, Backward::Exact),
        (2, false, Backward::Exact),
        (1, true, Backward::Exact),
        (4, true, Backward::Kept),
        (2, false, Backward::Kept),
    ] {
        let (expected, weights) = train(config(kv_heads, tied), backward, false);
        for recomputes in [false, true] {
            ACTS_AS_A_GPU.set(true);
            let (measured, others) = train(config(kv_heads, tied), backward, recomputes);
            ACTS_AS_A_GPU.set(false);
            for (expected, found) in expected.iter().zip(&measured) {
                assert!(worst(&expected.losses, &found.losses) < 1e-4);
                assert!(worst(&expected.entropies, &found.entropies) < 1e-4);
                assert!(worst(&expected.history_losses, &found.history_losses) < 1e-4);
            }
            // Not the same bits, or both went the same way.
            assert!(weights != others && worst(&weights, &others) < 1e-3, "{}", worst(&weights, &others));
        }
    }
}
