//! Runs from local files: the same steps as from a topic that holds the same documents.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::process::Command;

use serde_json::{Value, json};
use sluice_schemas::fingerprint::Fingerprint;
use support::mixture;
use support::program::{Place, fingerprint_of, stderr, succeed};

/// Lines as `sluiced model score` prints them: of every second document each, the second file compressed.
fn write_files(place: &Place) -> [String; 2] {
    let tokenizer = fingerprint_of(place);
    let lines: Vec<Value> = mixture(80, tokenizer, Fingerprint::of_bytes(b"model"))
        .into_iter()
        .map(|scored| {
            let losses = scored.reference_losses.to_vec();
            let losses: Vec<Option<f32>> =
                losses.into_iter().map(|loss| (!loss.is_nan()).then_some(loss)).collect();
            json!({
                "id": scored.document.id,
                "source": scored.document.source,
                "tokens": scored.document.tokens.to_vec(),
                "losses": losses,
                "tokenizer": tokenizer.to_string(),
                "reference_model": scored.reference_model.to_string(),
                "context": { "window": 32, "stride": 16, "bos": "none", "bos_token": null },
            })
        })
        .collect();
    let of = |first: usize| {
        let lines = lines.iter().skip(first).step_by(2).map(|line| format!("{line}\n"));
        lines.collect::<String>()
    };
    let files = [place.path("even.jsonl"), place.path("odd.jsonl.zst")];
    std::fs::write(&files[0], of(0)).unwrap();
    std::fs::write(&files[1], zstd::encode_all(of(1).as_bytes(), 1).unwrap()).unwrap();
    files
}

/// A command without a broker: there is none at its address.
fn without_kafka(place: &Place, command: &str, out: &str, flags: &[&str]) -> Command {
    let run = place.training(command, "none", out);
    let all: Vec<_> = run.get_args().map(std::ffi::OsStr::to_owned).collect();
    let mut run = support::program::sluice_train();
    // Less its topic and its broker.
    run.arg(&all[0]).args(&all[5..]).args(["--bootstrap-servers", "127.0.0.1:1"]).args(flags);
    run
}

fn steps(place: &Place, out: &str) -> Vec<(u64, String, String)> {
    let metrics = std::fs::read_to_string(place.path(&format!("{out}/metrics.jsonl"))).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let text = |line: &Value, key: &str| line[key].as_str().unwrap().to_owned();
    lines
        .filter(|line| line["type"] == "step")
        .map(|line| (line["step"].as_u64().unwrap(), text(&line, "data"), text(&line, "digest")))
        .collect()
}

const COMMON: [&str; 8] =
    ["--objective", "slm", "--epochs", "2", "--shuffle-buffer", "8", "--schedule", "constant"];

#[test]
fn a_run_from_files_is_the_run_from_a_topic_that_holds_the_same() {
    let place = Place::new();
    let [even, odd] = write_files(&place);
    succeed(place.training("run", "scored", "topic").args(COMMON).args(["--steps", "1000"]));
    let files = ["--files", &even, &odd];
    succeed(without_kafka(&place, "run", "files", &files).args(COMMON).args(["--steps", "1000"]));
    let wanted = steps(&place, "topic");
    assert!(wanted.len() > 12, "{}", wanted.len());
    assert_eq!(steps(&place, "files"), wanted);
    let record = |out: &str| support::program::json(&place.path(&format!("{out}/run.json")));
    assert_eq!(record("files")["reference_model"], record("topic")["reference_model"]);

    // Stopped and gone on with, once within the first pass and once within the second.
    for length in ["3", "11", "1000"] {
        let flags = [&files[..], &["--resume", "--steps", length]].concat();
        succeed(without_kafka(&place, "run", "again", &flags).args(COMMON));
    }
    assert_eq!(steps(&place, "again"), wanted);

    // The length of sequences comes from the first line, where nobody gives one.
    let mut run = support::program::sluice_train();
    run.args([
        "run",
        "--tokenizer",
        &place.path("tokenizer.json"),
        "--out",
        &place.path("length"),
        "--steps",
        "1",
    ]);
    succeed(
        run.args(["--hidden-size", "16", "--layers", "1", "--heads", "2", "--batch-size", "2"]).args(files),
    );
    assert_eq!(record("length")["sequence_length"], 32);
}

