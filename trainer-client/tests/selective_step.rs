//! The model and its selective step: against `PyTorch` in double precision, against finite differences, against
//! its own checkpoint, and against itself.

use std::path::Path;

use serde::Deserialize;
use sluice_trainer::batch::{Batch, NO_TARGET};
use sluice_trainer::learner::{Learner, StepOutcome};
use sluice_trainer::model::checkpoint::WEIGHTS_FILE;
use sluice_trainer::model::weights::specs;
use sluice_trainer::model::{BurnLearner, ModelConfig, NamedTensor};
use sluice_trainer::optimizer::AdamWConfig;
use sluice_trainer::select::Needs;

const LEARNING_RATE: f64 = 1e-3;

fn tiny(tie_word_embeddings: bool) -> ModelConfig {
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
    }
}

/// Two rows of twelve: packed pieces, and padding at the end of the second row.
fn packed_batch() -> Batch {
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

fn every_target(losses: &[f32]) -> Vec<u32> {
    (0u32..).zip(losses).filter(|(_, loss)| !loss.is_nan()).map(|(position, _)| position).collect()
}

fn every_second_target(losses: &[f32]) -> Vec<u32> {
    every_target(losses).into_iter().step_by(2).collect()
}

fn step(learner: &mut BurnLearner, batch: &Batch) -> StepOutcome {
    learner.step(batch, LEARNING_RATE, &mut every_second_target)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn largest_difference(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - b).abs()).fold(0.0, f64::max)
}

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
    let config = ModelConfig::from_hugging_face(&golden.config.to_string()).expect("a Llama configuration");
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
    let mut learner = BurnLearner::from_weights(config, adamw, weights, burn::tensor::Device::flex())
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
            BurnLearner::from_weights(
                config.clone(),
                AdamWConfig::default(),
                weights,
                burn::tensor::Device::flex(),
            )
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
fn a_token_sees_only_its_own_past() {
    let learner = BurnLearner::new(tiny(false), AdamWConfig::default(), 1).expect("a valid configuration");
    let batch = packed_batch();
    let before = learner.losses(&batch);
    let mut changed = batch.clone();
    changed.tokens[7] = 49;
    let after = learner.losses(&changed);
    let differs: Vec<usize> = (0..24).filter(|&i| before[i].to_bits() != after[i].to_bits()).collect();
    assert_eq!(differs, [7, 8, 9, 10], "from the changed token to the last prediction of its segment");
}

#[test]
fn across_documents_a_token_sees_all_that_stands_before_it_in_its_row() {
    let learner = BurnLearner::new(tiny(false), AdamWConfig::default(), 1).expect("a valid configuration");
    let mut batch = packed_batch();
    // The first row as one segment: what the packer makes of it when documents may look at one another.
    (0..12).for_each(|index| (batch.segments[index], batch.positions[index]) = (1, index as u32));
    let before = learner.losses(&batch);
    let mut changed = batch.clone();
    changed.tokens[2] = 49;
    let after = learner.losses(&changed);
    let differs: Vec<usize> = (0..24).filter(|&i| before[i].to_bits() != after[i].to_bits()).collect();
    assert_eq!(differs, [2, 3, 5, 6, 7, 8, 9, 10], "from the changed token to the end of its row");
}

#[test]
fn the_same_seed_takes_the_same_steps() {
    let run = || {
        let mut learner = BurnLearner::new(tiny(false), AdamWConfig::default(), 11).expect("valid");
        let outcomes: Vec<StepOutcome> = (0..3).map(|_| step(&mut learner, &packed_batch())).collect();
        (outcomes, learner.weights())
    };
    assert_eq!(run(), run());
    let other = BurnLearner::new(tiny(false), AdamWConfig::default(), 12).expect("valid");
    assert_ne!(run().1[0], other.weights()[0]);
}

