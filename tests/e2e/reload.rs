//! SIGHUP: new settings and another model while documents keep coming.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{ScoredDocument, TokenIds, TokenizedDocument};
use sluice_tests::{Broker, Cluster, Daemon, Kafka, TRAP, golden, produce, read_all, write_hanging_model};

const APPLIED: &str = "sluiced_config_reloads_total{outcome=\"applied\"}";
const REFUSED: &str = "sluiced_config_reloads_total{outcome=\"refused\"}";

/// A configuration file that names a folder of its own for the model.
struct Settings {
    folder: tempfile::TempDir,
}

impl Settings {
    fn new(model: &Path, further: &str) -> Self {
        let settings = Self { folder: tempfile::tempdir().unwrap() };
        settings.write("model", model, further);
        settings
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("sluiced.toml")
    }

    /// Points the configuration at a copy of `model` in the folder `name`.
    fn write(&self, name: &str, model: &Path, further: &str) {
        let copy = self.folder.path().join(name);
        std::fs::create_dir_all(&copy).unwrap();
        for file in ["model.onnx", "tokenizer.json", "config.json"] {
            std::fs::copy(model.join(file), copy.join(file)).unwrap();
        }
        let text = format!("{further}\n[model]\npath = \"{}\"\n", copy.display());
        std::fs::write(self.file(), text).unwrap();
    }

    fn daemon(&self, servers: &str, flags: &[&str]) -> Daemon {
        let file = self.file();
        Daemon::start_configured(servers, &[&["--config", file.to_str().unwrap()], flags].concat())
    }
}

fn send(servers: &str, ids: std::ops::Range<usize>) {
    send_tokens(servers, ids.map(|number| (number, vec![number as u32 % 500; 20 + number % 50])));
}

fn send_tokens(servers: &str, documents: impl Iterator<Item = (usize, Vec<u32>)>) {
    let tokenizer = std::fs::read(golden("tiny-llama/tokenizer.json")).unwrap();
    let records: Vec<_> = documents
        .map(|(number, tokens)| {
            let document = TokenizedDocument {
                id: format!("document-{number}"),
                tokens: TokenIds::new(&tokens),
                tokenizer: Fingerprint::of_bytes(&tokenizer),
                source: String::new(),
                attributes: BTreeMap::new(),
            };
            (document.id.clone(), Some(document.encode()))
        })
        .collect();
    let borrowed: Vec<_> = records.iter().map(|(id, payload)| (id.as_str(), payload.clone())).collect();
    produce(servers, "sluice.documents", &borrowed);
}

fn model_info(daemon: &Daemon) -> String {
    let (_, text) = daemon.get("/metrics");
    let line = text.lines().find(|line| line.starts_with("sluiced_model_info{")).unwrap();
    line.split("fingerprint=\"").nth(1).unwrap().split('"').next().unwrap().to_owned()
}

#[test]
fn another_model_takes_over_and_every_document_is_scored_once() {
    let data = tempfile::tempdir().unwrap();
    let kafka = Kafka::start(&data.path().join("kafka"));
    for topic in ["sluice.documents", "sluice.scored", "sluice.dead-letters"] {
        kafka.create_topic(topic, 2);
    }
    let servers = &kafka.bootstrap_servers;
    let settings = Settings::new(&golden("tiny-llama"), "");
    let daemon = settings.daemon(servers, &[]);
    daemon.wait("the start", |daemon| daemon.get("/ready").0 == 200);
    let first = model_info(&daemon);
    send(servers, 0..200);
    daemon.wait("the first documents", |daemon| daemon.finished() >= 200);

    settings.write("other", &golden("tiny-llama-mask"), "");
    daemon.signal("HUP");
    // Documents keep coming while one model makes way for the other.
    let mut sent = 200;
    while sent < 1000 || daemon.metric(APPLIED) == 0 || model_info(&daemon) == first {
        assert!(sent < 20_000, "the model is never switched");
        send(servers, sent..sent + 40);
        sent += 40;
    }
    daemon.wait("all documents", |daemon| daemon.finished() >= sent);
    let second = model_info(&daemon);
    assert_eq!(daemon.stop().code(), Some(0));

    let documents: Vec<_> = read_all(servers, "sluice.scored")
        .into_iter()
        .map(|record| ScoredDocument::decode(record.payload.unwrap()).unwrap())
        .collect();
    let ids: BTreeSet<_> = documents.iter().map(|document| document.document.id.clone()).collect();
    assert_eq!((documents.len(), ids.len()), (sent, sent), "every document once");
    let count = |model: &str| {
        documents.iter().filter(|document| document.reference_model.to_string() == model).count()
    };
    assert_eq!(count(&first) + count(&second), sent);
    assert!(count(&first) >= 200 && count(&second) > 0, "{} and {}", count(&first), count(&second));
}

