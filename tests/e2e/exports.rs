//! Models out of the exporters that people use (`tests/golden/exports`): their losses against Hugging Face in float64.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sluice_daemon::batch::Ladder;
use sluice_daemon::score::Scorer;
use sluice_daemon::score::documents::score_documents;
use sluice_daemon::score::findings::Finding;
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

/// The losses of each golden document, in batches of many rows.
fn losses(name: &str, model: &Model) -> Vec<Vec<f64>> {
    losses_on(name, model, Ladder::new(64, 16).split_at(model.length_limit))
}

fn losses_on(name: &str, model: &Model, ladder: Ladder) -> Vec<Vec<f64>> {
    let documents: Vec<Arc<[u32]>> = numbers(&losses_json()["documents"])
        .iter()
        .map(|ids| numbers(ids).iter().map(|id| id.as_u64().unwrap() as u32).collect())
        .collect();
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(model, &options, false).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    let scores = score_documents(&mut scorer, &documents, CONTEXT, 1024, ladder).unwrap();
    scores.iter().map(|scores| scores.predicted().map(f64::from).collect()).collect()
}

/// Largest difference in nats over all tokens of all documents.
fn worst_difference(ours: &[Vec<f64>], theirs: &[Vec<f64>]) -> f64 {
    let mut worst = 0.0_f64;
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours.len(), theirs.len());
        // `max` would pass over what is no number.
        assert!(ours.iter().chain(theirs).all(|loss| loss.is_finite()));
        worst = ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs()).fold(worst, f64::max);
    }
    worst
}

/// What Hugging Face gives for each golden document in float64.
fn golden_losses(name: &str) -> Vec<Vec<f64>> {
    let of_all = numbers(&losses_json()["losses"][name]);
    of_all.iter().map(|losses| numbers(losses).iter().map(|loss| loss.as_f64().unwrap()).collect()).collect()
}

/// What the attention of each export was, or became; each of them is causal, and a window, `ALiBi` or part of a rotation is one
/// reason more.
fn attention_of(name: &str) -> (&'static str, &'static str) {
    match name {
        "optimum-bloom" => ("", "do not lead to"),
        "optimum-mistral" => ("", "not plain causal"),
        "optimum-gemma2-windows" => ("fused", "not plain causal"),
        _ if name.starts_with("genai") => ("exported", ""),
        _ => ("fused", ""),
    }
}

#[test]
fn every_export_agrees_with_hugging_face() {
    let mut names: Vec<String> = losses_json()["losses"].as_object().unwrap().keys().cloned().collect();
    names.sort();
    assert!(names.len() >= 21, "{names:?}");
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
        let report = model.attention.as_ref().unwrap();
        let (made_of, left) = attention_of(&name);
        let made: Vec<&str> = [("exported", report.exported.len()), ("fused", report.fused.len())]
            .into_iter()
            .filter_map(|(what, count)| (count > 0).then_some(what))
            .collect();
        assert_eq!(made.join(" "), made_of, "{name}: {report:?}");
        let why = report.left.first().map_or("", |left| &left.why);
        assert!(why.contains(left) && why.is_empty() == left.is_empty(), "{name}: {report:?}");
        if made_of == "fused" && left.is_empty() {
            assert_eq!(softmaxes(&model), 0, "{name}");
        }
        if name == "optimum-llama" {
            assert!(
                !model.inputs.iter().any(|(input, _)| input == "attention_mask"),
                "only attention read it"
            );
        }
    }
}

/// Nodes of attention that is spelled out; the loss head has none.
fn softmaxes(model: &Model) -> usize {
    let nodes = &model.onnx.graph.as_ref().unwrap().node;
    nodes.iter().filter(|node| node.op_type() == "Softmax").count()
}

/// What a GPU would be given, tried and run on the CPU: it has not run on a GPU.
#[test]
fn on_a_gpu_the_operator_goes_by_the_element_type() {
    let folder = tempfile::tempdir().unwrap();
    let fused = |name: &str| {
        let path = hub_layout(name, &folder.path().join(name));
        let mut model = Model::load(&path, Device::Cuda(0), false).unwrap();
        model.fuse_attention(&onnxruntime()).unwrap();
        let report = model.attention.clone().unwrap();
        (model, report.fused.keys().copied().collect::<Vec<_>>(), report.left)
    };
    for (name, operator, allowed) in
        [("optimum-llama", "Attention", 2e-5), ("torch-legacy-llama-half", "GroupQueryAttention", 2e-2)]
    {
        let (model, operators, left) = fused(name);
        assert_eq!((operators, left.len(), softmaxes(&model)), (vec![operator], 0, 0), "{name}");
        let worst = worst_difference(&losses(name, &model), &golden_losses(name));
        assert!(worst < allowed, "{name}: {worst}");
    }
    // The CPU has no kernels for bfloat16.
    assert_eq!(fused("torch-dynamo-llama-brain").1, ["GroupQueryAttention"]);
    let (_, operators, left) = fused("torch-legacy-llama");
    assert!(operators.is_empty() && left[0].why.contains("opset before 18"), "{left:?}");
}

