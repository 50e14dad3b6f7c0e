//! A reference trained on the corpus itself scores it; a student that learnt from that becomes the next reference, while
//! documents keep coming; and a trainer reads what both have scored.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{ScoredDocument, TokenIds, TokenizedDocument};
use sluice_tests::{Daemon, Kafka, binary, golden, produce, read_all};

const APPLIED: &str = "sluiced_config_reloads_total{outcome=\"applied\"}";
const WRONG_DATA: i32 = 65;

fn tokenizer() -> PathBuf {
    golden("tiny-llama/tokenizer.json")
}

fn send(servers: &str, ids: std::ops::Range<usize>) {
    let tokenizer = Fingerprint::of_bytes(&std::fs::read(tokenizer()).unwrap());
    let records: Vec<_> = ids
        .map(|number| {
            // Some runs of tokens come again and again, and some never do.
            let tokens: Vec<u32> =
                (0..20 + number % 40).map(|at| ((at % 7) * (number % 3 + 1) + number % 11) as u32).collect();
            let document = TokenizedDocument {
                id: format!("document-{number}"),
                tokens: TokenIds::new(&tokens),
                tokenizer,
                source: String::new(),
                attributes: BTreeMap::new(),
            };
            (document.id.clone(), Some(document.encode()))
        })
        .collect();
    let borrowed: Vec<_> = records.iter().map(|(id, payload)| (id.as_str(), payload.clone())).collect();
    produce(servers, "sluice.documents", &borrowed);
}

struct Trainer {
    folder: tempfile::TempDir,
    servers: String,
}

impl Trainer {
    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn command(&self, command: &str, run: &str, flags: &[&str]) -> Output {
        let tokenizer = tokenizer();
        let shape = "--hidden-size 32 --layers 2 --heads 2 --sequence-length 64 --batch-size 8 --seed 3";
        Command::new(binary("sluice-train"))
            .args([command, "--bootstrap-servers", &self.servers, "--out", &self.path(run), "--tokenizer"])
            .arg(tokenizer)
            .args(shape.split(' '))
            .args(flags)
            .output()
            .unwrap()
    }

    /// A run that must succeed, and its last checkpoint as a folder that the daemon serves.
    fn model(&self, command: &str, run: &str, flags: &[&str]) -> PathBuf {
        let output = self.command(command, run, flags);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let model = self.path(&format!("{run}-model"));
        let exported = Command::new(binary("sluice-train"))
            .args(["export", "--run", &self.path(run), "--out", &model])
            .status();
        assert!(exported.unwrap().success());
        model.into()
    }

    /// Ids of the documents that a run learnt from, each as often as it did; pieces of one document count once.
    fn learnt(&self, run: &str) -> Vec<String> {
        let text = std::fs::read_to_string(Path::new(&self.path(run)).join("documents.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let pieces = lines.flat_map(|line| line["pieces"].as_array().unwrap().clone());
        let first_pieces = pieces.filter(|piece| piece["start"] == 0);
        let mut ids: Vec<_> =
            first_pieces.map(|piece| piece["document"].as_str().unwrap().to_owned()).collect();
        ids.sort_unstable();
        ids
    }
}

fn served(daemon: &Daemon) -> String {
    let (_, text) = daemon.get("/metrics");
    let line = text.lines().find(|line| line.starts_with("sluiced_model_info{")).unwrap();
    line.split("fingerprint=\"").nth(1).unwrap().split('"').next().unwrap().to_owned()
}

#[test]
fn a_student_becomes_the_next_reference_and_no_document_is_lost_or_doubled() {
    let data = tempfile::tempdir().unwrap();
    let kafka = Kafka::start(&data.path().join("kafka"));
    for topic in ["sluice.documents", "sluice.scored", "sluice.dead-letters"] {
        kafka.create_topic(topic, 2);
    }
    let servers = kafka.bootstrap_servers.clone();
    let trainer = Trainer { folder: tempfile::tempdir().unwrap(), servers: servers.clone() };
    send(&servers, 0..200);

    // The corpus teaches its own reference, which scores it.
    let first_model = trainer.model("reference", "reference", &["--epochs", "2"]);
    let config = data.path().join("sluiced.toml");
    let serve = |model: &Path| {
        let text = format!("[score]\nentropies = true\n[model]\npath = \"{}\"\n", model.display());
        std::fs::write(&config, text).unwrap();
    };
    serve(&first_model);
    let daemon = Daemon::start_configured(&servers, &["--config", config.to_str().unwrap()]);
    daemon.wait("the first documents", |daemon| daemon.finished() >= 200);
    let first = served(&daemon);

    // A student learns where the reference's loss and entropy are both low, as self-reference has it.
    let flags = ["--score", "intersection", "--keep", "0.7", "--until-end", "--steps", "1000"];
    let second_model = trainer.model("run", "student", &flags);
    serve(&second_model);
    daemon.signal("HUP");
    // Documents keep coming while the student takes over.
    let mut sent = 200;
    while sent < 600 || daemon.metric(APPLIED) == 0 || served(&daemon) == first {
        assert!(sent < 20_000, "the student never takes over");
        send(&servers, sent..sent + 20);
        sent += 20;
    }
    send(&servers, sent..sent + 20);
    sent += 20;
    daemon.wait("all documents", |daemon| daemon.finished() >= sent);
    let second = served(&daemon);
    assert_eq!(daemon.stop().code(), Some(0));

    let mut by_model: BTreeMap<String, usize> = BTreeMap::new();
    let mut ids = BTreeSet::new();
    for record in read_all(&servers, "sluice.scored") {
        let document = ScoredDocument::decode(record.payload.unwrap()).unwrap();
        *by_model.entry(document.reference_model.to_string()).or_default() += 1;
        assert!(ids.insert(document.document.id.clone()), "{} was scored twice", document.document.id);
    }
    assert_eq!(ids.len(), sent, "every document once");
    assert_eq!(by_model.keys().collect::<BTreeSet<_>>(), BTreeSet::from([&first, &second]));
    assert!(by_model[&first] >= 200 && by_model[&second] >= 20, "{by_model:?}");

    // A trainer that allows both learns from every document once.
    let whole = ["--until-end", "--steps", "100000", "--log-documents", "--keep", "0.5"];
    let both = ["--reference-model", &first, "--reference-model", &second];
    let output = trainer.command("run", "both", &[&whole[..], &both].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut expected: Vec<String> = ids.into_iter().collect();
    expected.sort_unstable();
    assert_eq!(trainer.learnt("both"), expected);

    // One that was promised a single model stops at the first record of the other, and names it.
    let one = ["--reference-model", &first];
    for (run, flags) in [("unasked", &[][..]), ("one", &one)] {
        let output = trainer.command("run", run, &[&whole[..], flags].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(WRONG_DATA), "{run}: {said}");
        assert!(said.contains(&second), "{run} does not name {second}: {said}");
    }
}