#[test]
fn a_checkpoint_resumes_with_the_same_bits() {
    for tied in [false, true] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let batch = packed_batch();
        let mut learner = BurnLearner::new(tiny(tied), AdamWConfig::default(), 5).expect("valid");
        step(&mut learner, &batch);
        step(&mut learner, &batch);
        learner.save(folder.path()).expect("a writable folder");
        let mut loaded = BurnLearner::new(tiny(tied), AdamWConfig::default(), 6).expect("valid");
        loaded.load(folder.path()).expect("what was saved");
        let opened = BurnLearner::open(folder.path(), AdamWConfig::default()).expect("what was saved");
        assert_eq!(bits(&learner.losses(&batch)), bits(&loaded.losses(&batch)));
        let outcome = step(&mut learner, &batch);
        for mut resumed in [loaded, opened] {
            assert_eq!(step(&mut resumed, &batch), outcome);
            assert_eq!(resumed.weights(), learner.weights());
            assert_eq!(resumed.steps(), 3);
        }
        let left: Vec<_> = std::fs::read_dir(folder.path()).expect("the folder").flatten().collect();
        assert_eq!(left.len(), 3, "no temporary file is left: {left:?}");
    }
}

#[test]
fn an_empty_selection_leaves_the_weights_alone() {
    let mut learner = BurnLearner::new(tiny(false), AdamWConfig::default(), 5).expect("valid");
    let before = learner.weights();
    let outcome = learner.step(&packed_batch(), LEARNING_RATE, &mut |_| vec![]);
    assert_eq!((outcome.kept, learner.steps()), (0, 0));
    assert_eq!(learner.weights(), before);
}

/// Each row of a batch as a micro-batch of its own.
fn rows_of(batch: &Batch) -> Vec<Batch> {
    let row = |row: usize| {
        let span = row * batch.len..(row + 1) * batch.len;
        Batch {
            rows: 1,
            len: batch.len,
            tokens: batch.tokens[span.clone()].to_vec(),
            segments: batch.segments[span.clone()].to_vec(),
            positions: batch.positions[span.clone()].to_vec(),
            targets: batch.targets[span].to_vec(),
            ..Batch::default()
        }
    };
    (0..batch.rows).map(row).collect()
}

#[test]
fn micro_batches_make_the_step_of_the_batch_that_they_are() {
    let batch = packed_batch();
    let learner = || BurnLearner::new(tiny(false), AdamWConfig::default(), 5).expect("valid");
    let (mut whole, mut parts) = (learner(), learner());
    // Unequal numbers of kept tokens, so that a mean of the parts' means would be another gradient.
    let kept = [vec![0, 1, 2, 5, 6], vec![1]];
    let all: Vec<u32> = [kept[0].clone(), kept[1].iter().map(|index| index + 12).collect()].concat();
    let outcome = whole.step(&batch, LEARNING_RATE, &mut |_| all.clone());
    for (row, kept) in rows_of(&batch).iter().zip(&kept) {
        parts.accumulate(row, Needs::default(), &mut |_| kept.clone());
    }
    let accumulated = parts.update(LEARNING_RATE);
    assert_eq!((outcome.kept, accumulated.kept), (6, 6));
    assert!((outcome.kept_loss - accumulated.kept_loss).abs() < 1e-6);
    assert!((outcome.gradient_norm / accumulated.gradient_norm - 1.0).abs() < 1e-5);
    for (one, other) in whole.weights().iter().zip(&parts.weights()) {
        let expected: Vec<f64> = one.values.iter().map(|&value| f64::from(value)).collect();
        let off = largest_difference(&other.values, &expected);
        assert!(off < 1e-5, "{} is off by {off:e}", one.name);
    }
    assert_eq!(parts.update(LEARNING_RATE).kept, 0, "nothing waits any more");
}

#[test]
fn entropies_are_those_of_the_predictions() {
    let config = ModelConfig { vocab_size: 4, ..tiny(false) };
    let mut learner = BurnLearner::new(config, AdamWConfig::default(), 5).expect("valid");
    let row = |target| Batch {
        rows: 1,
        len: 2,
        tokens: vec![1, 2],
        segments: vec![1; 2],
        positions: vec![0, 1],
        targets: vec![target, NO_TARGET],
        ..Batch::default()
    };
    let needs = Needs { entropy: true, ..Needs::default() };
    for _ in 0..30 {
        // The loss of every token there is tells the whole distribution.
        let losses: Vec<f64> = (0..4).map(|target| f64::from(learner.losses(&row(target))[0])).collect();
        let expected: f64 = losses.iter().map(|loss| loss * (-loss).exp()).sum();
        let measured = learner.measure(&row(3), needs);
        assert!((f64::from(measured.entropies[0]) - expected).abs() < 1e-5, "{measured:?} {expected}");
        assert!(measured.entropies[1].is_nan());
        learner.step(&row(3), 1e-2, &mut every_target);
    }
}

