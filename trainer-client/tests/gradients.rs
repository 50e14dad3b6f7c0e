//! The step's gradient: against `PyTorch` in double precision, against finite differences, against the sum of its parts, and
//! against itself computed otherwise.

mod support;

use std::path::Path;

use serde::Deserialize;
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, Device, ModelConfig, NamedTensor, Precision};
use sluice_trainer::training::learner::Learner;
use support::model::{bits, every_second_target, every_target, largest_difference, packed_batch, tiny};

#[derive(Deserialize)]
struct Golden {
    config: serde_json::Value,
    clip_norm: f64,
    adamw: GoldenAdamW,
    tokens: Vec<Vec<u32>>,
    segments: Vec<Vec<u32>>,
    positions: Vec<Vec<u32>>,
    targets: Vec<Vec<i64>>,
    losses: Vec<Vec<Option<f64>>>,
    kept: Vec<u32>,
    loss: f64,
    gradient_norm: f64,
    weights: std::collections::HashMap<String, GoldenTensor>,
    gradients: std::collections::HashMap<String, GoldenTensor>,
    weights_after: std::collections::HashMap<String, GoldenTensor>,
}

#[derive(Deserialize)]
struct GoldenAdamW {
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
struct GoldenTensor {
    shape: Vec<usize>,
    values: Vec<f64>,
}

#[test]
fn step_agrees_with_pytorch_in_double_precision() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/slm_step.json");
    let text = std::fs::read_to_string(&path).expect("tests/golden/slm_step.json is committed");
    let mut golden: Golden =
        serde_json::from_str(&text).expect("slm_step.json has the fields of slm_step.py");
    golden.config["model_type"] = "llama".into();
    let config =
        ModelConfig::from_hugging_face(golden.config.to_string().as_bytes()).expect("a Llama configuration");
    let adamw = AdamWConfig {
        beta1: golden.adamw.betas.0,
        beta2: golden.adamw.betas.1,
        eps: golden.adamw.eps,
        weight_decay: golden.adamw.weight_decay,
        max_gradient_norm: golden.clip_norm,
    };
    let weights = golden
        .weights
        .into_iter()
        .map(|(name, GoldenTensor { shape, values })| NamedTensor {
            name,
            shape,
            values: values.into_iter().map(|value| value as f32).collect(),
        })
        .collect();
    let target = |&id: &i64| u32::try_from(id).unwrap_or(NO_TARGET);
    let batch = Batch {
        rows: golden.tokens.len(),
        len: golden.tokens[0].len(),
        tokens: golden.tokens.concat(),
        segments: golden.segments.concat(),
        positions: golden.positions.concat(),
        targets: golden.targets.concat().iter().map(target).collect(),
        ..Batch::default()
    };
    let mut learner = BurnLearner::from_weights(config, adamw, weights, Device::cpu())
        .expect("the weights fit the configuration");

    let losses = learner.losses(&batch);
    for (position, (loss, expected)) in losses.iter().zip(golden.losses.concat()).enumerate() {
        match expected {
            Some(expected) => {
                assert!((f64::from(*loss) - expected).abs() < 1e-5, "{position}: {loss} {expected}");
            }
            None => assert!(loss.is_nan(), "position {position} predicts nothing"),
        }
    }
    let gradients = learner.gradients(&batch, &golden.kept);
    assert_eq!(gradients.len(), golden.gradients.len());
    let mut worst = 0.0f64;
    for gradient in &gradients {
        let expected = &golden.gradients[&gradient.name];
        assert_eq!(gradient.shape, expected.shape, "{}", gradient.name);
        let largest = expected.values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        worst = worst.max(largest_difference(&gradient.values, &expected.values) / largest);
    }
    assert!(worst < 1e-5, "gradients are off by {worst:e} of the largest");

