//! Neither secrets nor what documents hold is in any log line, at the most talkative level there is.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::process::{Command, Output};

use bytes::Bytes;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{TokenIds, TokenizedDocument};
use sluice_tests::{Daemon, Kafka, Shape, Trainer, binary, golden, produce};

/// In whatever a document holds beside its id: ids are fields of log lines.
const CONTENT: &str = "zebra-crossing";

/// Asserts that a log says much, and nothing that it must not.
fn is_discreet(log: &str, least: &str, secret: &str) {
    assert!(log.contains(least), "the log is not as talkative as it should be:\n{log}");
    for kept in [secret, CONTENT] {
        let line = log.lines().find(|line| line.contains(kept));
        assert_eq!(line, None, "what is to be kept is logged");
    }
}

/// Documents of which every part but the id holds [`CONTENT`], good ones and bad ones.
fn records() -> Vec<(&'static str, Option<Bytes>)> {
    let tokenizer = Fingerprint::of_bytes(&std::fs::read(golden("tiny-llama/tokenizer.json")).unwrap());
    let document = |tokens: &[u32], tokenizer| {
        TokenizedDocument {
            id: "one".to_owned(),
            tokens: TokenIds::new(tokens),
            tokenizer,
            source: CONTENT.to_owned(),
            attributes: BTreeMap::from([(CONTENT.to_owned(), CONTENT.to_owned())]),
        }
        .encode()
    };
    let good = document(&[1, 2, 3, 4, 5, 6, 7, 8], tokenizer);
    vec![
        ("good", Some(good.clone())),
        ("truncated", Some(good.slice(..good.len() - 3))),
        ("garbage", Some(Bytes::from(CONTENT.repeat(100)))),
        ("foreign", Some(document(&[1, 2], Fingerprint::of_bytes(b"other")))),
        ("beyond", Some(document(&[u32::MAX, 2], tokenizer))),
        ("empty", Some(document(&[], tokenizer))),
        // Taken as it is; with its losses it is more than the broker allows.
        ("large", Some(document(&vec![3; 400_000], tokenizer))),
    ]
}

fn ingest(servers: &str, properties: &str, file: &std::path::Path) -> Output {
    Command::new(binary("sluiced"))
        .args(["ingest", "--bootstrap-servers", servers, "--tokenizer"])
        .arg(golden("tiny-llama/tokenizer.json"))
        .arg(file)
        .env("SLUICED_KAFKA_PROPERTIES", properties)
        .env("RUST_LOG", "trace")
        .output()
        .unwrap()
}

#[test]
fn no_level_shows_a_secret_or_what_a_document_holds() {
    let folder = tempfile::tempdir().unwrap();
    let kafka = Kafka::start_with(&folder.path().join("kafka"), Shape { brokers: 1, tls_sasl: true });
    for (topic, partitions) in [("sluice.documents", 1), ("sluice.scored", 1), ("sluice.dead-letters", 1)] {
        kafka.create_topic(topic, partitions);
    }
    let variables = kafka.variables();
    let servers = variables["SLUICE_KAFKA_SASL_BOOTSTRAP"].as_str();
    let password = std::fs::read_to_string(&variables["SLUICE_KAFKA_PASSWORD_FILE"]).unwrap();
    let password = password.trim();
    assert!(password.len() >= 8, "too short to be looked for");
    // As it should not stand there, and with librdkafka saying all it can.
    let properties = [
        "security.protocol=SASL_SSL".to_owned(),
        format!("ssl.ca.location={}", variables["SLUICE_KAFKA_CA"]),
        "sasl.mechanism=PLAIN".to_owned(),
        format!("sasl.username={}", variables["SLUICE_KAFKA_USER"]),
        format!("sasl.password={password}"),
        "debug=all".to_owned(),
    ];

    let file = folder.path().join("lines.jsonl");
    let lines = format!(
        "{{\"text\":\"{CONTENT}\"}}\n{{\"text\":{CONTENT}}}\n{CONTENT}\n{{\"other\":\"{CONTENT}\"}}\n"
    );
    std::fs::write(&file, lines).unwrap();
    let ingested = ingest(servers, &properties.join(","), &file);
    assert_eq!(ingested.status.code(), Some(65), "lines that hold no document");
    is_discreet(&String::from_utf8_lossy(&ingested.stderr), "TRACE", password);

    let records = records();
    produce(&kafka.bootstrap_servers, "sluice.documents", &records);
    let model = golden("tiny-llama");
    let joined = properties.join(",");
    let flags = ["--model-path", model.to_str().unwrap(), "--kafka-properties", &joined];
    let daemon = Daemon::start_in(servers, &flags, &[("RUST_LOG", "trace")]);
    daemon.wait("every record", |daemon| daemon.finished() > records.len());
    assert_eq!(daemon.metric("sluiced_dead_letters_total{reason=\"malformed\"}"), 2);
    let log = daemon.log();
    assert_eq!(daemon.stop().code(), Some(0));
    is_discreet(&log, "\"level\":\"TRACE\"", password);
    assert!(log.contains("dead letter"), "{log}");

    let lines = properties.join("\n");
    let out = folder.path().join("run");
    let flags = ["--objective", "clm", "--steps", "2", "--until-end"];
    let variables = [("SLUICE_TRAIN_PROPERTY", lines.as_str()), ("SLUICE_TRAIN_LOG", "trace")];
    let trainer = Trainer::start(servers, &out, &flags, &variables);
    let deadline = std::time::Instant::now() + std::time::Duration::from_mins(1);
    while !trainer.log().contains("steps, ") {
        assert!(std::time::Instant::now() < deadline, "{}", trainer.log());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let log = trainer.log();
    assert_eq!(trainer.wait().code(), Some(0), "{log}");
    is_discreet(&log, "DEBUG", password);
}
