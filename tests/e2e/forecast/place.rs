//! Two models, a stream that is to be forecast, and the programs on them.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use sluice_tests::{binary, golden, onnxruntime};
use tempfile::TempDir;

/// Documents of the stream, one in four of mathematics.
pub const DOCUMENTS: usize = 120;

/// A sheet of sums; one in five lines is a wrong one.
fn mathematics(random: &mut fastrand::Rng) -> String {
    let line = |random: &mut fastrand::Rng| {
        let (left, right) = (random.u32(1..30), random.u32(1..30));
        let wrong = if random.u8(0..5) == 0 { random.u32(1..9) } else { 0 };
        format!("{left} plus {right} is {}. ", left + right + wrong)
    };
    (0..random.usize(3..12)).map(|_| line(random)).collect::<Vec<_>>().concat()
}

fn prose(random: &mut fastrand::Rng) -> String {
    let words = ["the", "year", "little", "was", "of", "and", "a", "house", "in", "old", "river", "went"];
    (0..random.usize(8..60)).map(|_| random.choice(words).unwrap()).collect::<Vec<_>>().join(" ")
}

/// Two models and a stream that is to be forecast.
pub struct Place {
    pub folder: TempDir,
}

impl Place {
    /// A base model of prose and a little mathematics, and a reference: the base model after mathematics alone.
    pub fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        let mut random = fastrand::Rng::with_seed(7);
        let general: Vec<(&str, String)> = (0..120)
            .map(|number| match number % 8 {
                0 => ("", mathematics(&mut random)),
                _ => ("", prose(&mut random)),
            })
            .collect();
        place.write("general.jsonl", general);
        place.write("curated.jsonl", (0..120).map(|_| ("", mathematics(&mut random))));
        let stream: Vec<(&str, String)> = (0..DOCUMENTS)
            .map(|number| match number % 4 {
                // With noise inside.
                0 => ("math", mathematics(&mut random) + &prose(&mut random)),
                _ => ("prose", prose(&mut random)),
            })
            .collect();
        place.write("stream.jsonl", stream);
        let shape = ["--hidden-size", "32", "--layers", "1", "--heads", "2"];
        place.train("base", "general.jsonl", &shape);
        let base = place.path("base-checkpoint");
        place.train("reference", "curated.jsonl", &["--init", text(&base), "--learning-rate", "3e-4"]);
        for model in ["base", "reference"] {
            let scored = succeeds(&mut place.sluiced(&[
                "model",
                "score",
                "--model-path",
                text(&place.path(&format!("{model}-onnx"))),
                text(&place.path("stream.jsonl")),
            ]));
            std::fs::write(place.path(&format!("by-{model}.jsonl")), scored.stdout).unwrap();
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write<'a>(&self, name: &str, documents: impl IntoIterator<Item = (&'a str, String)>) {
        let lines = documents.into_iter().enumerate().map(|(number, (source, text))| {
            json!({ "id": format!("document-{number}"), "text": text, "source": source }).to_string()
        });
        std::fs::write(self.path(name), lines.collect::<Vec<_>>().join("\n")).unwrap();
    }

    /// A model of these texts, as a checkpoint and as the daemon serves it.
    fn train(&self, name: &str, texts: &str, flags: &[&str]) {
        let out = self.path(name);
        let mut command = sluice_train(&["reference", "--files", text(&self.path(texts))]);
        command.args(["--out", text(&out), "--tokenizer", text(&tokenizer())]);
        command.args(["--sequence-length", "64", "--batch-size", "4", "--epochs", "6", "--seed", "3"]);
        succeeds(command.args(flags));
        for (format, folder) in [("safetensors", "checkpoint"), ("onnx", "onnx")] {
            let folder = self.path(&format!("{name}-{folder}"));
            let flags = ["export", "--run", text(&out), "--out", text(&folder), "--format", format];
            succeeds(&mut sluice_train(&flags));
        }
    }

    pub fn sluiced(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("sluiced"));
        command.args(arguments).env("ORT_DYLIB_PATH", onnxruntime()).stdin(Stdio::null());
        command.current_dir(self.folder.path());
        command
    }

    /// A forecast from lines that this model has scored.
    pub fn of_files(&self, by: &str, flags: &[&str]) -> Command {
        let file = self.path(&format!("by-{by}.jsonl"));
        let mut command = sluice_train(&["forecast", "--files", text(&file)]);
        command.args(["--tokenizer", text(&tokenizer())]).args(flags);
        command
    }

    /// The losses of each document by a model, by its id; null where nothing is predicted.
    pub fn losses(&self, by: &str) -> BTreeMap<String, (String, Vec<Option<f64>>)> {
        let lines = std::fs::read_to_string(self.path(&format!("by-{by}.jsonl"))).unwrap();
        let document = |line: &str| {
            let line: Value = serde_json::from_str(line).unwrap();
            let losses = line["losses"].as_array().unwrap().iter().map(Value::as_f64).collect();
            (word(&line["id"]), (word(&line["source"]), losses))
        };
        lines.lines().map(document).collect()
    }
}

pub fn tokenizer() -> PathBuf {
    golden("tiny-llama/tokenizer.json")
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn word(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

pub fn sluice_train(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("sluice-train"));
    command.args(arguments).stdin(Stdio::null());
    command
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn succeeds(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", stderr(&output));
    output
}