    let mut seen = Vec::new();
    let outcome = learner.step(&batch, golden.adamw.lr, &mut |losses| {
        seen = losses.to_vec();
        golden.kept.clone()
    });
    assert_eq!(bits(&seen), bits(&losses), "the step selects on the losses that evaluation reports");
    assert_eq!(outcome.kept, golden.kept.len());
    assert!((f64::from(outcome.kept_loss) - golden.loss).abs() < 1e-5);
    assert!((f64::from(outcome.gradient_norm) / golden.gradient_norm - 1.0).abs() < 1e-5);
    for weight in learner.weights() {
        let off = largest_difference(&weight.values, &golden.weights_after[&weight.name].values);
        // Where a gradient is near eps, AdamW's first step turns its rounding into a change of the weight.
        assert!(off < 1e-5, "{} is off by {off:e} after the step", weight.name);
    }
}

#[test]
fn gradient_is_the_slope_of_the_mean_kept_loss() {
    for tied in [false, true] {
        let config = tiny(tied);
        let batch = packed_batch();
        let seeded =
            BurnLearner::new(config.clone(), AdamWConfig::default(), 3).expect("a valid configuration");
        // Larger weights than a fresh model's give slopes that stand out of single precision.
        let mut weights = seeded.weights();
        for weight in weights.iter_mut().filter(|weight| weight.shape.len() == 2) {
            weight.values.iter_mut().for_each(|value| *value *= 12.0);
        }
        let with = |weights: Vec<NamedTensor>| {
            BurnLearner::from_weights(config.clone(), AdamWConfig::default(), weights, Device::cpu())
                .expect("weights of the model's own shape")
        };
        let learner = with(weights.clone());
        let kept = every_second_target(&learner.losses(&batch));
        let mean_kept_loss = |weights: Vec<NamedTensor>| {
            let losses = with(weights).losses(&batch);
            kept.iter().map(|&position| f64::from(losses[position as usize])).sum::<f64>() / kept.len() as f64
        };
        let gradients = learner.gradients(&batch, &kept);
        let step = 1e-3;
        for (index, gradient) in gradients.iter().enumerate() {
            // Along its own gradient, the loss changes by the gradient's length.
            let length = gradient.values.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let moved = |sign: f64| {
                let mut weights = weights.clone();
                for (value, slope) in weights[index].values.iter_mut().zip(&gradient.values) {
                    *value += (sign * step * f64::from(*slope) / length) as f32;
                }
                mean_kept_loss(weights)
            };
            let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step);
            assert!(
                (slope / length - 1.0).abs() < 0.02,
                "{}: slope {slope}, gradient's length {length}",
                gradient.name
            );
        }
    }
}

#[test]
fn a_batch_of_many_groups_and_blocks_is_the_sum_of_its_rows() {
    // Large enough for several groups of rows, several blocks of the head, and probabilities too many to keep.
    let config = ModelConfig { vocab_size: 40_000, max_position_embeddings: 512, ..tiny(false) };
    let (rows, len) = (4, 512);
    let id = |i: usize| ((i * 7919 + i / 3) % config.vocab_size) as u32;
    let row_batch = |rows: std::ops::Range<usize>| Batch {
        rows: rows.len(),
        len,
        tokens: (rows.start * len..rows.end * len).map(id).collect(),
        segments: vec![1; rows.len() * len],
        positions: rows.clone().flat_map(|_| 0..len as u32).collect(),
        targets: (rows.start * len + 1..=rows.end * len).map(id).collect(),
        ..Batch::default()
    };
    let learner = BurnLearner::new(config.clone(), AdamWConfig::default(), 9).expect("valid");
    let whole = row_batch(0..rows);
    let losses = learner.losses(&whole);
    let kept = every_second_target(&losses);
    let gradients = learner.gradients(&whole, &kept);
    let mut expected: Vec<Vec<f64>> = gradients.iter().map(|g| vec![0.0; g.values.len()]).collect();
    for row in 0..rows {
        let alone = row_batch(row..row + 1);
        let own = &losses[row * len..(row + 1) * len];
        let off = largest_difference(
            &learner.losses(&alone),
            &own.iter().map(|&l| f64::from(l)).collect::<Vec<_>>(),
        );
        assert!(off < 1e-5, "row {row} alone has losses that differ by {off}");
        for (sum, gradient) in expected.iter_mut().zip(learner.gradients(&alone, &every_second_target(own))) {
            sum.iter_mut().zip(gradient.values).for_each(|(sum, g)| *sum += f64::from(g) / rows as f64);
        }
    }
    for (gradient, expected) in gradients.iter().zip(&expected) {
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let off = largest_difference(&gradient.values, expected) / largest;
        assert!(off < 1e-4, "{} is off by {off:e} of its largest", gradient.name);
    }
}

