//! `experiment 1 --quick` of the benches: from text to table and plot, interrupted once.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sluice_tests::{binary, onnxruntime, root};
use sluice_trainer::model::optimizer::AdamWConfig;

/// Settings of the caller, which must not become settings of the runs: the scope alone would have the plain runs refused.
const EXPORTED: [(&str, &str); 4] = [
    ("SLUICE_TRAIN_SCOPE", "sequence"),
    ("SLUICE_TRAIN_WEIGHT_DECAY", "0.5"),
    ("SLUICED_SCORE_STRIDE_TOKENS", "1"),
    ("SLUICED_LIMITS_IN_FLIGHT_TOKENS", "nonsense"),
];

fn experiment(out: &Path) -> Command {
    let mut command = Command::new(binary("experiment"));
    command.args(["1", "--quick", "--out"]).arg(out).current_dir(root());
    command.envs(EXPORTED);
    command.env("ORT_DYLIB_PATH", onnxruntime()).stdin(Stdio::null());
    command
}

/// Run folders that are marked as done, with the time of the mark.
fn marks(out: &Path) -> Vec<(String, std::time::SystemTime)> {
    let mut found = Vec::new();
    let mut folders = vec![out.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.ends_with("done.json") {
                let name = path.strip_prefix(out).unwrap().display().to_string();
                found.push((name, path.metadata().unwrap().modified().unwrap()));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn an_interrupted_experiment_goes_on_and_ends_with_data_table_and_plots() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("experiment");
    let mut first = experiment(&out).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_mins(5);
    let students = |out: &Path| marks(out).iter().filter(|(name, _)| name.contains("-seed-")).count();
    while students(&out) < 2 {
        assert!(Instant::now() < deadline && first.try_wait().unwrap().is_none(), "no student is done");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Killed outright it would leave the student that is in training to finish by itself.
    let terminate = Command::new("kill").args(["-TERM", &first.id().to_string()]).status().unwrap();
    assert!(terminate.success());
    assert_eq!(first.wait().unwrap().code(), Some(0));
    let before = marks(&out);

    let output = experiment(&out).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("runs to go, about ") && said.contains(" left"), "{said}");
    let after = marks(&out);
    assert!(before.iter().all(|mark| after.contains(mark)), "what was done is not done again");
    assert_eq!(students(&out), 32, "four kinds in each of four groups, two seeds");

    let table = String::from_utf8_lossy(&output.stdout);
    for part in [
        "scratch-tiny",
        "continual-tiny",
        "continual-mixed-tiny",
        "scratch-small",
        "A smoke run",
        "Tokens at k = 60 %",
    ] {
        assert!(table.contains(part), "{part} is missing:\n{table}");
    }
    assert_eq!(std::fs::read_to_string(out.join("results/README.md")).unwrap().trim_end(), table.trim_end());
    let results: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("results/results.json")).unwrap()).unwrap();
    for group in results["groups"].as_array().unwrap() {
        for run in group["runs"].as_array().unwrap() {
            let number = |name: &str| run["effort"][name].as_f64().unwrap();
            assert!(number("flops") > 0.0 && number("cpu_seconds") > 0.0 && number("seconds") > 0.0, "{run}");
            let sets: Vec<_> = run["curve"].as_array().unwrap().iter().map(|eval| &eval["set"]).collect();
            assert!(["math", "rest", "answers"].iter().all(|set| sets.contains(&&(*set).into())), "{sets:?}");
            // Plain reaches its own final loss with all of its own tokens, if it does not go up again.
            if run["kind"] == "plain" {
                let ratio = run["to_plain"]["tokens"].as_f64().unwrap();
                assert!(ratio > 0.0 && ratio <= 1.0, "{run}");
                assert_eq!(run["tokens_kept"], run["effort"]["tokens"]);
            } else {
                assert!(run["tokens_kept"].as_u64() < run["effort"]["tokens"].as_u64());
            }
        }
        let name = format!("{}-{}", group["setting"].as_str().unwrap(), group["size"].as_str().unwrap());
        let plot = std::fs::read_to_string(out.join(format!("results/loss-{name}.svg"))).unwrap();
        assert_eq!(plot.matches("<polyline").count(), 4, "a line for each kind");
        let page = std::fs::read_to_string(out.join(format!("report-{name}.html"))).unwrap();
        for part in ["Four kinds of tokens", "Scores", "k over time", "Settings"] {
            assert!(page.contains(part), "{part} is not in the report");
        }
    }
    // What the caller has exported is in no run.
    let run = out.join("runs/scratch-tiny/slm-60-seed-1/run.json");
    let run: serde_json::Value = serde_json::from_slice(&std::fs::read(run).unwrap()).unwrap();
    assert_eq!(run["objective"]["scope"], "batch");
    assert_eq!(run["settings"]["optimizer"]["weight_decay"], AdamWConfig::default().weight_decay);
    // Scoring is counted where scores are looked at, and nowhere else.
    let row = |kind: &str| {
        let rows = results["groups"][0]["rows"].as_array().unwrap();
        rows.iter().find(|row| row["kind"] == kind).unwrap().clone()
    };
    assert_eq!(row("plain")["flops_ratio"], row("plain")["flops_ratio_with_scoring"]);

    // Another plan does not mix with this one, and a folder of somebody else's is left alone.
    let other = experiment(&out).args(["--gsm8k", "/nowhere"]).status().unwrap();
    assert_eq!(other.code(), Some(64));
    std::fs::write(folder.path().join("thesis.txt"), "mine").unwrap();
    assert_eq!(experiment(folder.path()).status().unwrap().code(), Some(64));
    for flag in ["--sources", "--daemon", "--trainer"] {
        let nowhere = experiment(&folder.path().join("x")).args([flag, "/nowhere"]).status().unwrap();
        assert_eq!(nowhere.code(), Some(64), "{flag}");
    }
}
