//! The model and its selective step: what a token sees, micro-batches, checkpoints, refusals.

mod support;

use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::select::Needs;
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::weights::specs;
use sluice_trainer::model::{BurnLearner, Device, ModelConfig};
use sluice_trainer::training::learner::{Learner, StepOutcome, WEIGHTS_FILE};
use support::model::{bits, every_second_target, every_target, largest_difference, packed_batch, tiny};

const LEARNING_RATE: f64 = 1e-3;

fn step(learner: &mut BurnLearner, batch: &Batch) -> StepOutcome {
    learner.step(batch, LEARNING_RATE, &mut every_second_target)
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
    let device = Device::cpu();
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
    assert_eq!(ModelConfig::from_hugging_face(text.as_bytes()).expect("its own text"), tiny(false));
    for (from, to, reason) in [
        ("\"llama\"", "\"gpt2\"", "model_type"),
        ("\"silu\"", "\"gelu\"", "hidden_act"),
        ("\"attention_bias\": false", "\"attention_bias\": true", "attention_bias"),
        ("\"head_dim\": 4", "\"head_dim\": 7", "head_dim"),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "not a multiple of kv_heads"),
    ] {
        assert!(text.contains(from), "{from} is not in {text}");
        let error = ModelConfig::from_hugging_face(text.replace(from, to).as_bytes()).expect_err(to);
        assert!(format!("{error:#}").contains(reason), "{error:#}");
    }
    assert_eq!(specs(&tiny(true)).len() + 1, specs(&tiny(false)).len());
}
