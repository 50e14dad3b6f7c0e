//! Delivery on a real Apache Kafka.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{ScoredDocument, TokenIds, TokenizedDocument};
use sluice_tests::oracle::{Options, run};
use sluice_tests::{Daemon, Kafka, golden, produce, python, read_all, root};
use tempfile::TempDir;

/// Each test has a broker to itself, and two cores have room for one at a time.
static ALONE: Mutex<()> = Mutex::new(());

struct Cluster {
    kafka: Kafka,
    _data: TempDir,
    _alone: MutexGuard<'static, ()>,
}

fn cluster() -> Cluster {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let data = tempfile::tempdir().unwrap();
    Cluster { kafka: Kafka::start(&data.path().join("kafka")), _data: data, _alone: alone }
}

impl Cluster {
    fn with_topics() -> Self {
        let cluster = cluster();
        for (topic, partitions) in [("sluice.documents", 2), ("sluice.scored", 2), ("sluice.dead-letters", 1)]
        {
            cluster.kafka.create_topic(topic, partitions);
        }
        cluster
    }

    fn servers(&self) -> &str {
        &self.kafka.bootstrap_servers
    }

    fn daemon(&self, flags: &[&str]) -> Daemon {
        Daemon::start_with(self.servers(), &golden("tiny-llama"), flags)
    }

    fn send(&self, ids: std::ops::Range<usize>, tokens: usize) {
        let tokenizer = std::fs::read(golden("tiny-llama/tokenizer.json")).unwrap();
        let records: Vec<(String, Bytes)> = ids
            .map(|number| {
                let document = TokenizedDocument {
                    id: format!("document-{number}"),
                    tokens: TokenIds::new(&vec![7; tokens]),
                    tokenizer: Fingerprint::of_bytes(&tokenizer),
                    source: String::new(),
                    attributes: BTreeMap::new(),
                };
                (document.id.clone(), document.encode())
            })
            .collect();
        let borrowed: Vec<_> =
            records.iter().map(|(id, payload)| (id.as_str(), Some(payload.clone()))).collect();
        produce(self.servers(), "sluice.documents", &borrowed);
    }

    fn scored_ids(&self) -> Vec<String> {
        let records = read_all(self.servers(), "sluice.scored");
        let ids =
            records.iter().map(|record| ScoredDocument::decode(record.payload.clone().unwrap()).unwrap());
        let mut ids: Vec<_> = ids.map(|document| document.document.id).collect();
        ids.sort();
        ids
    }
}

fn options(seed: u64, exactly_once: bool) -> Options {
    Options { seed, faults: 8, daemons: 2, exactly_once, documents_per_second: 40 }
}

#[test]
fn every_document_comes_out_once_whatever_is_killed() {
    let cluster = cluster();
    for seed in [11, 12] {
        let findings = run(&cluster.kafka, &golden("tiny-llama"), &options(seed, true));
        eprintln!("{findings}");
        assert!(
            findings.is_clean(),
            "run it again: tests/soak --seed {seed} --faults 8 --daemons 2\n{findings:#?}"
        );
        assert!(findings.obligations > 100 && findings.counters.commits > 0);
    }
}

#[test]
fn a_python_client_that_reads_committed_records_finds_each_once() {
    let cluster = Cluster::with_topics();
    cluster.send(0..20, 30);
    let daemon = cluster.daemon(&[]);
    daemon.wait("all documents", |daemon| daemon.finished() >= 20);
    assert_eq!(daemon.stop().code(), Some(0));
    let output = Command::new(python())
        .arg(root().join("tests/python/read_scored.py"))
        .args(["--bootstrap-servers", cluster.servers(), "--topic", "sluice.scored", "--count", "20"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut ids: Vec<String> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["id"].as_str().unwrap().to_owned()
        })
        .collect();
    ids.sort();
    assert_eq!(ids, cluster.scored_ids());
    ids.dedup();
    assert_eq!(ids.len(), 20);
}

