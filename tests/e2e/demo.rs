//! `ops/demo --quick`: the whole line on real text, as a newcomer runs it.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sluice_tests::root;

/// Set in the demo's environment, and so in that of every process it starts.
const MARK: &str = "SLUICE_TEST_DEMO";

fn demo(out: &Path) -> Command {
    let mut command = Command::new(root().join("ops/demo"));
    command.args(["--quick", "--out"]).arg(out).env(MARK, out).stdin(Stdio::null());
    command
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Share of a run's tokens that it learnt from.
fn share_kept(run: &Path) -> f64 {
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = metrics.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let last = records.rev().find(|record| record["type"] == "step").unwrap();
    last["tokens_kept"].as_f64().unwrap() / last["tokens"].as_f64().unwrap()
}

/// Command lines of the processes that a demo with this folder has started.
fn started_by_demo(out: &Path) -> Vec<String> {
    let mark = format!("{MARK}={}", out.display());
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let process = entry.ok()?.path();
        let environment = std::fs::read(process.join("environ")).ok()?;
        let marked = environment.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes());
        let command_line = std::fs::read(process.join("cmdline")).ok()?;
        marked.then(|| String::from_utf8_lossy(&command_line).replace('\0', " "))
    });
    processes.collect()
}

#[test]
fn the_whole_line_runs_and_reports() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("demo");
    let output = demo(&out).output().unwrap();
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{progress}");
    assert!(progress.contains("documents scored, 0 dead-lettered"), "{progress}");

    let table = String::from_utf8_lossy(&output.stdout);
    // The control learns from as many tokens as the selection has left.
    let shares: Vec<f64> = ["slm", "random"].iter().map(|run| share_kept(&out.join(run))).collect();
    assert!(shares[0] < 1.0 && (shares[0] - shares[1]).abs() < 0.01, "{shares:?}");
    for run in ["slm", "clm", "random"] {
        assert!(table.lines().any(|line| line.starts_with(run)), "{run} is not in the table:\n{table}");
        assert!(out.join(run).join("metrics.jsonl").exists());
    }
    let starts: Vec<_> = ["slm", "clm", "random"]
        .map(|run| json(&out.join(run).join("run.json"))["initial_weights"].clone())
        .into();
    assert!(starts[0].is_string() && starts.iter().all(|start| *start == starts[0]), "{starts:?}");

    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    for part in ["<svg", "Loss on held-out text", "Selected against unselected", "Tokens, one by one"] {
        assert!(page.contains(part), "{part} is not in the report");
    }
    assert!(!page.contains("src=\"http") && !page.contains("href=\"http"), "the report stands alone");
    assert_eq!(started_by_demo(&out), Vec::<String>::new());

    // A folder that the demo did not make is left alone.
    let foreign = folder.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.txt"), "mine").unwrap();
    assert_eq!(demo(&foreign).status().unwrap().code(), Some(64));
    assert!(foreign.join("thesis.txt").exists());
}

#[test]
fn an_interrupted_demo_leaves_nothing_running() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("demo");
    let mut process = demo(&out).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_mins(5);
    while !out.join("reference/metrics.jsonl").exists() {
        assert!(Instant::now() < deadline, "the reference model never began to train");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(started_by_demo(&out).len() > 2, "the demo, its broker and its trainer run");
    let interrupt = Command::new("kill").args(["-INT", &process.id().to_string()]).status().unwrap();
    assert!(interrupt.success());
    assert_eq!(process.wait().unwrap().code(), Some(130));
    assert_eq!(started_by_demo(&out), Vec::<String>::new());
}