#[test]
fn a_history_follows_the_weights_and_is_part_of_a_checkpoint() {
    let batch = packed_batch();
    let needs = Needs { history_loss: true, ..Needs::default() };
    let start = || BurnLearner::new(tiny(false), AdamWConfig::default(), 5).expect("valid");
    let (mut still, mut average) = (start(), start());
    still.keep_as_history(start().weights()).expect("weights of the model's own shape");
    average.keep_history(0.75);
    let before = start().losses(&batch);
    let mut expected = start().weights();
    for _ in 0..3 {
        step(&mut still, &batch);
        step(&mut average, &batch);
        for (old, new) in expected.iter_mut().zip(average.weights()) {
            old.values.iter_mut().zip(new.values).for_each(|(old, new)| *old = 0.75 * *old + 0.25 * new);
        }
    }
    assert_eq!(bits(&still.measure(&batch, needs).history_losses), bits(&before), "it stands still");
    let config = tiny(false);
    let device = burn::tensor::Device::flex();
    let averaged =
        BurnLearner::from_weights(config, AdamWConfig::default(), expected, device).expect("valid");
    let history = average.measure(&batch, needs).history_losses;
    for (found, expected) in history.iter().zip(averaged.losses(&batch)) {
        assert!(found.is_nan() && expected.is_nan() || (found - expected).abs() < 1e-5);
    }

    let folder = tempfile::tempdir().expect("a temporary folder");
    average.save(folder.path()).expect("a writable folder");
    let mut loaded = start();
    loaded.keep_history(0.75);
    loaded.load(folder.path()).expect("what was saved");
    assert_eq!(bits(&loaded.measure(&batch, needs).history_losses), bits(&history));
    std::fs::remove_file(folder.path().join("history.safetensors")).expect("it was saved");
    assert!(loaded.load(folder.path()).is_err(), "a run cannot go on without its history");
}

#[test]
fn steps_lower_the_loss() {
    let mut learner = BurnLearner::new(tiny(true), AdamWConfig::default(), 2).expect("valid");
    let batch = packed_batch();
    let losses: Vec<f32> = (0..60).map(|_| learner.step(&batch, 1e-2, &mut every_target).kept_loss).collect();
    assert!(losses[59] < losses[0] / 4.0, "{losses:?}");
}

#[test]
fn files_that_do_not_fit_are_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let learner = BurnLearner::new(tiny(false), AdamWConfig::default(), 5).expect("valid");
    learner.save(folder.path()).expect("a writable folder");
    let mut other = BurnLearner::new(tiny(true), AdamWConfig::default(), 5).expect("valid");
    let error = other.load(folder.path()).expect_err("another shape");
    assert!(error.to_string().contains("another model shape"), "{error:#}");

    let path = folder.path().join(WEIGHTS_FILE);
    let bytes = std::fs::read(&path).expect("the weights");
    std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("a writable folder");
    let error = BurnLearner::open(folder.path(), AdamWConfig::default()).err().expect("half a file");
    assert!(format!("{error:#}").contains("damaged"), "{error:#}");
}

#[test]
fn configurations_that_do_not_fit_are_refused_with_the_reason() {
    let text = tiny(false).to_hugging_face();
    assert_eq!(ModelConfig::from_hugging_face(&text).expect("its own text"), tiny(false));
    for (from, to, reason) in [
        ("\"llama\"", "\"gpt2\"", "model_type"),
        ("\"silu\"", "\"gelu\"", "hidden_act"),
        ("\"attention_bias\": false", "\"attention_bias\": true", "attention_bias"),
        ("\"head_dim\": 4", "\"head_dim\": 8", "head_dim"),
        ("\"num_attention_heads\": 4", "\"num_attention_heads\": 3", "not a multiple of heads"),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "not a multiple of kv_heads"),
    ] {
        assert!(text.contains(from), "{from} is not in {text}");
        let error = ModelConfig::from_hugging_face(&text.replace(from, to)).expect_err(to);
        assert!(format!("{error:#}").contains(reason), "{error:#}");
    }
    assert_eq!(specs(&tiny(true)).len() + 1, specs(&tiny(false)).len());
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
