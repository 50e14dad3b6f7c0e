//! The gradient that flows through kept tokens alone: against `PyTorch` in double precision, where dropped tokens are detached
//! in every layer, and against itself computed otherwise.

mod support;

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::select::Needs;
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{Backward, BurnLearner, Device, ModelConfig, NamedTensor};
use sluice_trainer::training::learner::Learner;
use support::model::{every_second_target, every_target, largest_difference, packed_batch, tiny};

/// How far a gradient in single precision may be from one in double precision, of its largest value.
const AGREEMENT: f64 = 2e-5;

#[derive(Deserialize)]
struct Golden {
    grid: f64,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    is_exact: bool,
    config: serde_json::Value,
    tokens: Vec<Vec<u32>>,
    segments: Vec<Vec<u32>>,
    positions: Vec<Vec<u32>>,
    targets: Vec<Vec<i64>>,
    kept: Vec<u32>,
    loss: f64,
    weights: HashMap<String, GoldenTensor>,
    gradients: HashMap<String, Vec<f64>>,
}

#[derive(Deserialize)]
struct GoldenTensor {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Case {
    fn batch(&self) -> Batch {
        Batch {
            rows: self.tokens.len(),
            len: self.tokens[0].len(),
            tokens: self.tokens.concat(),
            segments: self.segments.concat(),
            positions: self.positions.concat(),
            targets: self.targets.concat().iter().map(|&id| u32::try_from(id).unwrap_or(NO_TARGET)).collect(),
            ..Batch::default()
        }
    }

    fn learner(&self, grid: f64) -> BurnLearner {
        let mut config = self.config.clone();
        config["model_type"] = "llama".into();
        let config =
            ModelConfig::from_hugging_face(config.to_string().as_bytes()).expect("a Llama configuration");
        let weights = self.weights.iter().map(|(name, GoldenTensor { shape, values })| NamedTensor {
            name: name.clone(),
            shape: shape.clone(),
            values: values.iter().map(|value| (value / grid) as f32).collect(),
        });
        let device = Device::cpu();
        BurnLearner::from_weights(config, AdamWConfig::default(), weights.collect(), device)
            .expect("the weights fit the configuration")
    }
}

/// Largest difference of any value, of the largest of its tensor.
fn off(found: &[NamedTensor], expected: &HashMap<String, Vec<f64>>) -> f64 {
    assert_eq!(found.len(), expected.len());
    let of_tensor = |gradient: &NamedTensor| {
        let expected = &expected[&gradient.name];
        let largest = expected.iter().fold(1e-9f64, |largest, value| largest.max(value.abs()));
        largest_difference(&gradient.values, expected) / largest
    };
    found.iter().map(of_tensor).fold(0.0, f64::max)
}

fn by_name(gradients: Vec<NamedTensor>) -> HashMap<String, Vec<f64>> {
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
    gradients.into_iter().map(|gradient| (gradient.name, wide(gradient.values))).collect()
}

#[test]
fn it_is_that_of_pytorch_with_dropped_tokens_detached_in_every_layer() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/kept_backward.json");
    let text = std::fs::read_to_string(&path).expect("tests/golden/kept_backward.json is committed");
    let golden: Golden = serde_json::from_str(&text).expect("it has the fields of kept_backward.py");
    for case in &golden.cases {
        let (batch, mut learner) = (case.batch(), case.learner(golden.grid));
        let losses = learner.losses(&batch);
        let loss: f64 = case.kept.iter().map(|&at| f64::from(losses[at as usize])).sum();
        assert!((loss / case.kept.len() as f64 - case.loss).abs() < 1e-5, "{}: {loss}", case.name);
        let exact = off(&learner.gradients(&batch, &case.kept), &case.gradients);
        assert_eq!(exact < AGREEMENT, case.is_exact, "{}: the exact gradient is {exact:e} off", case.name);
        learner.flow_through(Backward::Kept);
        for recomputes in [false, true] {
            learner.recompute_activations(recomputes);
            let off = off(&learner.gradients(&batch, &case.kept), &case.gradients);
            assert!(off < AGREEMENT, "{}, recomputed: {recomputes}: {off:e} off", case.name);
        }
    }
}

