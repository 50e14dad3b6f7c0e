//! Models out of the exporters that people use (`tests/golden/exports`): their losses against Hugging Face in float64.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_daemon::batch::Ladder;
use sluice_daemon::score::Scorer;
use sluice_daemon::score::documents::score_documents;
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_schemas::record::{Bos, ContextPolicy, Precision};
use sluice_tests::{golden, onnxruntime};

const CONTEXT: ContextPolicy = ContextPolicy { window: 64, stride: 32, bos: Bos::None };

fn losses_json() -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(golden("exports/losses.json")).unwrap()).unwrap()
}

/// The export's folder as a hub's cache has it: links to files of other names in another folder. The exports share a
/// tokenizer, which only its fingerprint matters of.
fn hub_layout(name: &str, folder: &Path) -> PathBuf {
    let (blobs, snapshot) = (folder.join("blobs"), folder.join("snapshots/1"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(golden("exports").join(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.push(golden("tiny-llama/tokenizer.json"));
    for (number, file) in files.iter().enumerate() {
        let blob = blobs.join(format!("blob-{number}"));
        std::fs::copy(file, &blob).unwrap();
        let link = Path::new("../../blobs").join(blob.file_name().unwrap());
        std::os::unix::fs::symlink(link, snapshot.join(file.file_name().unwrap())).unwrap();
    }
    snapshot
}

fn load(name: &str, folder: &Path) -> Model {
    Model::load(&hub_layout(name, folder), Device::Cpu, false)
        .unwrap_or_else(|error| panic!("{name}: {error:#}"))
}

fn numbers(value: &serde_json::Value) -> Vec<serde_json::Value> {
    value.as_array().unwrap().clone()
}

/// The losses of each golden document.
fn losses(name: &str, model: &Model) -> Vec<Vec<f64>> {
    let documents: Vec<Arc<[u32]>> = numbers(&losses_json()["documents"])
        .iter()
        .map(|ids| numbers(ids).iter().map(|id| id.as_u64().unwrap() as u32).collect())
        .collect();
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(model, &options, false).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    let scores = score_documents(&mut scorer, &documents, CONTEXT, 256, Ladder::new(64, 16)).unwrap();
    scores.iter().map(|scores| scores.predicted().map(f64::from).collect()).collect()
}

/// Largest difference in nats over all tokens of all documents.
fn worst_difference(ours: &[Vec<f64>], theirs: &[Vec<f64>]) -> f64 {
    let mut worst = 0.0_f64;
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours.len(), theirs.len());
        worst = ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs()).fold(worst, f64::max);
    }
    worst
}

/// What Hugging Face gives for each golden document in float64.
fn golden_losses(name: &str) -> Vec<Vec<f64>> {
    let of_all = numbers(&losses_json()["losses"][name]);
    of_all.iter().map(|losses| numbers(losses).iter().map(|loss| loss.as_f64().unwrap()).collect()).collect()
}

#[test]
fn every_export_agrees_with_hugging_face() {
    let mut names: Vec<String> = losses_json()["losses"].as_object().unwrap().keys().cloned().collect();
    names.sort();
    assert!(names.len() >= 15, "{names:?}");
    for name in names {
        let golden = golden_losses(&name);
        let folder = tempfile::tempdir().unwrap();
        let mut model = load(&name, folder.path());
        let unfused = losses(&name, &model);
        model.fuse_attention(&onnxruntime()).unwrap();
        let fused = losses(&name, &model);
        // Weights are on a grid that 16 bits hold, but these exports round rotary tables and what they compute, too.
        let narrow = ["half", "brain", "fp16", "bf16"].iter().any(|ending| name.ends_with(ending));
        let allowed = if narrow { 2e-2 } else { 2e-5 };
        let worst = [&unfused, &fused].map(|ours| worst_difference(ours, &golden));
        let apart = worst_difference(&unfused, &fused);
        eprintln!(
            "{name}: worst difference {:.1e} nats as exported, {:.1e} fused, {apart:.1e} between them; allowed {allowed:.0e}; {:?}",
            worst[0], worst[1], model.attention
        );
        assert!(worst[0] < allowed && worst[1] < allowed && apart < allowed, "{name}: {worst:?}, {apart}");
    }
}

#[test]
fn what_stands_after_the_head_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let report = |name: &str| load(name, &folder.path().join(name)).report;
    assert_eq!(report("optimum-gemma2").soft_cap, Some(4.0));
    assert_eq!(report("genai-gemma2-fp32").soft_cap, Some(4.0));
    assert!(report("optimum-cohere-past").after_head.contains(&"Mul".to_owned()));
    let phi = report("torch-dynamo-phi");
    assert!(phi.head.contains("Gemm") || phi.after_head.contains(&"Add".to_owned()), "a bias: {phi:?}");
    let settled = report("optimum-llama-past").settled_inputs;
    assert_eq!(settled[0], ("past_key_values.0.key".to_owned(), "an empty cache"));
    assert!(report("optimum-llama").settled_inputs.is_empty());
    assert_eq!(
        load("torch-dynamo-llama-brain", &folder.path().join("b")).identity.precision,
        Precision::Bf16
    );
}

#[test]
fn a_rotary_table_that_the_export_rounded_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let codes = |name: &str| {
        let model = load(name, &folder.path().join(name));
        model.findings.iter().map(sluice_daemon::score::findings::Finding::code).collect::<Vec<_>>()
    };
    assert_eq!(codes("torch-legacy-llama-half"), ["rotary_table_rounded"]);
    assert_eq!(codes("torch-legacy-llama"), [""; 0]);
    assert_eq!(
        codes("genai-llama-fp16"),
        [""; 0],
        "its tables are of cosines and sines, rounded after the angle"
    );
}
