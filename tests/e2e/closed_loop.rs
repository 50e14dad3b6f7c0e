//! A model of the trainer, exported and served, gives the losses that the trainer itself computes.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::sync::Arc;

use sluice_daemon::batch::{Ladder, plan, windows};
use sluice_daemon::score::documents::score_documents;
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_daemon::score::{Score as _, Scorer};
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_schemas::record::{Bos, ContextPolicy, Precision};
use sluice_tests::{golden, onnxruntime};
use sluice_trainer::export::{INLINE_BYTES_MAX, export_onnx};
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig, Variant};
use sluice_trainer::run::tensors::Stored;
use sluice_trainer::training::learner::Learner as _;

const LEN: usize = 48;

fn config(tied: bool) -> ModelConfig {
    ModelConfig {
        vocab_size: 512,
        hidden_size: 32,
        intermediate_size: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        max_position_embeddings: LEN,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: tied,
        variant: Variant::default(),
    }
}

/// One document that fills a row.
fn batch(tokens: &[u32]) -> Batch {
    let mut targets = tokens[1..].to_vec();
    targets.push(NO_TARGET);
    Batch {
        rows: 1,
        len: tokens.len(),
        tokens: tokens.to_vec(),
        segments: vec![1; tokens.len()],
        positions: (0..tokens.len() as u32).collect(),
        targets,
        ..Batch::default()
    }
}

fn agrees(tied: bool) {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, served) = (folder.path().join("checkpoint"), folder.path().join("served"));
    std::fs::create_dir(&checkpoint).unwrap();
    let tokens: Vec<u32> = (0..LEN as u32).map(|index| index * index * 7 % 512).collect();
    let batch = batch(&tokens);
    let mut learner = BurnLearner::new(config(tied), AdamWConfig::default(), 5).unwrap();
    // A few steps, so that the losses are not those of a model that knows nothing.
    for _ in 0..5 {
        learner.step(&batch, 1e-2, &mut |_| (0..LEN as u32 - 1).collect());
    }
    learner.save(&checkpoint).unwrap();
    std::fs::copy(golden("tiny-llama/tokenizer.json"), checkpoint.join("tokenizer.json")).unwrap();
    export_onnx(&checkpoint, &served, Stored::F32, INLINE_BYTES_MAX).unwrap();

    let model = Model::load(&served, Device::Cpu, false).unwrap();
    assert_eq!(
        (model.identity.vocabulary, model.context_max, model.identity.precision),
        (512, Some(LEN as u32), Precision::F32)
    );
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(&model, &options, false).unwrap();
    let document: Arc<[u32]> = tokens.into();
    let policy = ContextPolicy { window: LEN as u32, stride: LEN as u32 / 2, bos: Bos::None };
    let served =
        scorer.score(&plan(windows(0, &document, policy), 4096, Ladder::new(LEN, 16))[0]).unwrap().losses;
    let trained = learner.losses(&batch);
    assert_eq!(served.len(), LEN - 1);
    for (position, (served, trained)) in served.iter().zip(&trained).enumerate() {
        assert!((served - trained).abs() < 1e-4, "position {position}: {served} served, {trained} trained");
    }
    let spread =
        trained[..LEN - 1].iter().fold(0.0_f32, |spread, loss| spread.max((loss - trained[0]).abs()));
    assert!(spread > 0.1, "losses that are all alike would agree whatever the order");
}

/// The losses of a checkpoint's documents as the daemon scores them, from a graph that is stored so.
fn served(name: &str, stored: Stored, inline_bytes_max: usize, documents: &[Arc<[u32]>]) -> Vec<Vec<f32>> {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("checkpoints").join(name);
    export_onnx(&source, folder.path(), stored, inline_bytes_max).unwrap();
    std::fs::copy(golden("tiny-llama/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let model = Model::load(folder.path(), Device::Cpu, false).unwrap();
    assert_eq!(model.findings, [], "{name}");
    assert_eq!(model.data_folder.is_some(), inline_bytes_max == 0, "{name}");
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(&model, &options, false).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    let longest = model.context_max.unwrap();
    let policy = ContextPolicy { window: longest, stride: longest / 2, bos: Bos::None };
    // All in one batch, so that short ones are padded.
    let scores = score_documents(&mut scorer, documents, policy, 4096, Ladder::new(64, 64)).unwrap();
    scores.iter().map(|scores| scores.predicted().collect()).collect()
}

/// Every family of `tests/golden/checkpoints`, exported and served, has the losses of transformers in float64.
#[test]
fn every_family_is_served_as_transformers_computes_it() {
    let text = std::fs::read_to_string(golden("checkpoints/losses.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let documents: Vec<Vec<u32>> = serde_json::from_value(golden["documents"].clone()).unwrap();
    let documents: Vec<Arc<[u32]>> = documents.into_iter().map(Into::into).collect();
    let losses: BTreeMap<String, Vec<Vec<f64>>> = serde_json::from_value(golden["losses"].clone()).unwrap();
    assert!(losses.len() >= 9);
    for (name, losses) in losses {
        for (stored, inline_bytes_max, allowed) in [
            (Stored::F32, INLINE_BYTES_MAX, 2e-5),
            (Stored::F32, 0, 2e-5),
            (Stored::F16, INLINE_BYTES_MAX, 2e-2),
            (Stored::Bf16, 0, 1e-1),
        ] {
            let served = served(&name, stored, inline_bytes_max, &documents[..losses.len()]);
            let (served, expected) = (served.concat(), losses.concat());
            assert_eq!(served.len(), expected.len(), "{name}");
            let pairs = served.iter().zip(&expected);
            let worst = pairs.map(|(one, other)| (f64::from(*one) - other).abs()).fold(0.0, f64::max);
            eprintln!("{name} {stored:?}: worst difference {worst:.1e} nats");
            assert!(worst < allowed, "{name} {stored:?}: {worst}");
        }
    }
}

#[test]
fn an_untied_model_is_served_as_it_was_trained() {
    agrees(false);
}

#[test]
fn a_tied_model_is_served_as_it_was_trained() {
    agrees(true);
}
