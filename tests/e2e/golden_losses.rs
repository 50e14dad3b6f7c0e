//! Per-token losses of served models against `PyTorch` in float64 (`tests/golden/make_golden.py`).
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use sluice_daemon::batch::Ladder;
use sluice_daemon::score::Scorer;
use sluice_daemon::score::documents::score_documents;
use sluice_daemon::score::graft::{HeadOptions, graft};
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_tests::{golden, onnxruntime};

struct Document {
    tokens: Arc<[u32]>,
    losses: Vec<f64>,
}

fn documents(model: &str) -> (ContextPolicy, Vec<Document>) {
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(golden("losses.json")).unwrap()).unwrap();
    let number = |key: &str| u32::try_from(json[key].as_u64().unwrap()).unwrap();
    let policy = ContextPolicy { window: number("window"), stride: number("stride"), bos: Bos::None };
    let documents = json["models"][model].as_array().unwrap();
    let documents = documents.iter().map(|document| Document {
        tokens: document["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect(),
        losses: document["losses"]
            .as_array()
            .unwrap()
            .iter()
            .map(|l| l.as_f64().unwrap_or(f64::NAN))
            .collect(),
    });
    (policy, documents.collect())
}

/// Largest difference from the golden losses, all documents batched together.
fn worst_difference(name: &str, tokens_max: usize) -> f64 {
    let (policy, documents) = documents(name);
    let lengths: Vec<_> = documents.iter().map(|document| document.tokens.len()).collect();
    for needed in [2, 3, 17, policy.window as usize, 150] {
        assert!(lengths.contains(&needed), "golden documents of {needed} tokens");
    }
    let rows_max = Some(tokens_max);
    let head = HeadOptions { device: Device::Cpu, entropies: true, rows_max };
    let model = Model::load_for(&golden(name), head).unwrap();
    // Where no batch has more rows than a block of logits, nothing goes round.
    let nodes = &model.onnx.graph.as_ref().unwrap().node;
    assert_eq!(nodes.iter().any(|node| node.op_type() == "Loop"), tokens_max > 512);
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(&model, &options, true).unwrap();

    let tokens: Vec<Arc<[u32]>> = documents.iter().map(|document| Arc::clone(&document.tokens)).collect();
    let ladder = Ladder::new(policy.window as usize, 16);
    let scores = score_documents(&mut scorer, &tokens, policy, tokens_max, ladder).unwrap();
    let most = f64::from(model.identity.vocabulary).ln() as f32;
    let mut worst: f64 = 0.0;
    for (document, scores) in documents.iter().zip(&scores) {
        assert!(scores.losses[0].is_nan() && document.losses[0].is_nan());
        assert!(scores.entropies.iter().skip(1).all(|entropy| (0.0..=most).contains(entropy)));
        for (&ours, golden) in scores.losses.iter().zip(&document.losses).skip(1) {
            worst = worst.max((f64::from(ours) - golden).abs());
            assert!(ours.is_finite());
        }
    }
    worst
}

#[test]
fn float32_models_agree_to_2e_5_nats() {
    for model in ["tiny-llama", "tiny-llama-mask"] {
        for tokens_max in [64, 1024] {
            let worst = worst_difference(model, tokens_max);
            eprintln!("{model}, batches of {tokens_max}: worst difference {worst:.1e} nats");
            assert!(worst < 2e-5, "{model}: {worst}");
        }
    }
}

#[test]
fn a_float16_model_agrees_to_its_rounding() {
    let worst = worst_difference("tiny-llama-half", 1024);
    eprintln!("tiny-llama-half: worst difference {worst:.1e} nats");
    assert!(worst < 2e-2, "{worst}");
    assert!(worst > 1e-5, "half precision that costs nothing was not half precision");
}

#[test]
fn what_was_found_in_the_graph_is_reported() {
    let model = Model::load(&golden("tiny-llama-mask"), Device::Cpu, false).unwrap();
    assert_eq!(model.identity.vocabulary, 512);
    assert_eq!(model.report.after_head, ["Mul"]);
    let inputs: Vec<_> = model.inputs.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(inputs, ["input_ids", "attention_mask", "position_ids"]);
}

#[test]
fn a_graph_without_logits_is_refused_by_name() {
    use prost::Message as _;
    let bytes = std::fs::read(golden("tiny-llama").join("model.onnx")).unwrap();
    let mut model = sluice_schemas::onnx::ModelProto::decode(bytes.as_slice()).unwrap();
    model.graph.as_mut().unwrap().output[0].name = Some("hidden".to_owned());
    let error = graft(&mut model, HeadOptions::losses(Device::Cpu)).unwrap_err().to_string();
    assert!(error.contains("no output named `logits`") && error.contains("hidden"), "{error}");
}
