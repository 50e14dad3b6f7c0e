//! The program on a broker with two topics in it.

use std::process::{Command, Output, Stdio};

use serde_json::Value;
use sluice_schemas::fingerprint::Fingerprint;

use super::{Cluster, cluster, mixture, produce, produce_scored, write_tokenizer};

pub fn sluice_train() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-train"));
    command.stdin(Stdio::null());
    command
}

/// Flags of a model and batch small enough to train in a moment.
pub const SMALL: [&str; 14] = [
    "--hidden-size",
    "16",
    "--layers",
    "1",
    "--heads",
    "2",
    "--intermediate-size",
    "16",
    "--batch-size",
    "4",
    "--sequence-length",
    "32",
    "--eval-every",
    "5",
];

/// Where the length of sequences stands among them.
const LENGTH_AT: usize = 10;

pub struct Place {
    folder: tempfile::TempDir,
    pub cluster: Cluster,
}

impl Place {
    /// A broker with a documents topic and a scored topic of the same 80 documents, a tokenizer and held-out text.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Fingerprint::of_bytes(&std::fs::read(write_tokenizer(folder.path())).unwrap());
        std::fs::write(folder.path().join("held-out.jsonl"), "{\"text\": \"one and two\"}\n").unwrap();
        let cluster = cluster("scored", 2);
        cluster.create_topic("documents", 2, 1).unwrap();
        let documents = mixture(80, tokenizer, Fingerprint::of_bytes(b"model"));
        produce_scored(&cluster, "scored", 2, &documents);
        let plain = documents.iter().map(|scored| scored.document.encode().to_vec());
        produce(&cluster.bootstrap_servers(), "documents", (0..2).cycle().zip(plain));
        Self { folder, cluster }
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// A command on a topic of this place, writing to `out`.
    pub fn training(&self, command: &str, topic: &str, out: &str) -> Command {
        let mut training = self.training_of_any_length(command, topic, out);
        training.args(&SMALL[LENGTH_AT..LENGTH_AT + 2]);
        training
    }

    /// The same without a length of its sequences.
    pub fn training_of_any_length(&self, command: &str, topic: &str, out: &str) -> Command {
        let mut training = sluice_train();
        training.args([command, "--bootstrap-servers", &self.cluster.bootstrap_servers(), "--topic", topic]);
        training.args(["--tokenizer", &self.path("tokenizer.json"), "--out", &self.path(out)]);
        training.args(["--eval", &format!("words={}", self.path("held-out.jsonl"))]);
        training.args(&SMALL[..LENGTH_AT]).args(&SMALL[LENGTH_AT + 2..]);
        training
    }
}

pub fn fingerprint_of(place: &Place) -> Fingerprint {
    Fingerprint::of_bytes(&std::fs::read(place.path("tokenizer.json")).unwrap())
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?} failed: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

pub fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}
