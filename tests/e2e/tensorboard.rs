//! Event files of a run, as `TensorBoard` reads them.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sluice_tests::Broker;
use sluice_tests::{binary, golden, torch_python};

const READ: &str = "
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
print(json.dumps({tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}))
";

/// Step and value of each scalar, by tag.
type Scalars = BTreeMap<String, Vec<(u64, f64)>>;

fn in_tensorboard(run: &Path) -> Scalars {
    let output = Command::new(torch_python()).args(["-c", READ]).arg(run).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn in_metrics(run: &Path, kind: &str, key: &str) -> Vec<(u64, f64)> {
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter(|line| line["type"] == kind)
        .map(|line| (line["step"].as_u64().unwrap(), line[key].as_f64().unwrap()))
        .collect()
}

#[test]
fn tensorboard_reads_what_metrics_say_also_of_a_run_that_went_on_from_an_earlier_step() {
    let broker = Broker::start(&["documents:1"]);
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (folder.path().join("text.jsonl"), folder.path().join("run"));
    let line =
        |number: u32| format!("{{\"text\": \"one {number} and two and three, {number} times over\"}}\n");
    std::fs::write(&text, (0..60).map(line).collect::<String>()).unwrap();
    let tokenizer = golden("tiny-llama/tokenizer.json");
    let to_broker = ["--bootstrap-servers", &broker.bootstrap_servers, "--topic", "documents"];
    let ingest = Command::new(binary("sluiced"))
        .arg("ingest")
        .args(to_broker)
        .arg("--tokenizer")
        .arg(&tokenizer)
        .arg(&text)
        .status();
    assert!(ingest.unwrap().success());
    let train = |steps: &str, flags: &[&str]| {
        let mut train = Command::new(binary("sluice-train"));
        train.arg("reference").args(to_broker).arg("--tokenizer").arg(&tokenizer).arg("--out").arg(&out);
        train.args(["--hidden-size", "16", "--layers", "1", "--heads", "2", "--batch-size", "2"]);
        train.args(["--sequence-length", "32", "--steps", steps, "--schedule", "constant", "--tensorboard"]);
        train.arg("--eval").arg(format!("held={}", text.display())).args(["--eval-every", "3"]).args(flags);
        assert!(train.status().unwrap().success());
    };
    train("6", &["--checkpoint-every", "4", "--checkpoints-keep", "9"]);
    // What came after step 4 is lost, as where the run was killed, and its events are void.
    std::fs::remove_dir_all(out.join("checkpoints/step-0000006")).unwrap();
    train("8", &["--resume"]);

    let files = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(files.filter(|name| name.to_string_lossy().starts_with("events.out.tfevents.")).count(), 2);
    let scalars = in_tensorboard(&out);
    for (tag, kind, key) in [
        ("train/loss", "step", "loss"),
        ("train/loss_all", "step", "loss_all"),
        ("train/learning_rate", "step", "learning_rate"),
        ("train/gradient_norm", "step", "gradient_norm"),
        ("train/tokens", "step", "tokens"),
        ("time/step_seconds", "step", "seconds"),
        ("eval/held/loss", "eval", "loss"),
    ] {
        let (shown, written) = (&scalars[tag], in_metrics(&out, kind, key));
        let steps: Vec<u64> = if kind == "step" { (1..=8).collect() } else { vec![0, 3, 6, 8] };
        assert_eq!(shown.iter().map(|(step, _)| *step).collect::<Vec<_>>(), steps, "{tag}");
        assert_eq!(shown.len(), written.len(), "{tag}");
        let is_same = |(one, other): (&(u64, f64), &(u64, f64))| {
            one.0 == other.0 && (one.1 - other.1).abs() <= 1e-6 * other.1.abs()
        };
        assert!(shown.iter().zip(&written).all(is_same), "{tag}: {shown:?} {written:?}");
    }
}