/// It would count as scored what was published to the old one.
#[test]
fn a_daemon_that_is_reloaded_onto_a_scored_topic_made_anew_says_so_and_commits_nothing() {
    let broker = Cluster::with_topics(1);
    let (kafka, servers) = (&broker.kafka, broker.servers());
    let settings = Settings::new(&golden("tiny-llama"), "");
    let mut daemon = settings.daemon(servers, &[]);
    send(servers, 0..20);
    daemon.wait("the first documents", |daemon| daemon.finished() >= 20);
    kafka.delete_topic("sluice.scored");
    kafka.create_topic("sluice.scored", 1);
    settings.write("other", &golden("tiny-llama-mask"), "");
    daemon.signal("HUP");
    // What comes before that is published by the loops that go, which may not have noticed yet.
    daemon.wait("the new model", |daemon| daemon.log().contains("configuration reloaded"));
    send(servers, 20..40);
    daemon.wait_for_end(65);
    assert!(daemon.log().contains("the topic `sluice.scored` was deleted and made anew"), "{}", daemon.log());
    assert!(read_all(servers, "sluice.scored").is_empty());
}

#[test]
fn a_level_that_changes_has_its_effect_at_once_and_no_loop_begins_again() {
    const DEBUG: &str = "\"level\":\"DEBUG\"";
    let broker = Broker::with_sluice_topics();
    let servers = &broker.bootstrap_servers;
    let settings = Settings::new(&golden("tiny-llama"), "");
    let daemon = settings.daemon(servers, &["--kafka-delivery", "at-least-once"]);
    daemon.wait("the start", |daemon| daemon.get("/ready").0 == 200);
    send(servers, 0..20);
    daemon.wait("the first documents", |daemon| daemon.finished() >= 20);
    assert!(!daemon.log().contains(DEBUG), "{}", daemon.log());

    settings.write("model", &golden("tiny-llama"), "[log]\nlevel = \"debug\"");
    daemon.signal("HUP");
    daemon.wait("the level", |daemon| daemon.metric(APPLIED) == 1);
    send(servers, 20..40);
    daemon.wait("a line of the new level", |daemon| {
        daemon.log().lines().any(|line| line.contains(DEBUG) && line.contains("published and committed"))
    });
    daemon.wait("the next documents", |daemon| daemon.finished() >= 40);

    settings.write("model", &golden("tiny-llama"), "[log]\nlevel = \"error\"");
    daemon.signal("HUP");
    daemon.wait("the level before", |daemon| daemon.metric(APPLIED) == 2);
    // What was logged on the way is written by now.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let before = daemon.log().len();
    send(servers, 40..60);
    daemon.wait("the last documents", |daemon| daemon.finished() >= 60);
    assert_eq!(&daemon.log()[before..], "", "nothing is an error");
    assert_eq!(daemon.metric("sluiced_rebalances_total"), 1, "the group saw nothing of it");
    assert_eq!(daemon.stop().code(), Some(0));
}

#[test]
fn the_age_at_which_a_loop_counts_as_stalled_changes_too() {
    let broker = Broker::with_sluice_topics();
    let model = tempfile::tempdir().unwrap();
    write_hanging_model(model.path());
    let settings = Settings::new(model.path(), "");
    let flags = ["--kafka-delivery", "at-least-once", "--kafka-properties", "session.timeout.ms=6000"];
    let daemon = settings.daemon(&broker.bootstrap_servers, &flags);
    daemon.wait("the start", |daemon| daemon.get("/ready").0 == 200);
    settings.write("model", model.path(), "[limits]\nstalled_seconds = 2");
    daemon.signal("HUP");
    daemon.wait("the new age", |daemon| daemon.metric(APPLIED) == 1);
    daemon.wait("work", |daemon| daemon.get("/ready").0 == 200);
    assert_eq!(daemon.get("/live").0, 200);
    send_tokens(&broker.bootstrap_servers, [(0, vec![1, TRAP, 3])].into_iter());
    // Half the patience of the default.
    daemon.wait("a stalled loop", |daemon| daemon.get("/live") == (503, "stalled: score\n".to_owned()));
}

