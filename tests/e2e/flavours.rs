//! The matrix of `tests/golden/flavours.py`: dtype x inputs x id type x head x opset, each against numpy in float64.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::Value;
use sluice_daemon::batch::Ladder;
use sluice_daemon::score::Scorer;
use sluice_daemon::score::documents::score_documents;
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_tests::{golden, onnxruntime, python};

const CONTEXT: ContextPolicy = ContextPolicy { window: 32, stride: 16, bos: Bos::None };

fn array(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn worst_difference(folder: &Path, documents: &[Arc<[u32]>], losses: &Value) -> anyhow::Result<f64> {
    let model = Model::load(folder, Device::Cpu, false)?;
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(&model, &options, false)?;
    // All in one batch, so that short rows are padded far.
    let scores = score_documents(&mut scorer, documents, CONTEXT, 128, Ladder::new(32, 16))?;
    let mut worst = 0.0_f64;
    for (scores, golden) in scores.iter().zip(array(losses)) {
        assert_eq!(scores.predicted().count(), array(golden).len());
        for (ours, golden) in scores.predicted().zip(array(golden)) {
            worst = worst.max((f64::from(ours) - golden.as_f64().unwrap()).abs());
        }
    }
    Ok(worst)
}

#[test]
fn every_flavour_agrees_with_numpy() {
    let folder = tempfile::tempdir().unwrap();
    let script = golden("flavours.py");
    let made = Command::new(python()).arg(&script).arg(folder.path()).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let json: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("golden.json")).unwrap()).unwrap();
    let documents: Vec<Arc<[u32]>> = array(&json["documents"])
        .iter()
        .map(|ids| array(ids).iter().map(|id| id.as_u64().unwrap() as u32).collect())
        .collect();
    let models = json["models"].as_object().unwrap();
    assert_eq!(models.len(), 3 * 2 * 4 * 8 * 3);

    let mut worst: BTreeMap<&str, f64> = BTreeMap::new();
    let mut failures = Vec::new();
    for (name, model) in models {
        let of_model = folder.path().join(name);
        std::fs::copy(golden("tiny-llama/tokenizer.json"), of_model.join("tokenizer.json")).unwrap();
        let dtype = model["dtype"].as_str().unwrap();
        // bfloat16 is computed in single precision on the CPU, and its weights are exact.
        let allowed = if dtype == "float16" { 2e-2 } else { 2e-5 };
        match worst_difference(&of_model, &documents, &model["losses"]) {
            Ok(difference) => {
                let worst = worst.entry(dtype).or_default();
                *worst = worst.max(difference);
                if difference > allowed {
                    failures.push(format!("{name}: {difference:.1e} nats"));
                }
            }
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    for (dtype, worst) in worst {
        eprintln!("{dtype}: worst difference {worst:.1e} nats");
    }
    let shown = failures.iter().take(20).map(String::as_str).collect::<Vec<_>>();
    assert!(failures.is_empty(), "{} of {}, such as:\n{}", failures.len(), models.len(), shown.join("\n"));
}