/// Beyond 32 tokens this model takes another table of angles, and its graph goes by the length that a batch is padded to.
#[test]
fn each_document_sees_the_rotary_table_of_its_own_length() {
    let name = "genai-phi3-longrope";
    let folder = tempfile::tempdir().unwrap();
    let model = load(name, folder.path());
    assert_eq!(model.length_limit, Some(32));
    let golden = golden_losses(name);
    let split = worst_difference(&losses(name, &model), &golden);
    assert!(split < 2e-5, "{split}");
    let together = worst_difference(&losses_on(name, &model, Ladder::new(64, 16)), &golden);
    assert!(together > 0.1, "a batch of both is what this test is about, and gave {together}");
    assert_eq!(load("genai-llama-fp32", &folder.path().join("other")).length_limit, None);
}

/// The same export with another config.json: the graph cannot be what it says.
#[test]
fn a_graph_that_is_not_what_its_configuration_says_is_named() {
    let keys = |name: &str, config: serde_json::Value| -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let folder = hub_layout(name, folder.path());
        let path = folder.join("config.json");
        let mut whole: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        whole.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, whole.to_string()).unwrap();
        let mut model = Model::load(&folder, Device::Cpu, false).unwrap();
        model.fuse_attention(&onnxruntime()).unwrap();
        let differs = |finding: &Finding| match finding {
            Finding::ConfigDiffers { key, .. } => Some((*key).to_owned()),
            _ => None,
        };
        model.findings.iter().filter_map(differs).collect()
    };
    let yarn = serde_json::json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}});
    let window = serde_json::json!({"sliding_window": 8});
    for name in ["optimum-llama", "genai-llama-fp32", "torch-dynamo-llama"] {
        assert_eq!(keys(name, yarn.clone()), ["rope_scaling"], "{name}");
        assert_eq!(keys(name, window.clone()), ["sliding_window"], "{name}");
        assert_eq!(
            keys(name, serde_json::json!({"text_config": window.clone()})),
            ["sliding_window"],
            "{name}"
        );
        assert_eq!(
            keys(name, serde_json::json!({"alibi": true, "clip_qkv": 8.0})),
            ["alibi", "clip_qkv"],
            "{name}"
        );
        assert!(keys(name, serde_json::json!({})).is_empty(), "{name}");
    }
    let cap = serde_json::json!({"attn_logit_softcapping": 50.0});
    assert!(keys("optimum-gemma2", cap.clone()).is_empty());
    assert_eq!(keys("optimum-llama", cap), ["attn_logit_softcapping"]);
    // What is spelled out is not known to be without a window.
    assert!(keys("optimum-mistral", window).is_empty());
}

/// The nodes that ran, as ONNX Runtime says; on a GPU the same nodes on the CPU would be refused.
#[test]
fn what_ran_where_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = load("optimum-llama", folder.path());
    model.fuse_attention(&onnxruntime()).unwrap();
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    let placement = Scorer::new(&model, &options, false).unwrap().placement().unwrap();
    let operators: Vec<&str> = placement.rows().map(|(kind, ..)| kind.operator.as_str()).collect();
    assert!(operators.contains(&"GroupQueryAttention") && operators.contains(&"MatMul"), "{operators:?}");
    // Of the loss head, inside of its loop.
    assert!(operators.contains(&"LogSoftmax"), "{operators:?}");
    assert_eq!(placement.check(Device::Cpu), Ok(()));
    let refused = placement.check(Device::Cuda(0)).unwrap_err().to_string();
    assert!(refused.contains("GroupQueryAttention of float"), "{refused}");
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
        model.findings.iter().map(Finding::code).collect::<Vec<_>>()
    };
    assert_eq!(codes("torch-legacy-llama-half"), ["rotary_table_rounded"]);
    assert_eq!(codes("torch-legacy-llama"), [""; 0]);
    assert_eq!(
        codes("genai-llama-fp16"),
        [""; 0],
        "its tables are of cosines and sines, rounded after the angle"
    );
}
