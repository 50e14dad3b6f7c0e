//! Runs that are made longer, and runs that branch off others.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::program::{Place, json, stderr, succeed};

/// A run of `steps` steps into `out`, with further flags.
fn run(place: &Place, out: &str, steps: &str, flags: &[&str]) -> Command {
    let mut run = place.training("run", "scored", out);
    run.args(["--objective", "slm", "--steps", steps, "--epochs", "9", "--warmup-steps", "2"]);
    run.args(["--shuffle-buffer", "8", "--learning-rate", "1e-2"]).args(flags);
    run
}

/// Of each step, what it read and what it came to.
fn steps(place: &Place, out: &str) -> Vec<(u64, String, String)> {
    let metrics = std::fs::read_to_string(place.path(&format!("{out}/metrics.jsonl"))).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let text = |line: &Value, key: &str| line[key].as_str().unwrap().to_owned();
    lines
        .filter(|line| line["type"] == "step")
        .map(|line| (line["step"].as_u64().unwrap(), text(&line, "data"), text(&line, "digest")))
        .collect()
}

fn refused(command: &mut Command, code: i32, words: &[&str]) {
    let output = command.output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(words.iter().all(|word| said.contains(word)), "{said} lacks one of {words:?}");
}

#[test]
fn a_run_is_made_longer_where_that_changes_nothing_of_its_past() {
    let place = Place::new();
    let constant = ["--schedule", "constant"];
    succeed(&mut run(&place, "straight", "14", &constant));
    succeed(&mut run(&place, "longer", "6", &constant));
    succeed(&mut run(&place, "longer", "14", &["--schedule", "constant", "--resume"]));
    assert_eq!(steps(&place, "straight").len(), 14);
    assert_eq!(steps(&place, "longer"), steps(&place, "straight"), "as if it had been asked for at once");
    let schedule = |out: &str| json(&place.path(&format!("{out}/run.json")))["schedule"].clone();
    assert_eq!(schedule("longer"), schedule("straight"));

    // The decay that is yet to come may move, and the one that has begun may not.
    let wsd = |steps, more: &[&str]| {
        run(&place, "wsd", steps, &[&["--schedule", "wsd", "--decay-steps", "4"], more].concat())
    };
    let before_the_decay = ["--checkpoint-every", "6", "--checkpoints-keep", "9"];
    succeed(&mut wsd("10", &before_the_decay));
    refused(&mut wsd("14", &["--resume"]), 64, &["the learning rate, its schedule or --steps"]);
    std::fs::remove_dir_all(place.path("wsd/checkpoints/step-0000010")).unwrap();
    succeed(&mut wsd("14", &["--resume"]));
    assert_eq!(steps(&place, "wsd").len(), 14);

    succeed(&mut run(&place, "cosine", "6", &[]));
    refused(
        &mut run(&place, "cosine", "14", &["--resume"]),
        64,
        &["the learning rate, its schedule or --steps"],
    );
    // The share of tokens that is kept falls over all steps, so that other ones would have been kept.
    let falling = ["--schedule", "constant", "--keep", "linear:0.8:0.4"];
    succeed(&mut run(&place, "falling", "6", &falling));
    let resumed = [&falling[..], &["--resume"]].concat();
    refused(&mut run(&place, "falling", "14", &resumed), 64, &["--steps, over which --keep falls"]);
}