/// The weights after two steps of two micro-batches each, whose positions are chosen after their forward pass or before it.
fn train(backward: Backward, recomputes: bool, is_known: bool, needs: Option<Needs>) -> Vec<NamedTensor> {
    let mut learner = BurnLearner::new(tiny(false), AdamWConfig::default(), 3).expect("valid");
    learner.flow_through(backward);
    learner.recompute_activations(recomputes);
    let batch = packed_batch();
    let choices = [every_second_target(&learner.losses(&batch)), every_target(&learner.losses(&batch))];
    for _ in 0..2 {
        for kept in &choices {
            if !is_known {
                learner.accumulate(&batch, Needs::default(), &mut |_| kept.clone());
                continue;
            }
            learner.accumulate_chosen(&batch, kept, needs, &mut |measured| {
                let has_loss = |&at: &u32| measured.losses[at as usize].is_finite();
                assert!(kept.iter().all(has_loss));
                let losses = measured.losses.iter().filter(|loss| loss.is_finite()).count();
                let expected = if needs.is_some() { batch.predictions() } else { kept.len() };
                assert_eq!(losses, expected, "losses of all are there where they are asked for");
            });
        }
        let outcome = learner.update(1e-3);
        assert_eq!(outcome.kept, choices[0].len() + choices[1].len());
    }
    learner.weights()
}

#[test]
fn a_choice_known_before_the_forward_pass_takes_the_same_step() {
    for backward in [Backward::Exact, Backward::Kept] {
        let expected = by_name(train(backward, false, false, None));
        for (recomputes, needs) in
            [(false, None), (false, Some(Needs::default())), (true, None), (true, Some(Needs::default()))]
        {
            let off = off(&train(backward, recomputes, true, needs), &expected);
            assert!(off < 1e-5, "{backward:?}, {recomputes}, {needs:?}: {off:e} off");
        }
    }
}

#[test]
fn nothing_kept_is_no_step() {
    let mut learner = BurnLearner::new(tiny(false), AdamWConfig::default(), 3).expect("valid");
    learner.flow_through(Backward::Kept);
    let before = learner.weights();
    let mut calls = 0;
    learner.accumulate(&packed_batch(), Needs::default(), &mut |_| vec![]);
    learner.accumulate_chosen(&packed_batch(), &[], None, &mut |_| calls += 1);
    assert_eq!((calls, learner.update(1e-3).kept), (1, 0));
    assert_eq!(learner.weights(), before);
}

#[test]
fn a_group_of_which_nothing_is_kept_adds_nothing() {
    // Two groups of rows, and everything kept is in the second.
    let len = 1024;
    let config = ModelConfig { max_position_embeddings: len, ..tiny(false) };
    let batch = |rows: usize| Batch {
        rows,
        len,
        tokens: (0..rows * len).map(|i| ((i * 31 + i / 7) % 50) as u32).collect(),
        segments: vec![1; rows * len],
        positions: (0..rows).flat_map(|_| 0..len as u32).collect(),
        targets: (1..=rows * len).map(|i| ((i * 31 + i / 7) % 50) as u32).collect(),
        ..Batch::default()
    };
    let whole = batch(2);
    let second =
        Batch { tokens: whole.tokens[len..].to_vec(), targets: whole.targets[len..].to_vec(), ..batch(1) };
    let mut learner = BurnLearner::new(config, AdamWConfig::default(), 9).expect("valid");
    learner.flow_through(Backward::Kept);
    let kept = [3, 500, 1023];
    let expected = by_name(learner.gradients(&second, &kept));
    let found = learner.gradients(&whole, &kept.map(|position| position + len as u32));
    assert!(off(&found, &expected) < 1e-5);
}
