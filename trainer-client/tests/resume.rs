//! Runs of the real program that are killed and go on: bit by bit what they would have been.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sluice_feed::random::SplitMix64;
use sluice_schemas::fingerprint::Fingerprint;
use support::{Cluster, cluster, mixture, produce, produce_scored, write_tokenizer};

const PARTITIONS: i32 = 6;
const DOCUMENTS: usize = 240;
const PATIENCE: Duration = Duration::from_mins(1);

struct Place {
    folder: tempfile::TempDir,
    cluster: Cluster,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Fingerprint::of_bytes(&std::fs::read(write_tokenizer(folder.path())).unwrap());
        std::fs::write(folder.path().join("held-out.jsonl"), "{\"text\": \"one and two\"}\n").unwrap();
        let cluster = cluster("scored", PARTITIONS);
        let documents = mixture(DOCUMENTS, tokenizer, Fingerprint::of_bytes(b"model"));
        produce_scored(&cluster, "scored", PARTITIONS, &documents);
        Self { folder, cluster }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A small run into `out` that resumes whatever is there.
    fn run(&self, out: &Path, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-train"));
        command.args(["run", "--resume", "--topic", "scored", "--bootstrap-servers"]);
        command.arg(self.cluster.bootstrap_servers()).arg("--tokenizer").arg(self.out("tokenizer.json"));
        command.args(["--hidden-size", "16", "--layers", "1", "--heads", "2", "--intermediate-size", "16"]);
        command.args([
            "--batch-size",
            "4",
            "--sequence-length",
            "32",
            "--log-documents",
            "--eval-every",
            "5",
        ]);
        command.arg("--eval").arg(format!("words={}", self.out("held-out.jsonl").display()));
        command.arg("--out").arg(out).args(flags);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }
}

/// Lines of a run's metrics, of any kind, whole ones alone.
fn lines(out: &Path, file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join(file)).unwrap_or_default();
    text.split_inclusive('\n').filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Everything a run wrote down of its steps but the time they took.
fn story(out: &Path) -> (Vec<Value>, Vec<Value>) {
    let mut metrics = lines(out, "metrics.jsonl");
    for line in &mut metrics {
        let line = line.as_object_mut().unwrap();
        line.remove("seconds");
        line.remove("data_wait_seconds");
        line.remove("cpu_seconds");
    }
    (metrics, lines(out, "documents.jsonl"))
}

/// The files of the last checkpoint.
fn last_checkpoint(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let folder = sluice_trainer::run::checkpoints::latest_checkpoint(out).unwrap().unwrap();
    let file = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap())
    };
    std::fs::read_dir(folder).unwrap().map(file).collect()
}