#[test]
fn what_cannot_be_used_leaves_the_old_settings_in_force() {
    let broker = Broker::with_sluice_topics();
    let servers = &broker.bootstrap_servers;
    let settings = Settings::new(&golden("tiny-llama"), "");
    // The broker in memory forgets members of a group only after their time.
    let flags = ["--kafka-delivery", "at-least-once", "--kafka-properties", "session.timeout.ms=6000"];
    let daemon = settings.daemon(servers, &flags);
    daemon.wait("the start", |daemon| daemon.get("/ready").0 == 200);
    let model = model_info(&daemon);
    let other_tokenizer = tempfile::tempdir().unwrap();
    for file in ["model.onnx", "config.json"] {
        std::fs::copy(golden("tiny-llama").join(file), other_tokenizer.path().join(file)).unwrap();
    }
    let mut tokenizer = std::fs::read(golden("tiny-llama/tokenizer.json")).unwrap();
    tokenizer.push(b'\n');
    std::fs::write(other_tokenizer.path().join("tokenizer.json"), tokenizer).unwrap();
    let no_model = tempfile::tempdir().unwrap();
    for (name, bytes) in [("model.onnx", &b"no model"[..]), ("config.json", b"{}"), ("tokenizer.json", b"{}")]
    {
        std::fs::write(no_model.path().join(name), bytes).unwrap();
    }
    let bad: [(&str, &Path, &str); 4] = [
        ("a value", &golden("tiny-llama"), "[limits]\npublish_tokens = 0"),
        ("a key that takes a restart", &golden("tiny-llama"), "[kafka]\ngroup_id = \"other\""),
        ("a foreign tokenizer", other_tokenizer.path(), ""),
        ("a broken model", no_model.path(), ""),
    ];
    for (index, (what, model, further)) in bad.into_iter().enumerate() {
        settings.write(&format!("bad-{index}"), model, further);
        daemon.signal("HUP");
        daemon.wait(what, |daemon| daemon.metric(REFUSED) == index + 1);
    }
    assert_eq!(daemon.metric(APPLIED), 0);
    assert_eq!(model_info(&daemon), model);
    send(servers, 0..20);
    daemon.wait("documents after the refusals", |daemon| daemon.finished() >= 20);

    settings.write("good", &golden("tiny-llama"), "[batch]\ntokens_max = 256\n[log]\nlevel = \"debug\"");
    daemon.signal("HUP");
    daemon.wait("a good one", |daemon| daemon.metric(APPLIED) == 1);
    send(servers, 20..40);
    daemon.wait("documents after it", |daemon| daemon.finished() >= 40);
    assert_eq!(model_info(&daemon), model, "a copy is the same model");
    assert_eq!(daemon.stop().code(), Some(0));
    let scored = read_all(servers, "sluice.scored");
    assert_eq!(scored.len(), 40);
}

/// Loading takes as long as somebody keeps the pipe closed that stands for a file of the model.
#[test]
fn one_reload_is_under_way_at_a_time() {
    let broker = Broker::with_sluice_topics();
    let settings = Settings::new(&golden("tiny-llama"), "");
    let daemon = settings.daemon(&broker.bootstrap_servers, &["--kafka-delivery", "at-least-once"]);
    daemon.wait("the start", |daemon| daemon.get("/ready").0 == 200);
    settings.write("other", &golden("tiny-llama-mask"), "");
    let pipe = settings.folder.path().join("other/config.json");
    let config = std::fs::read(&pipe).unwrap();
    std::fs::remove_file(&pipe).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    daemon.signal("HUP");
    std::thread::sleep(std::time::Duration::from_secs(1));
    daemon.signal("HUP");
    daemon.wait("a word on the second", |daemon| daemon.log().contains("a reload is under way"));
    std::fs::write(&pipe, config).unwrap();
    daemon.wait("the first", |daemon| daemon.metric(APPLIED) == 1);
    assert_eq!(daemon.metric(REFUSED), 0);
    assert_eq!(daemon.stop().code(), Some(0));
}

#[test]
fn a_reload_does_not_wait_for_a_long_document_nor_end_the_daemon() {
    let broker = Broker::with_sluice_topics();
    let servers = &broker.bootstrap_servers;
    let slow = "[score]\nstride_tokens = 1\n[limits]\ndrain_seconds = 5";
    let settings = Settings::new(&golden("tiny-llama"), slow);
    let flags = ["--kafka-delivery", "at-least-once", "--model-threads", "1"];
    let daemon = settings.daemon(servers, &flags);
    daemon.wait("the start", |daemon| daemon.get("/ready").0 == 200);
    send_tokens(servers, [(0, vec![7; 100_000])].into_iter());
    daemon.wait("some of its windows", |daemon| daemon.metric("sluiced_batch_seconds_count") >= 3);
    let quick = "[score]\nstride_tokens = 32";
    settings.write("model", &golden("tiny-llama"), quick);
    daemon.signal("HUP");
    daemon.wait("the document, by the new settings", |daemon| daemon.finished() == 1);
    assert_eq!(daemon.metric(APPLIED), 1);
    assert_eq!(daemon.stop().code(), Some(0));
    assert_eq!(read_all(servers, "sluice.scored").len(), 1);
}
