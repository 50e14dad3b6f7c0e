//! Tests of [`super`]. No GPU is needed: with [`ACTS_AS_A_GPU`] the CPU takes the GPU's way through the model.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::cell::Cell;

use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::random::SplitMix64;
use sluice_feed::select::Needs;

use super::{DeviceName, Precision, reason};
use crate::model::counters::counted;
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
        attribute: vec![],
        tokens,
    }
}

/// Two thirds of the targets.
fn kept(batch: &Batch) -> Vec<u32> {
    let targets = (0..).zip(&batch.targets).filter(|&(_, &target)| target != NO_TARGET);
    targets.map(|(position, _)| position).filter(|position| position % 3 != 0).collect()
}

/// How a model is trained in a comparison.
#[derive(Clone, Copy)]
struct How {
    backward: Backward,
    recomputes: bool,
    /// Whether positions are chosen before the forward pass.
    chosen: bool,
    precision: Precision,
}

impl Default for How {
    fn default() -> Self {
        let (backward, precision) = (Backward::Exact, Precision::F32);
        Self { backward, recomputes: false, chosen: false, precision }
    }
}

fn learner(config: ModelConfig, how: How) -> BurnLearner {
    let mut learner = BurnLearner::new(config, AdamWConfig::default(), 1).unwrap();
    learner.keep_history(0.5);
    learner.compute_in(how.precision);
    learner.recompute_activations(how.recomputes);
    learner.flow_through(how.backward);
    learner
}

const NEEDS: Needs = Needs {
    entropy: true,
    history_loss: true,
    reference_loss: false,
    reference_entropy: false,
    attribute: false,
};

/// What three steps of two micro-batches measured, and the weights after them.
fn train(config: ModelConfig, how: How) -> (Vec<Measured>, Vec<f32>) {
    let mut learner = learner(config, how);
    let batch = batch();
    let mut measured = Vec::new();
    for _ in 0..3 {
        for _ in 0..2 {
            if how.chosen {
                learner.accumulate_chosen(&batch, &kept(&batch), Some(NEEDS), &mut |found| {
                    measured.push(found.clone());
                });
            } else {
                learner.accumulate(&batch, NEEDS, &mut |found| {
                    measured.push(found.clone());
                    kept(&batch)
                });
            }
        }
        assert!(learner.update(1e-2).gradient_norm > 0.0);
    }
    (measured, learner.weights().into_iter().flat_map(|weight| weight.values).collect())
}

/// As [`train`], the GPU's way.
fn train_as_a_gpu(config: ModelConfig, how: How) -> (Vec<Measured>, Vec<f32>) {
    as_a_gpu(|| train(config, how))
}

fn as_a_gpu<R>(work: impl FnOnce() -> R) -> R {
    ACTS_AS_A_GPU.set(true);
    let result = work();
    ACTS_AS_A_GPU.set(false);
    result
}

fn worst(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    assert!(left.iter().zip(right).all(|(a, b)| a.is_nan() == b.is_nan()));
    left.iter().zip(right).filter(|(a, _)| !a.is_nan()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn assert_same(
    (expected, weights): &(Vec<Measured>, Vec<f32>),
    (measured, others): &(Vec<Measured>, Vec<f32>),
) {
    for (expected, found) in expected.iter().zip(measured) {
        assert!(worst(&expected.losses, &found.losses) < 1e-4);
        assert!(worst(&expected.entropies, &found.entropies) < 1e-4);
        assert!(worst(&expected.history_losses, &found.history_losses) < 1e-4);
    }
    // Not the same bits, or both went the same way.
    assert!(weights != others && worst(weights, others) < 1e-3, "{}", worst(weights, others));
}

#[test]
fn tensor_operations_train_as_the_passes_of_the_cpu_do() {
    // Qwen's biases and norms.
    let extras = |config: ModelConfig| ModelConfig {
        variant: Variant { qkv_bias: true, qk_norm: true, ..Variant::default() },
        ..config
    };
    for (config, backward) in [
        (config(4, false), Backward::Exact),
        (config(2, false), Backward::Exact),
        (config(1, true), Backward::Exact),
        (extras(config(2, false)), Backward::Exact),
        (config(4, true), Backward::Kept),
        (config(2, false), Backward::Kept),
        (extras(config(2, false)), Backward::Kept),
    ] {
        let how = How { backward, ..How::default() };
        let expected = train(config.clone(), how);
        for (recomputes, chosen) in [(false, false), (false, true), (true, false), (true, true)] {
            assert_same(&expected, &train_as_a_gpu(config.clone(), How { recomputes, chosen, ..how }));
        }
    }
}

#[test]
fn any_number_of_kept_tokens_has_the_gradient_that_the_cpu_has() {
    let batch = batch();
    let all: Vec<u32> =
        (0..).zip(&batch.targets).filter(|(_, target)| **target != NO_TARGET).map(|(at, _)| at).collect();
    // One, a whole multiple of what matrices are padded to, one more and one fewer, and all.
    for (backward, count) in [Backward::Exact, Backward::Kept]
        .into_iter()
        .flat_map(|it| [1, 15, 16, 17, 48, all.len()].map(|count| (it, count)))
    {
        let how = How { backward, ..How::default() };
        // Those in the middle.
        let kept = &all[(all.len() - count) / 2..][..count];
        let expected = learner(config(2, false), how).gradients(&batch, kept);
        let found = as_a_gpu(|| learner(config(2, false), how).gradients(&batch, kept));
        for (expected, found) in expected.iter().zip(&found) {
            let largest = expected.values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            let off = worst(&expected.values, &found.values);
            assert!(off <= largest * 1e-4, "{} of {count}: {off} of {largest}", expected.name);
        }
    }
}

#[test]
fn a_device_is_waited_for_once_a_forward_pass_and_weights_are_cast_once_a_step() {
    for recomputes in [false, true] {
        let how = How { precision: Precision::Bf16, recomputes, ..How::default() };
        let batch = batch();
        as_a_gpu(|| {
            let mut learner = learner(config(2, false), how);
            counted();
            for _ in 0..3 {
                learner.measure(&batch, Needs::default());
                // One cast after the weights have changed.
                assert_eq!(counted(), (1, 1));
                learner
                    .accumulate(&batch, Needs { entropy: true, ..Needs::default() }, &mut |_| kept(&batch));
                learner.accumulate_chosen(&batch, &kept(&batch), None, &mut |_| {});
                assert_eq!(counted(), (2, 0));
                // The history is another model.
                learner.accumulate(&batch, NEEDS, &mut |_| kept(&batch));
                assert_eq!(counted(), (2, 1));
                // For the gradient's norm.
                learner.update(1e-2);
                assert_eq!(counted(), (1, 0));
            }
        });
    }
}

#[test]
fn bfloat16_trains_the_gpu_s_way_as_single_precision_does_but_for_its_rounding() {
    let single = train(config(2, false), How::default());
    let half = train_as_a_gpu(config(2, false), How { precision: Precision::Bf16, ..How::default() });
    for (single, half) in single.0.iter().zip(&half.0) {
        let off = worst(&single.losses, &half.losses);
        assert!(off > 0.0 && off < 0.05, "{off}");
    }
}