/// Kills the child once its metrics hold `count` lines, `delay` later; whether it was alive until then.
fn kill_after(child: &mut Child, out: &Path, count: usize, delay: Duration) -> bool {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return false;
        }
        if lines(out, "metrics.jsonl").len() >= count {
            std::thread::sleep(delay);
            child.kill().unwrap();
            return !child.wait().unwrap().success();
        }
        assert!(begun.elapsed() < PATIENCE, "it has written {count} lines by now");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn finish(command: &mut Command) {
    let output = command.stderr(Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn runs_killed_at_any_moment_go_on_as_if_nothing_had_happened() {
    // What has a state beside the model: a running threshold, an average of the weights, a shuffle buffer, a second epoch.
    let flags = [
        "--steps",
        "30",
        "--epochs",
        "3",
        "--accumulate",
        "2",
        "--shuffle-buffer",
        "20",
        "--checkpoint-every",
        "4",
        "--score",
        "improvement",
        "--history-decay",
        "0.9",
        "--scope",
        "running-quantile",
    ];
    let place = Place::new();
    let whole = place.out("whole");
    finish(&mut place.run(&whole, &flags));
    let (expected, checkpoint) = (story(&whole), last_checkpoint(&whole));
    assert_eq!(expected.0.iter().filter(|line| line["type"] == "step").count(), 30);
    assert!(
        checkpoint.contains_key("history.safetensors") && checkpoint.len() == 7,
        "{:?}",
        checkpoint.keys()
    );

    let mut generator = SplitMix64::keyed(20, 0);
    let (mut killed, mut resumed_from) = (0, std::collections::BTreeSet::new());
    for attempt in 0..40 {
        let out = place.out(&format!("killed-{attempt}"));
        let count = generator.below(expected.0.len());
        let delay = Duration::from_micros(generator.below(30_000) as u64);
        let mut child = place.run(&out, &flags).spawn().unwrap();
        killed += usize::from(kill_after(&mut child, &out, count, delay));
        let checkpoints = out.join("checkpoints");
        let before =
            checkpoints.is_dir().then(|| sluice_trainer::run::checkpoints::latest_checkpoint(&out).unwrap());
        resumed_from.insert(before.flatten().map(|path| path.file_name().unwrap().to_owned()));
        finish(&mut place.run(&out, &flags));
        assert_eq!(story(&out), expected, "killed after {count} lines and {delay:?}");
        for (file, bytes) in last_checkpoint(&out) {
            assert!(checkpoint.get(&file) == Some(&bytes), "{file} of the last checkpoint has other bytes");
        }
        std::fs::remove_dir_all(out).unwrap();
        if killed == 20 {
            break;
        }
    }
    assert_eq!(killed, 20, "a run was killed before its end");
    assert!(resumed_from.len() > 3, "from the beginning and from several checkpoints: {resumed_from:?}");
}

/// How often each token of each document was predicted, by what a run wrote down.
fn predicted(out: &Path) -> BTreeMap<(String, u64), u64> {
    let mut counts = BTreeMap::new();
    for line in lines(out, "documents.jsonl") {
        for piece in line["pieces"].as_array().unwrap() {
            let number = |name: &str| piece[name].as_u64().unwrap();
            // What stands before is context.
            for token in number("predicted_from")..number("start") + number("tokens") {
                *counts.entry((piece["document"].as_str().unwrap().to_owned(), token)).or_default() += 1;
            }
        }
    }
    counts
}

#[test]
fn a_run_that_was_killed_learns_from_every_token_as_often() {
    let place = Place::new();
    let flags = [
        "--steps",
        "100000",
        "--epochs",
        "2",
        "--accumulate",
        "6",
        "--schedule",
        "constant",
        "--shuffle-buffer",
        "9",
        "--checkpoint-every",
        "3",
    ];
    let fingerprint = Fingerprint::of_bytes(b"");
    let expected: BTreeMap<(String, u64), u64> = mixture(DOCUMENTS, fingerprint, fingerprint)
        .iter()
        .flat_map(|scored| {
            let id = scored.document.id.clone();
            (1..scored.document.tokens.len() as u64).map(move |token| ((id.clone(), token), 2))
        })
        .collect();
    let out = place.out("killed");
    for count in [6, 12, 20] {
        let mut child = place.run(&out, &flags).spawn().unwrap();
        // Past the first checkpoint, with records in every buffer.
        assert!(kill_after(&mut child, &out, count, Duration::ZERO), "it was killed before its end");
    }
    finish(&mut place.run(&out, &flags));
    let found = predicted(&out);
    assert_eq!(found.len(), expected.len(), "every token of every document");
    let off: Vec<_> = found.iter().filter(|&(token, count)| expected.get(token) != Some(count)).collect();
    assert!(off.is_empty(), "{} tokens not twice, such as {:?}", off.len(), off.first());
    let lanes: std::collections::BTreeSet<i64> =
        lines(&out, "documents.jsonl").iter().map(|line| line["lane"].as_i64().unwrap()).collect();
    assert_eq!(lanes, (0..i64::from(PARTITIONS)).collect());
}

#[test]
fn a_checkpoint_of_before_there_were_lanes_is_refused_by_name() {
    let place = Place::new();
    let out = place.out("run");
    let flags = ["--steps", "2", "--until-end"];
    finish(&mut place.run(&out, &flags));
    let state =
        sluice_trainer::run::checkpoints::latest_checkpoint(&out).unwrap().unwrap().join("state.json");
    let mut old: Value = serde_json::from_slice(&std::fs::read(&state).unwrap()).unwrap();
    old["data"] = serde_json::json!({ "ranks": [] });
    std::fs::write(&state, old.to_string()).unwrap();
    let output = place.run(&out, &flags).stderr(Stdio::piped()).output().unwrap();
    let shown = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(65), "{shown}");
    assert!(shown.contains("kept the data of a run by rank") && shown.contains("--init"), "{shown}");
}

#[test]
fn a_checkpoint_of_another_run_or_of_two_steps_is_not_gone_on_from() {
    let place = Place::new();
    let flags = ["--steps", "6", "--until-end", "--checkpoint-every", "3"];
    let latest = |out: &Path| sluice_trainer::run::checkpoints::latest_checkpoint(out).unwrap().unwrap();
    let refused = |out: &Path, expected: &str| {
        let output = place.run(out, &flags).stderr(Stdio::piped()).output().unwrap();
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(65), "{shown}");
        assert!(shown.contains(expected), "{expected:?} is missing in: {shown}");
    };
    let (out, other) = (place.out("run"), place.out("other"));
    finish(&mut place.run(&out, &flags));
    finish(&mut place.run(&other, &[&flags[..], &["--seed", "9"]].concat()));
    let (checkpoint, kept) = (latest(&out), place.out("kept"));
    std::fs::rename(&checkpoint, &kept).unwrap();
    // A whole one of another run, under the right name.
    std::fs::rename(latest(&other), &checkpoint).unwrap();
    refused(&out, "the seed differs");
    // The data of one step beside the model of another.
    std::fs::remove_dir_all(&checkpoint).unwrap();
    std::fs::rename(&kept, &checkpoint).unwrap();
    let earlier = checkpoint.with_file_name("step-0000003").join("feed.safetensors");
    std::fs::copy(earlier, checkpoint.join("feed.safetensors")).unwrap();
    refused(&out, "do not belong together");
    refused(&out, "--resume goes on from the one before");
}