#[test]
fn layers_run_forward_once_more_give_the_same_bits() {
    for kept in [every_target, every_second_target] {
        let run = |recomputes| {
            let mut learner = BurnLearner::new(tiny(false), AdamWConfig::default(), 11).expect("valid");
            learner.recompute_activations(recomputes);
            let outcomes: Vec<_> =
                (0..3).map(|_| learner.step(&packed_batch(), 1e-3, &mut |losses| kept(losses))).collect();
            (outcomes, learner.weights())
        };
        assert_eq!(run(true), run(false));
    }
}

#[test]
fn bfloat16_is_single_precision_but_for_its_rounding() {
    let batch = packed_batch();
    let learner = |precision| {
        let mut learner = BurnLearner::new(tiny(false), AdamWConfig::default(), 3).expect("valid");
        learner.compute_in(precision);
        learner
    };
    let (mut half, mut single) = (learner(Precision::Bf16), learner(Precision::F32));
    let kept = every_second_target(&single.losses(&batch));
    for (half, single) in half.losses(&batch).iter().zip(single.losses(&batch)) {
        assert!(half.is_nan() && single.is_nan() || (half - single).abs() < 0.03, "{half} {single}");
    }
    assert_ne!(bits(&half.losses(&batch)), bits(&single.losses(&batch)), "it is another precision");
    for (half, single) in half.gradients(&batch, &kept).iter().zip(single.gradients(&batch, &kept)) {
        let expected: Vec<f64> = single.values.iter().map(|&value| f64::from(value)).collect();
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let off = largest_difference(&half.values, &expected) / largest;
        assert!(off < 0.05, "{} is off by {off:e} of its largest", half.name);
    }
    let last = |learner: &mut BurnLearner| {
        (0..30).map(|_| learner.step(&batch, 1e-2, &mut every_target).kept_loss).last().expect("steps")
    };
    let (half, single) = (last(&mut half), last(&mut single));
    assert!((half - single).abs() < 0.15 && half < 3.0, "{half} {single}");
}

#[test]
fn a_group_of_which_nothing_is_kept_has_no_gradient() {
    // Two groups of rows, and everything kept is in one of them.
    let config = ModelConfig { max_position_embeddings: 1024, ..tiny(false) };
    let len = 1024;
    let id = |i: usize| ((i * 31 + i / 7) % 50) as u32;
    let batch = Batch {
        rows: 2,
        len,
        tokens: (0..2 * len).map(id).collect(),
        segments: vec![1; 2 * len],
        positions: (0..2).flat_map(|_| 0..len as u32).collect(),
        targets: (1..=2 * len).map(id).collect(),
        ..Batch::default()
    };
    let alone = |row: usize| Batch {
        rows: 1,
        tokens: batch.tokens[row * len..][..len].to_vec(),
        segments: batch.segments[row * len..][..len].to_vec(),
        positions: batch.positions[row * len..][..len].to_vec(),
        targets: batch.targets[row * len..][..len].to_vec(),
        ..batch.clone()
    };
    let learner = BurnLearner::new(config, AdamWConfig::default(), 9).expect("valid");
    let kept = [3, 500, 1023];
    for row in 0..2 {
        let whole = learner.gradients(&batch, &kept.map(|index| index + (row * len) as u32));
        for (gradient, expected) in whole.iter().zip(learner.gradients(&alone(row), &kept)) {
            let values: Vec<f64> = expected.values.iter().map(|&value| f64::from(value)).collect();
            let largest = values.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
            let off = largest_difference(&gradient.values, &values) / largest;
            assert!(off < 1e-5, "{} is off by {off:e} of its largest", gradient.name);
        }
    }
}
