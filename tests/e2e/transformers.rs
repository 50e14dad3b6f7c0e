//! What the trainer writes, read by transformers: checkpoints of every family after a few steps, as they are and as they are
//! published in 16 bits and in shards.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_tests::{golden, torch_python};
use sluice_trainer::export::publish;
use sluice_trainer::model::BurnLearner;
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::run::tensors::Stored;
use sluice_trainer::training::learner::Learner as _;

/// Loads each folder as transformers does by itself, refuses a weight too many or too few, and prints the losses of the
/// documents in float64, and which tokens end a text.
const READ: &str = "
import json, sys, torch, transformers
asked = json.load(sys.stdin)
answers = {}
for folder in asked['folders']:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    assert not wrong, f'{folder} does not load as it is: {wrong}'
    losses = []
    with torch.no_grad():
        for document in asked['documents']:
            tokens = torch.tensor([document])
            logits = model(tokens).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction='none').tolist())
    answers[folder] = {'losses': losses, 'end': model.generation_config.eos_token_id, 'name': type(model).__name__}
print(json.dumps(answers))
";

#[derive(serde::Deserialize)]
struct Answer {
    losses: Vec<Vec<f64>>,
    end: serde_json::Value,
    name: String,
}

fn in_transformers(folders: &[PathBuf], documents: &[Vec<u32>]) -> BTreeMap<PathBuf, Answer> {
    let mut python = Command::new(torch_python())
        .args(["-B", "-c", READ])
        .env("HF_HUB_OFFLINE", "1")
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let asked = json!({ "folders": folders, "documents": documents }).to_string();
    python.stdin.take().unwrap().write_all(asked.as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// One document in a row.
fn batch(document: &[u32]) -> Batch {
    let mut targets = document[1..].to_vec();
    targets.push(NO_TARGET);
    Batch {
        rows: 1,
        len: document.len(),
        tokens: document.to_vec(),
        segments: vec![1; document.len()],
        positions: (0..document.len() as u32).collect(),
        targets,
        ..Batch::default()
    }
}

fn losses(folder: &Path, documents: &[Vec<u32>]) -> Vec<f64> {
    let learner = BurnLearner::open(folder, AdamWConfig::default()).unwrap();
    let of = |document: &Vec<u32>| learner.losses(&batch(document)).into_iter().filter(|loss| !loss.is_nan());
    documents.iter().flat_map(of).map(f64::from).collect()
}

#[test]
fn transformers_computes_what_the_trainer_has_made_of_every_family() {
    let text = std::fs::read_to_string(golden("checkpoints/losses.json")).unwrap();
    let text: serde_json::Value = serde_json::from_str(&text).unwrap();
    let names: Vec<String> = text["losses"].as_object().unwrap().keys().cloned().collect();
    assert!(names.len() >= 9, "{names:?}");
    let documents: Vec<Vec<u32>> = serde_json::from_value(text["documents"].clone()).unwrap();
    // What the shortest window holds.
    let documents = &documents[..4];
    let work = tempfile::tempdir().unwrap();
    let mut folders = Vec::new();
    for name in &names {
        let mut learner =
            BurnLearner::open(&golden("checkpoints").join(name), AdamWConfig::default()).unwrap();
        for _ in 0..3 {
            learner.step(&batch(&documents[3]), 3e-3, &mut |losses| {
                (0..).zip(losses).filter(|(_, loss)| !loss.is_nan()).map(|(position, _)| position).collect()
            });
        }
        let (own, published) = (work.path().join(name), work.path().join(format!("{name}-published")));
        std::fs::create_dir(&own).unwrap();
        learner.save(&own).unwrap();
        publish(&own, &published, Stored::Bf16, 16_000).unwrap();
        assert!(published.join("model.safetensors.index.json").exists(), "{name}");
        folders.extend([own, published]);
    }
    let answers = in_transformers(&folders, documents);
    for folder in &folders {
        let Answer { losses: theirs, end, name } = &answers[folder];
        let theirs = theirs.concat();
        let ours = losses(folder, documents);
        assert_eq!(ours.len(), theirs.len());
        let worst = ours.iter().zip(&theirs).map(|(one, other)| (one - other).abs()).fold(0.0, f64::max);
        let shown = folder.file_name().unwrap().to_string_lossy();
        eprintln!("{shown}: {name}, worst difference {worst:.1e} nats");
        assert!(worst < 2e-5, "{shown}: {worst}");
        // The llama's own file says more than its config.json.
        let wanted = if matches!(&*shown, "llama" | "llama-published") { json!([3, 5]) } else { json!(3) };
        assert_eq!(*end, wanted, "{shown}");
    }
    let families =
        answers.values().map(|answer| answer.name.as_str()).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(
        families.into_iter().collect::<Vec<_>>(),
        [
            "GraniteForCausalLM",
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM"
        ]
    );
}
