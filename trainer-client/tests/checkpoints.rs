//! Published checkpoints of every family (`tests/golden/checkpoints`), in and out, against transformers in float64.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_trainer::model::checkpoint::{INDEX_FILE, read_weights, write_weights};
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig};
use sluice_trainer::run::tensors::{Pending, Stored, read_tensors};
use sluice_trainer::training::learner::{Learner, WEIGHTS_FILE};

const FAMILIES: [&str; 9] = [
    "llama",
    "llama-tied",
    "llama3-shards",
    "llama-linear",
    "llama-yarn",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/checkpoints")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Documents, and of one checkpoint the losses of those that it can read.
fn documents_and_losses(name: &str) -> (Vec<Vec<u32>>, Vec<Vec<f64>>) {
    let golden = json(&golden().join("losses.json"));
    let losses: Vec<Vec<f64>> = serde_json::from_value(golden["losses"][name].clone()).unwrap();
    let documents: Vec<Vec<u32>> = serde_json::from_value(golden["documents"].clone()).unwrap();
    (documents.into_iter().take(losses.len()).collect(), losses)
}

fn open(folder: &Path) -> BurnLearner {
    BurnLearner::open(folder, AdamWConfig::default())
        .unwrap_or_else(|error| panic!("{}: {error:#}", folder.display()))
}

/// A row for each document, with padding behind it.
fn batch(documents: &[Vec<u32>]) -> Batch {
    let longest = documents.iter().map(Vec::len).max().unwrap();
    let mut batch = Batch { rows: documents.len(), len: longest, ..Batch::default() };
    for document in documents {
        let end = batch.tokens.len() + longest;
        batch.tokens.extend(document);
        batch.segments.extend(document.iter().map(|_| 1));
        batch.positions.extend(0..document.len() as u32);
        batch.targets.extend(&document[1..]);
        batch.tokens.resize(end, 0);
        batch.segments.resize(end, 0);
        batch.positions.resize(end, 0);
        batch.targets.resize(end, NO_TARGET);
    }
    batch
}

/// Largest difference of a loss from those given, in nats.
fn worst_difference(learner: &BurnLearner, documents: &[Vec<u32>], expected: &[Vec<f64>]) -> f64 {
    let batch = batch(documents);
    let losses = learner.losses(&batch);
    let ours = losses.iter().zip(&batch.targets).filter(|&(_, &target)| target != NO_TARGET);
    let ours: Vec<f64> = ours.map(|(&loss, _)| f64::from(loss)).collect();
    let expected: Vec<f64> = expected.concat();
    assert_eq!(ours.len(), expected.len());
    ours.iter().zip(&expected).map(|(ours, expected)| (ours - expected).abs()).fold(0.0, f64::max)
}

#[test]
fn every_family_has_the_losses_of_transformers() {
    for name in FAMILIES {
        let (documents, losses) = documents_and_losses(name);
        assert!(documents.len() >= 4 && losses.iter().flatten().all(|loss| loss.is_finite()), "{name}");
        let worst = worst_difference(&open(&golden().join(name)), &documents, &losses);
        eprintln!("{name}: worst difference {worst:.1e} nats");
        assert!(worst < 2e-5, "{name}: {worst}");
    }
}

#[test]
fn what_families_add_has_the_gradients_of_transformers() {
    for name in ["qwen2", "qwen3", "granite"] {
        let folder = golden().join(name);
        let (documents, _) = documents_and_losses(name);
        let batch = batch(&documents);
        let predicted = (0u32..).zip(&batch.targets).filter(|&(_, &target)| target != NO_TARGET);
        let kept: Vec<u32> = predicted.map(|(position, _)| position).skip(1).step_by(3).collect();
        let (expected, _) = read_tensors(&folder.join("gradients.safetensors")).unwrap();
        let expected: HashMap<_, _> =
            expected.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        let mut learner = open(&folder);
        for recomputes in [false, true] {
            learner.recompute_activations(recomputes);
            let gradients = learner.gradients(&batch, &kept);
            assert_eq!(gradients.len(), expected.len(), "{name}");
            for gradient in gradients {
                let expected = &expected[&gradient.name];
                assert_eq!(gradient.shape, expected.shape, "{name}: {}", gradient.name);
                let largest = expected.values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
                let pairs = gradient.values.iter().zip(&expected.values);
                let worst = pairs.map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f32::max);
                // The keys' biases move all scores of a query alike, so that what is left is rounding.
                assert!(worst <= 2e-5 * largest.max(0.1), "{name}: {} is {worst} off", gradient.name);
            }
        }
    }
}

#[test]
fn a_window_that_slides_bounds_the_longest_sequence() {
    let config = ModelConfig::read(&golden().join("mistral")).unwrap();
    assert_eq!(config.max_position_embeddings, 32);
    let with = |from: &str, to: &str| {
        let text = std::fs::read_to_string(golden().join("mistral/config.json")).unwrap();
        assert!(text.contains(from), "{text}");
        ModelConfig::from_hugging_face(text.replace(from, to).as_bytes()).unwrap().max_position_embeddings
    };
    assert_eq!(with("\"sliding_window\": 32", "\"sliding_window\": null"), 64);
    assert_eq!(with("\"sliding_window\": 32", "\"sliding_window\": 4096"), 64);
    assert_eq!(with("\"sliding_window\": 32", "\"windows\": 32"), 64, "Mistral's own is 4,096");
    // Qwen2's is there, and off.
    assert_eq!(ModelConfig::read(&golden().join("qwen2")).unwrap().max_position_embeddings, 64);
}