#[test]
fn a_branch_goes_on_from_a_checkpoint_with_its_optimizer_and_its_place_in_the_data() {
    let place = Place::new();
    let constant = ["--schedule", "constant"];
    succeed(&mut run(&place, "straight", "12", &constant));
    succeed(&mut run(&place, "trunk", "6", &constant));
    let checkpoint = place.path("trunk/checkpoints/step-0000006");
    let same = ["--schedule", "constant", "--branch-from", &checkpoint];
    succeed(&mut run(&place, "same", "12", &same));
    assert_eq!(steps(&place, "same"), steps(&place, "straight")[6..], "the same settings give the same run");
    let record = json(&place.path("same/run.json"));
    assert_eq!(record["settings"]["branched_from"]["step"], 6);
    assert_eq!(record["reference_model"], json(&place.path("straight/run.json"))["reference_model"]);

    // Another selection and another rate, over the same data.
    let other = ["--schedule", "wsd", "--keep", "0.3", "--branch-from", &checkpoint];
    succeed(&mut run(&place, "other", "10", &other));
    let data = |steps: &[(u64, String, String)]| {
        steps.iter().map(|(step, data, _)| (*step, data.clone())).collect::<Vec<_>>()
    };
    let (others, straight) = (steps(&place, "other"), steps(&place, "straight"));
    assert_eq!(data(&others), data(&straight[6..10]));
    assert!(others.iter().zip(&straight[6..]).all(|(one, other)| one.2 != other.2));

    // The same command again goes on with the branch; the trunk is as it was.
    std::fs::remove_dir_all(place.path("other/checkpoints/step-0000010")).unwrap();
    succeed(&mut run(&place, "other", "10", &[&other[..], &["--resume"]].concat()));
    assert_eq!(steps(&place, "other"), others);
    // One that was killed before it had its checkpoint.
    std::fs::create_dir_all(place.path("killed/checkpoints")).unwrap();
    succeed(&mut run(&place, "killed", "12", &[&same[..], &["--resume"]].concat()));
    assert_eq!(steps(&place, "killed"), straight[6..]);
    assert!(Path::new(&checkpoint).join("model.safetensors").is_file());

    refused(
        &mut run(&place, "wrong", "12", &["--branch-from", &place.path("trunk")]),
        64,
        &["holds no state.json", "--branch-from"],
    );
    let mut larger = run(&place, "larger", "12", &same);
    refused(larger.args(["--accumulate", "2"]), 65, &["micro-batches"]);
}

#[test]
fn a_model_that_has_learnt_gets_a_lower_rate_unless_another_is_asked_for() {
    let place = Place::new();
    let plain = |out: &str, flags: &[&str]| {
        let mut run = place.training("run", "scored", out);
        succeed(run.args(["--steps", "2", "--epochs", "1"]).args(flags));
        json(&place.path(&format!("{out}/run.json")))
    };
    let fresh = plain("fresh", &[]);
    assert_eq!(fresh["schedule"]["peak"], 1e-3);
    let optimizer = &fresh["settings"]["optimizer"];
    assert_eq!(
        (&optimizer["beta1"], &optimizer["beta2"], &optimizer["eps"]),
        (&0.9.into(), &0.95.into(), &1e-8.into())
    );

    let mut run = support::program::sluice_train();
    run.args(["run", "--bootstrap-servers", &place.cluster.bootstrap_servers(), "--topic", "scored"]);
    run.args([
        "--tokenizer",
        &place.path("tokenizer.json"),
        "--out",
        &place.path("trained"),
        "--epochs",
        "1",
    ]);
    run.args([
        "--init",
        &place.path("fresh/checkpoints/step-0000002"),
        "--steps",
        "2",
        "--sequence-length",
        "32",
    ]);
    run.args([
        "--schedule",
        "linear",
        "--learning-rate-floor",
        "0",
        "--adam-beta1",
        "0.8",
        "--adam-beta2",
        "0.99",
    ]);
    succeed(run.args(["--adam-epsilon", "1e-6", "--warmup-steps", "1"]));
    let trained = json(&place.path("trained/run.json"));
    assert_eq!((&trained["schedule"]["peak"], &trained["schedule"]["floor"]), (&8e-5.into(), &0.0.into()));
    let optimizer = &trained["settings"]["optimizer"];
    assert_eq!(
        (&optimizer["beta1"], &optimizer["beta2"], &optimizer["eps"]),
        (&0.8.into(), &0.99.into(), &1e-6.into())
    );
}