#[test]
fn a_reference_is_made_of_files_of_text_and_of_tokens() {
    let place = Place::new();
    let [even, _] = write_files(&place);
    let text = place.path("text.jsonl");
    std::fs::write(
        &text,
        (0..40).map(|n| format!("{{\"text\": \"some text, number {n}\"}}\n")).collect::<Vec<_>>().concat(),
    )
    .unwrap();
    succeed(&mut without_kafka(&place, "reference", "held", &["--files", &even, &text, "--epochs", "2"]));
    let held = steps(&place, "held");
    assert!(held.len() > 8, "{}", held.len());

    // Streamed, the documents come in another order, and a run that is gone on with is the same run.
    let streamed =
        ["--files", &even, &text, "--epochs", "2", "--shuffle-buffer", "10", "--schedule", "constant"];
    succeed(&mut without_kafka(&place, "reference", "streamed", &streamed));
    let whole = steps(&place, "streamed");
    assert_ne!(whole[0].1, held[0].1);
    let short = [&streamed[..], &["--steps", "5"]].concat();
    succeed(&mut without_kafka(&place, "reference", "again", &short));
    succeed(&mut without_kafka(&place, "reference", "again", &[&streamed[..], &["--resume"]].concat()));
    assert_eq!(steps(&place, "again"), whole);
    // A topic is streamed by the same flag.
    let mut topic = place.training("reference", "documents", "topic");
    succeed(topic.args(["--epochs", "2", "--shuffle-buffer", "10", "--schedule", "constant"]));
    let tokens = |steps: &[(u64, String, String)]| steps.len();
    assert!(tokens(&steps(&place, "topic")) > 8);
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_its_name_and_line() {
    let place = Place::new();
    let [even, odd] = write_files(&place);
    let good = std::fs::read_to_string(&even).unwrap();
    let refused = |flags: &[&str], code: i32, words: &[&str]| {
        let mut run = without_kafka(&place, "run", "refused", flags);
        let output = run.args(COMMON).args(["--steps", "3"]).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said} lacks one of {words:?}");
    };
    let bad = place.path("bad.jsonl");
    let other = Fingerprint::of_bytes(b"another").to_string();
    let tokenizer = fingerprint_of(&place).to_string();
    for (from, to, word) in [
        ("\"reference_model\"", "\"model\"", "it has no reference_model: `sluiced model score` prints it"),
        ("\"context\"", "\"contexts\"", "it has no context"),
        ("\"losses\":[null,", "\"losses\":[", "values for"),
        (tokenizer.as_str(), other.as_str(), "another tokenizer"),
        ("{\"context\"", "{context", "not a document"),
    ] {
        assert!(good.contains(from), "{from}");
        std::fs::write(&bad, good.replacen(from, to, 1)).unwrap();
        refused(&["--files", &bad, &odd], 65, &["bad.jsonl, line 1", word]);
    }
    refused(&["--files", &even, "/no/file.jsonl"], 64, &["/no/file.jsonl"]);
    refused(&["--files", &even, "--topic", "scored"], 64, &["--topic"]);
    // Losses of two models do not mix, in files as in a topic.
    let model = Fingerprint::of_bytes(b"model").to_string();
    std::fs::write(&bad, good.replace(&model, &other)).unwrap();
    refused(&["--files", &bad, &odd], 65, &[&other[..8]]);

    // A file that is another one by now is no part of the same run.
    let files = ["--files", &even, &odd, "--steps", "3"];
    succeed(without_kafka(&place, "run", "changed", &files).args(COMMON));
    std::fs::write(&even, good.split_once('\n').unwrap().1).unwrap();
    let mut run =
        without_kafka(&place, "run", "changed", &["--files", &even, &odd, "--steps", "6", "--resume"]);
    let output = run.args(COMMON).output().unwrap();
    assert_eq!(output.status.code(), Some(64), "{}", stderr(&output));
}
