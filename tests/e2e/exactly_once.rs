//! Delivery on a real Apache Kafka.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;
use std::time::Duration;

use sluice_schemas::record::TokenizedDocument;
use sluice_tests::oracle::{Faults, Findings, Options, run};
use sluice_tests::{Cluster, golden, python, read_all, root};

/// Runs `faults` faults of `seed` on `brokers` brokers.
fn holds(brokers: usize, seed: u64, faults: usize) -> Findings {
    let cluster = Cluster::start(brokers);
    let findings = run(&cluster.kafka, &golden("tiny-llama"), &Options::of(seed, faults));
    eprintln!("{findings}");
    let again = format!("tests/soak --seed {seed} --faults {faults} --daemons 2 --brokers {brokers}");
    assert!(findings.is_clean(), "run it again: {again}\n{findings:#?}");
    assert!(findings.obligations > 100 && findings.counters.commits > 0);
    findings
}

#[test]
fn every_document_comes_out_once_whatever_is_killed() {
    holds(1, 11, 8);
}

/// Each of them once, in an order of its own.
#[test]
fn every_document_comes_out_once_whatever_of_all_kinds_goes_wrong() {
    const BROKERS: usize = 3;
    let kinds = Faults::kinds(BROKERS);
    let findings = holds(BROKERS, 13, kinds);
    assert_eq!(findings.kinds.len(), kinds, "{:?}", findings.kinds);
    assert_eq!((findings.gaps, findings.unsaid.len()), (1, 0));
    assert!(findings.trimmed > 0, "{findings}");
}

#[test]
fn a_python_client_that_reads_committed_records_finds_each_once() {
    let cluster = Cluster::with_topics(2);
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
    let cluster = Cluster::start(1);
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
    let cluster = Cluster::with_topics(2);
    let mut first = cluster.daemon(&[]);
    first.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    let second = cluster.daemon(&[]);
    second.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    cluster.send(0..200, 20);
    second.wait("all documents", |daemon| daemon.finished() >= 200);
    first.wait_for_end(78);
    assert_eq!(second.stop().code(), Some(0));
    cluster.assert_each_once(200);
}

#[test]
fn an_outage_of_a_minute_is_ridden_out() {
    /// After what cannot be committed is ten seconds old, to a minute.
    const OUTAGE_LEFT: Duration = Duration::from_secs(50);
    const DOCUMENTS: usize = 15_000;
    let cluster = Cluster::with_topics(2);
    cluster.send(0..50, 20);
    // Slow enough to be in the middle of its work when the broker goes.
    let mut daemon = cluster.daemon(&["--model-threads", "1", "--batch-tokens-max", "256"]);
    daemon.wait("the first documents", |daemon| daemon.finished() >= 50);
    assert!(daemon.metric("sluiced_commits_total") > 0 && daemon.metric("sluiced_rebalances_total") > 0);
    daemon.wait("nothing to age", |daemon| daemon.metric("sluiced_oldest_in_flight_seconds") == 0);
    cluster.send(50..DOCUMENTS, 40);
    daemon.wait("some of the rest", |daemon| daemon.finished() > 50);
    cluster.kafka.kill(1);
    daemon.wait("/ready to fail", |daemon| daemon.get("/ready") == (503, "no broker answers\n".to_owned()));
    daemon.wait("what cannot be committed to age", |daemon| {
        daemon.metric("sluiced_oldest_in_flight_seconds") >= 10
    });
    std::thread::sleep(OUTAGE_LEFT);
    assert_eq!(daemon.get("/live").0, 200);
    assert!(daemon.ended().is_none());
    cluster.kafka.start_again();
    daemon.wait("/ready to hold", |daemon| daemon.get("/ready").0 == 200);
    daemon.wait("the rest", |daemon| daemon.finished() >= DOCUMENTS);
    daemon.wait("no lag", |daemon| daemon.metric("sluiced_consumer_lag_records") == 0);
    daemon.wait("nothing to age", |daemon| daemon.metric("sluiced_oldest_in_flight_seconds") == 0);
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.assert_each_once(DOCUMENTS);
}

#[test]
fn lag_rises_with_the_queue_and_falls_to_nothing() {
    let cluster = Cluster::with_topics(2);
    let daemon = cluster.daemon(&["--limits-in-flight-tokens", "1000"]);
    daemon.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    cluster.send(0..5000, 60);
    daemon.wait("lag", |daemon| daemon.metric("sluiced_consumer_lag_records") > 100);
    daemon.wait("the end", |daemon| daemon.finished() >= 5000);
    daemon.wait("no lag", |daemon| daemon.metric("sluiced_consumer_lag_records") == 0);
    assert_eq!(daemon.stop().code(), Some(0));
}