#[test]
fn what_came_with_the_weights_is_carried_over() {
    let source = golden().join("llama");
    let folder = tempfile::tempdir().unwrap();
    open(&source).save(folder.path()).unwrap();
    let mut config = json(&source.join("config.json"));
    config["dtype"] = "float32".into();
    config["torch_dtype"] = "float32".into();
    assert_eq!(json(&folder.path().join("config.json")), config);
    assert_eq!(config["a_key_of_tomorrow"], serde_json::json!([1, 2]));
    for name in ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"] {
        let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
        assert_eq!(read(folder.path()), read(&source), "{name}");
    }
    // And once more, from what was written.
    let again = tempfile::tempdir().unwrap();
    open(folder.path()).save(again.path()).unwrap();
    assert_eq!(json(&again.path().join("config.json")), config);
    assert!(again.path().join("chat_template.jinja").exists());
    let weights = |folder: &Path| std::fs::read(folder.join(WEIGHTS_FILE)).unwrap();
    assert_eq!(weights(folder.path()), weights(again.path()));
}

#[test]
fn weights_go_out_in_sixteen_bits_and_in_shards() {
    let source = golden().join("llama3-shards");
    let config = ModelConfig::read(&source).unwrap();
    let weights = read_weights(&source, &config).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let pending = || weights.iter().map(Pending::of).collect();
    write_weights(folder.path(), pending(), Stored::F16, 16_000).unwrap();
    let index = json(&folder.path().join(INDEX_FILE));
    let bytes: usize = weights.iter().map(|weight| 2 * weight.values.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    let files: std::collections::BTreeSet<&str> =
        index["weight_map"].as_object().unwrap().values().map(|file| file.as_str().unwrap()).collect();
    assert!(files.len() > 2 && files.contains("model-00001-of-00003.safetensors"), "{files:?}");
    assert!(!folder.path().join(WEIGHTS_FILE).exists());
    // The weights are on a grid that 16 bits hold.
    assert_eq!(read_weights(folder.path(), &config).unwrap(), weights);

    let missing = files.iter().next_back().unwrap();
    std::fs::remove_file(folder.path().join(missing)).unwrap();
    let error = format!("{:#}", read_weights(folder.path(), &config).unwrap_err());
    assert!(error.contains(missing), "{error}");
    let index = std::fs::read_to_string(folder.path().join(INDEX_FILE)).unwrap();
    std::fs::write(folder.path().join(INDEX_FILE), index.replace(missing, "../other.safetensors")).unwrap();
    let error = format!("{:#}", read_weights(folder.path(), &config).unwrap_err());
    assert!(error.contains("names a file outside its folder: ../other.safetensors"), "{error}");
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let refused = |name: &str, from: &str, to: &str| {
        let text = std::fs::read_to_string(golden().join(name).join("config.json")).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        let error = ModelConfig::from_hugging_face(text.replacen(from, to, 1).as_bytes()).expect_err(to);
        format!("{error:#}")
    };
    for (name, from, to, reason) in [
        ("llama", "\"llama\"", "\"gemma3_text\"", "model_type is \"gemma3_text\""),
        ("llama", "\"llama\"", "\"cohere\"", "model_type is \"cohere\""),
        ("llama", "\"silu\"", "\"gelu\"", "hidden_act is \"gelu\""),
        ("llama", "\"mlp_bias\": false", "\"mlp_bias\": true", "mlp_bias is true"),
        ("qwen3", "\"attention_bias\": false", "\"attention_bias\": true", "attention_bias is true"),
        ("llama-yarn", "\"yarn\"", "\"longrope\"", "\"longrope\""),
        ("llama-yarn", "\"yarn\"", "\"dynamic\"", "\"dynamic\""),
        ("llama-yarn", "\"factor\": 4.0", "\"factor\": -1.0", "factor -1 of the rotary scaling"),
        ("llama3-shards", "\"low_freq_factor\"", "\"other\"", "without low_freq_factor"),
        (
            "llama",
            "\"rope_theta\"",
            "\"partial_rotary_factor\": 0.5, \"rope_theta\"",
            "partial_rotary_factor",
        ),
        ("llama", "\"vocab_size\"", "\"quantization_config\": {}, \"vocab_size\"", "quantization_config"),
        ("granite", "\"logits_scaling\": 2.0", "\"logits_scaling\": 0", "logits_scaling"),
        ("qwen2", "\"full_attention\"", "\"chunked_attention\"", "\"chunked_attention\""),
    ] {
        let said = refused(name, from, to);
        assert!(said.contains(reason), "{name} {to}: {said}");
    }

    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig::read(&golden().join("llama")).unwrap();
    let error = |folder: &Path| format!("{:#}", read_weights(folder, &config).unwrap_err());
    assert!(error(folder.path()).contains("neither model.safetensors nor model.safetensors.index.json"));
    std::fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    assert!(error(folder.path()).contains("PyTorch's pickled weights"));
    let eight_bits = safetensors::tensor::TensorView::new(safetensors::Dtype::I8, vec![1], &[1]).unwrap();
    let bytes = safetensors::serialize([("model.norm.weight", eight_bits)], None).unwrap();
    std::fs::write(folder.path().join(WEIGHTS_FILE), bytes).unwrap();
    let said = error(folder.path());
    assert!(
        said.contains("model.norm.weight") && said.contains("is I8, expected F32, F16 or BF16"),
        "{said}"
    );
}
