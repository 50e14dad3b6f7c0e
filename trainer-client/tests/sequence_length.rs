//! How long sequences are, and what happens where that is not what the reference read at once.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::process::Output;

use serde_json::Value;
use support::produce;
use support::program::{Place, json, stderr};

/// Tokens of the windows that the records of a [`Place`] were scored in; about two in three documents are longer.
const WINDOW: u64 = 32;

fn run(place: &Place, out: &str, flags: &[&str]) -> Output {
    let mut training = place.training_of_any_length("run", "scored", out);
    training.args(["--steps", "6", "--until-end", "--checkpoint-every", "3"]).args(flags);
    training.output().unwrap()
}

fn length(place: &Place, out: &str) -> u64 {
    json(&place.path(&format!("{out}/run.json")))["sequence_length"].as_u64().unwrap()
}

/// Tokens that could be chosen, of those that were predicted.
fn eligible(place: &Place, out: &str) -> (u64, u64) {
    let text = std::fs::read_to_string(place.path(&format!("{out}/metrics.jsonl"))).unwrap();
    let steps = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let steps: Vec<Value> = steps.filter(|line| line["type"] == "step").collect();
    let scored = steps.iter().map(|step| step["scored"].as_u64().unwrap()).sum();
    (scored, steps.last().unwrap()["tokens"].as_u64().unwrap())
}

#[test]
fn sequences_are_as_long_as_the_windows_of_the_first_record() {
    let place = Place::new();
    let output = run(&place, "run", &[]);
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    assert_eq!(length(&place, "run"), WINDOW);
    assert!(said.contains("sequences of 32 tokens") && !said.contains("a sequence holds"), "{said}");
    let (scored, tokens) = eligible(&place, "run");
    assert_eq!(scored, tokens, "every loss has its counterpart");

    // One that goes on has the length that it began with, whatever the topic says by then.
    let output = run(&place, "run", &["--resume"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let output = run(&place, "run", &["--resume", "--sequence-length", "64"]);
    assert_eq!(output.status.code(), Some(64));
    assert!(stderr(&output).contains("has another shape than the flags say"), "{}", stderr(&output));

    // A model to go on from reads no more than it can.
    let short = run(&place, "short", &["--sequence-length", "16"]);
    assert!(short.status.success(), "{}", stderr(&short));
    let init = place.path("short/checkpoints/step-0000006");
    let mut training = support::program::sluice_train();
    training.args(["run", "--bootstrap-servers", &place.cluster.bootstrap_servers(), "--topic", "scored"]);
    training.args([
        "--tokenizer",
        &place.path("tokenizer.json"),
        "--out",
        &place.path("init"),
        "--init",
        &init,
    ]);
    let output = training.args(["--steps", "2", "--until-end", "--batch-size", "4"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(length(&place, "init"), 16);
}

#[test]
fn another_length_is_said_with_what_follows() {
    let place = Place::new();
    let output = run(&place, "longer", &["--sequence-length", "64"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("no token has more than 32 tokens of context"), "{}", stderr(&output));
    let (scored, tokens) = eligible(&place, "longer");
    assert_eq!(scored, tokens, "longer documents are read in the reference's windows");

    let output = run(&place, "masked", &["--sequence-length", "16"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("they cannot be chosen"), "{}", stderr(&output));
    let (masked, tokens) = eligible(&place, "masked");
    assert!(masked > 0 && masked < tokens, "{masked} of {tokens}");

    let output = run(&place, "allowed", &["--sequence-length", "16", "--unequal-contexts", "allow"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("they are ranked like all others"), "{}", stderr(&output));
    let (scored, tokens) = eligible(&place, "allowed");
    assert_eq!(scored, tokens);

    let output = run(&place, "refused", &["--sequence-length", "16", "--unequal-contexts", "refuse"]);
    assert_eq!(output.status.code(), Some(64), "{}", stderr(&output));
    assert!(stderr(&output).contains("see --sequence-length"), "{}", stderr(&output));

    let output = run(&place, "across", &["--attend-across-documents"]);
    assert_eq!(output.status.code(), Some(64));
    assert!(stderr(&output).contains("give --unequal-contexts allow too"), "{}", stderr(&output));
}

#[test]
fn what_is_wrong_is_found_before_a_record_is_waited_for() {
    let place = Place::new();
    place.cluster.create_topic("empty", 2, 1).unwrap();
    let follow = |flags: &[&str]| {
        let mut training = place.training_of_any_length("run", "empty", "out");
        training.args(["--steps", "1", "--follow"]).args(flags).output().unwrap()
    };
    for (flags, expected) in [
        (["--eval", "gone=/absent.jsonl"], "/absent.jsonl"),
        (["--token-losses", "none"], "names no evaluation set"),
    ] {
        let output = follow(&flags);
        assert_eq!(output.status.code(), Some(64), "{}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
    // A record that is no scored document is refused while its length is asked for.
    produce(&place.cluster.bootstrap_servers(), "empty", [(0, vec![1, 2, 3])]);
    let output = follow(&[]);
    assert_eq!(output.status.code(), Some(65), "{}", stderr(&output));
    assert!(stderr(&output).contains("partition 0, offset 0"), "{}", stderr(&output));
}