#[test]
fn a_topic_that_has_lost_partitions_is_not_gone_on_with() {
    let place = Place::new();
    let out = place.out("run");
    let flags = ["--steps", "1000", "--follow", "--schedule", "constant", "--checkpoint-every", "2"];
    let mut child = place.run(&out, &flags).spawn().unwrap();
    assert!(kill_after(&mut child, &out, 8, Duration::ZERO), "it waits for more");
    // Another broker, whose topic of this name has fewer partitions.
    let fewer = cluster("scored", PARTITIONS - 1);
    let tokenizer = Fingerprint::of_bytes(&std::fs::read(place.out("tokenizer.json")).unwrap());
    let documents = mixture(DOCUMENTS, tokenizer, Fingerprint::of_bytes(b"model"));
    produce_scored(&fewer, "scored", PARTITIONS - 1, &documents);
    let place = Place { cluster: fewer, ..place };
    let output = place.run(&out, &flags).stderr(Stdio::piped()).output().unwrap();
    let shown = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(65), "{shown}");
    assert!(shown.contains("6 lanes") && shown.contains("there are 5 now"), "{shown}");
}

#[test]
fn a_run_goes_on_only_as_itself() {
    let place = Place::new();
    let out = place.out("run");
    let flags = ["--steps", "6", "--until-end", "--checkpoints-keep", "3", "--checkpoint-every", "1"];
    finish(&mut place.run(&out, &flags));
    let kept = std::fs::read_dir(out.join("checkpoints")).unwrap().count();
    assert_eq!(kept, 3);
    let before = (story(&out), last_checkpoint(&out));
    finish(&mut place.run(&out, &flags));
    assert!((story(&out), last_checkpoint(&out)) == before, "a run that is done stays as it is");
    for (other, expected) in [
        (vec!["--seed", "2"], "--seed differs"),
        (vec!["--keep", "0.5"], "the selection"),
        (vec!["--learning-rate", "0.1"], "the learning rate"),
        (vec!["--shuffle-buffer", "3"], "--shuffle-buffer differs"),
        (vec!["--accumulate", "2"], "--accumulate differs"),
        (vec!["--weight-decay", "0.2"], "the optimizer differs"),
        (vec!["--unequal-contexts", "allow"], "--unequal-contexts differs"),
        (vec!["--backward", "kept"], "--backward differs"),
        (vec!["--world-size", "2"], "give --accumulate W*A"),
    ] {
        let output = place.run(&out, &[&flags[..], &other].concat()).stderr(Stdio::piped()).output().unwrap();
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{shown}");
        assert!(shown.contains(expected), "{expected:?} is missing in: {shown}");
        assert!((story(&out), last_checkpoint(&out)) == before, "a refusal changes nothing");
    }
    // A checkpoint that lost bytes is not gone on from.
    let folder = sluice_trainer::run::checkpoints::latest_checkpoint(&out).unwrap().unwrap();
    for file in ["state.json", "feed.safetensors", "model.safetensors", "optimizer.safetensors"] {
        let whole = std::fs::read(folder.join(file)).unwrap();
        std::fs::write(folder.join(file), &whole[..whole.len() / 2]).unwrap();
        let output = place.run(&out, &flags).stderr(Stdio::piped()).output().unwrap();
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(65), "{shown}");
        assert!(shown.contains(file), "{shown}");
        std::fs::write(folder.join(file), whole).unwrap();
    }
}