#[test]
fn a_record_that_the_broker_refuses_is_dead_lettered_and_the_partition_goes_on() {
    let cluster = cluster();
    for (topic, partitions) in [("sluice.documents", 1), ("sluice.dead-letters", 1)] {
        cluster.kafka.create_topic(topic, partitions);
    }
    // The client knows nothing of this limit: the broker's refusal aborts the transaction that the record is in.
    cluster.kafka.create_topic_with("sluice.scored", 1, &[("max.message.bytes", "10000")]);
    cluster.send(0..5, 30);
    cluster.send(5..6, 4000);
    cluster.send(6..10, 30);
    let daemon = cluster.daemon(&["--kafka-properties", "compression.type=none"]);
    daemon.wait("all documents", |daemon| daemon.finished() >= 10);
    assert_eq!(daemon.metric("sluiced_dead_letters_total{reason=\"record_too_large\"}"), 1);
    assert!(daemon.metric("sluiced_aborts_total") >= 1);
    assert_eq!(daemon.stop().code(), Some(0));
    assert_eq!(cluster.scored_ids().len(), 9);
    let letters = read_all(cluster.servers(), "sluice.dead-letters");
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].key.as_deref(), Some(&b"document-5"[..]));
    assert_eq!(letters[0].headers["sluice-origin-offset"], "5");
    assert!(
        TokenizedDocument::decode(letters[0].payload.clone().unwrap()).is_ok(),
        "its payload fits and is there"
    );
}

#[test]
fn two_daemons_under_one_name_fence_each_other_and_say_so() {
    let cluster = Cluster::with_topics();
    let mut first = cluster.daemon(&[]);
    first.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    let second = cluster.daemon(&[]);
    second.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    cluster.send(0..200, 20);
    second.wait("all documents", |daemon| daemon.finished() >= 200);
    first.wait_for_end(1);
    assert_eq!(second.stop().code(), Some(0));
    assert_eq!(cluster.scored_ids().len(), 200);
}

#[test]
fn an_outage_of_the_broker_is_ridden_out() {
    let cluster = Cluster::with_topics();
    cluster.send(0..50, 20);
    let mut daemon = cluster.daemon(&[]);
    daemon.wait("the first documents", |daemon| daemon.finished() >= 50);
    let commits = daemon.metric("sluiced_commits_total");
    assert!(commits > 0 && daemon.metric("sluiced_rebalances_total") > 0);
    cluster.kafka.kill(1);
    daemon.wait("/ready to fail", |daemon| daemon.get("/ready") == (503, "no broker answers\n".to_owned()));
    std::thread::sleep(Duration::from_secs(15));
    assert_eq!(daemon.get("/live").0, 200);
    assert!(daemon.ended().is_none());
    cluster.kafka.start_again();
    daemon.wait("/ready to hold", |daemon| daemon.get("/ready").0 == 200);
    cluster.send(50..100, 20);
    daemon.wait("the rest", |daemon| daemon.finished() >= 100);
    daemon.wait("no lag", |daemon| daemon.metric("sluiced_consumer_lag_records") == 0);
    assert_eq!(daemon.stop().code(), Some(0));
    assert_eq!(cluster.scored_ids().len(), 100);
}

#[test]
fn lag_rises_with_the_queue_and_falls_to_nothing() {
    let cluster = Cluster::with_topics();
    let daemon = cluster.daemon(&["--limits-in-flight-tokens", "1000"]);
    daemon.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    cluster.send(0..500, 60);
    daemon.wait("lag", |daemon| daemon.metric("sluiced_consumer_lag_records") > 100);
    daemon.wait("the end", |daemon| daemon.finished() >= 500);
    daemon.wait("no lag", |daemon| daemon.metric("sluiced_consumer_lag_records") == 0);
    assert_eq!(daemon.stop().code(), Some(0));
}