#[test]
fn a_reference_killed_and_gone_on_with_is_the_one_that_was_not() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Fingerprint::of_bytes(&std::fs::read(write_tokenizer(folder.path())).unwrap());
    let cluster = cluster("curated", PARTITIONS);
    let documents = mixture(DOCUMENTS / 2, tokenizer, tokenizer);
    let payloads = documents.iter().map(|scored| scored.document.encode().to_vec());
    produce(&cluster.bootstrap_servers(), "curated", (0..PARTITIONS).cycle().zip(payloads));
    let reference = |out: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-train"));
        command.args(["reference", "--resume", "--topic", "curated", "--bootstrap-servers"]);
        command.arg(cluster.bootstrap_servers()).arg("--tokenizer").arg(folder.path().join("tokenizer.json"));
        command.args(["--hidden-size", "16", "--layers", "1", "--heads", "2", "--intermediate-size", "16"]);
        command.args(["--batch-size", "4", "--sequence-length", "32", "--checkpoint-every", "4"]);
        command.args(["--epochs", "2", "--log-documents"]).arg("--out").arg(out);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let whole = folder.path().join("whole");
    finish(&mut reference(&whole));
    let (expected, checkpoint) = (story(&whole), last_checkpoint(&whole));
    for count in [0, 3, 9, 21] {
        let out = folder.path().join(format!("killed-{count}"));
        let mut child = reference(&out).spawn().unwrap();
        assert!(kill_after(&mut child, &out, count, Duration::ZERO), "it was killed before its end");
        finish(&mut reference(&out));
        assert_eq!(story(&out), expected, "killed after {count} lines");
        assert!(last_checkpoint(&out) == checkpoint, "the last checkpoint has other bytes");
    }
}

#[test]
fn a_run_that_goes_on_still_knows_the_context_its_losses_were_scored_in() {
    let place = Place::new();
    let out = place.out("run");
    let flags = ["--steps", "1000", "--follow", "--checkpoint-every", "5", "--schedule", "constant"];
    let mut child = place.run(&out, &flags).spawn().unwrap();
    // Until it waits at the end of the topic.
    let (mut before, mut now) = (0, lines(&out, "metrics.jsonl").len());
    while now < 10 || now != before {
        std::thread::sleep(Duration::from_secs(1));
        (before, now) = (now, lines(&out, "metrics.jsonl").len());
    }
    // Asked to stop, it saves everything that it has read.
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    assert!(child.wait().unwrap().success());
    // The same model, but with half the context.
    let tokenizer = Fingerprint::of_bytes(&std::fs::read(place.out("tokenizer.json")).unwrap());
    let mut later = mixture(PARTITIONS as usize, tokenizer, Fingerprint::of_bytes(b"model"));
    for scored in &mut later {
        (scored.context.window, scored.context.stride) = (128, 128);
    }
    produce_scored(&place.cluster, "scored", PARTITIONS, &later);
    let mut child = place.run(&out, &flags).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Where it has not ended by itself.
    let _ = child.kill();
    let output = child.wait_with_output().unwrap();
    let shown = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(65), "{shown}");
    assert!(
        shown.contains("in windows of 128 tokens every 128, but others of its reference model in"),
        "{shown}"
    );
}
