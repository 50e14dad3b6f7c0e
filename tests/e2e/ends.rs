//! A daemon that is asked to end does, and one that cannot do its work says so and ends.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{TokenIds, TokenizedDocument};
use sluice_tests::{Broker, Cluster, Daemon, golden, produce, produce_keyless, read_all};

/// Longer than an end without anything to wait for takes, and far shorter than the drain deadline.
const PROMPT: Duration = Duration::from_secs(10);
/// The broker that alone has the transactions' own topic.
const COORDINATOR: usize = 3;

#[test]
fn a_coordinator_that_is_away_shows_and_holds_up_no_end() {
    const WHY: &str = "the transactions coordinator does not answer\n";
    let cluster = Cluster::start(3);
    let settings = [("cleanup.policy", "compact"), ("min.insync.replicas", "1")];
    cluster.kafka.create_topic_on(COORDINATOR as i32, "__transaction_state", 4, &settings);
    for topic in ["sluice.documents", "sluice.scored", "sluice.dead-letters"] {
        cluster.kafka.create_topic(topic, 2);
    }
    cluster.send(0..10, 20);
    let earlier = cluster.daemon(&[]);
    cluster.wait_scored(10);
    assert_eq!(earlier.stop().code(), Some(0));

    cluster.kafka.kill(COORDINATOR);
    let idle = cluster.daemon(&[]);
    idle.wait("a word on it", |daemon| daemon.get("/ready") == (503, WHY.to_owned()));
    idle.wait("a line of it", |daemon| daemon.log().contains("the transactions coordinator does not answer"));
    let begun = Instant::now();
    assert_eq!(idle.stop().code(), Some(0), "it had nothing to publish");
    assert!(begun.elapsed() < PROMPT, "it took {:?}", begun.elapsed());

    // What was scored cannot be published before the deadline, and is scored again by the next one.
    let deadline = ["--limits-drain-seconds", "3"];
    let busy = cluster.daemon(&deadline);
    busy.wait("a word on it", |daemon| daemon.get("/ready") == (503, WHY.to_owned()));
    cluster.send(10..20, 20);
    busy.wait("scores", |daemon| daemon.metric("sluiced_queued_tokens{queue=\"publish\"}") > 0);
    let begun = Instant::now();
    assert_eq!(busy.stop().code(), Some(1));
    assert!(begun.elapsed() < PROMPT, "it took {:?}", begun.elapsed());

    let patient = cluster.daemon(&[]);
    patient.wait("a word on it", |daemon| daemon.get("/ready") == (503, WHY.to_owned()));
    cluster.kafka.start_again();
    patient.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    cluster.wait_scored(20);
    // In the middle of its work it shows too, and passes.
    cluster.kafka.kill(COORDINATOR);
    cluster.send(20..30, 20);
    patient.wait("a word on it", |daemon| daemon.get("/ready") == (503, WHY.to_owned()));
    cluster.kafka.start_again();
    cluster.wait_scored(30);
    patient.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    assert_eq!(patient.stop().code(), Some(0));
    cluster.assert_each_once(30);
}

/// A window for each token of a document, and one thread.
const SLOW: [&str; 6] =
    ["--model-threads", "1", "--score-stride-tokens", "1", "--limits-drain-seconds", "25"];

/// Tokens of a document that takes minutes.
const LONG: usize = 200_000;

/// What the model has of a long document when the daemon is asked to stop is a batch or two of thousands.
#[test]
fn a_stop_waits_for_the_batch_that_runs_and_not_for_a_long_document() {
    let broker = Broker::with_sluice_topics();
    let tokenizer = Fingerprint::of_bytes(&std::fs::read(golden("tiny-llama/tokenizer.json")).unwrap());
    let document = TokenizedDocument {
        id: "long".to_owned(),
        tokens: TokenIds::new(&vec![7; LONG]),
        tokenizer,
        source: String::new(),
        attributes: BTreeMap::new(),
    };
    produce(&broker.bootstrap_servers, "sluice.documents", &[("long", Some(document.encode()))]);
    let daemon = Daemon::start(&broker.bootstrap_servers, &golden("tiny-llama"), &SLOW);
    daemon.wait("some of its windows", |daemon| daemon.metric("sluiced_batch_seconds_count") >= 3);
    let begun = Instant::now();
    assert_eq!(daemon.stop().code(), Some(0));
    assert!(begun.elapsed() < PROMPT, "it took {:?}", begun.elapsed());
}

#[test]
fn a_rebalance_does_not_wait_for_a_long_document() {
    // The mock cluster takes its time over a rebalance, whatever its members do.
    let cluster = Cluster::with_topics(4);
    for partition in 0..4_usize {
        cluster.send_to(Some(partition as i32), partition..partition + 1, LONG);
    }
    let first = cluster.daemon(&[&SLOW[..], &["--kafka-instance", "first"]].concat());
    first.wait("some of their windows", |daemon| daemon.metric("sluiced_batch_seconds_count") >= 3);
    let second = cluster.daemon(&[&SLOW[..], &["--kafka-instance", "second"]].concat());
    let begun = Instant::now();
    second.wait("its share", |daemon| daemon.metric("sluiced_assigned_partitions") == 2);
    assert!(begun.elapsed() < PROMPT, "it took {:?}", begun.elapsed());
    for daemon in [first, second] {
        assert_eq!(daemon.stop().code(), Some(0));
    }
}

#[test]
fn a_topic_that_is_missing_is_named_before_anything_is_read() {
    for missing in ["sluice.scored", "sluice.dead-letters"] {
        let topics = ["sluice.documents", "sluice.scored", "sluice.dead-letters"];
        let topics: Vec<String> =
            topics.iter().filter(|topic| **topic != missing).map(|topic| format!("{topic}:1")).collect();
        let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
        let broker = Broker::start(&topics);
        let mut daemon = Daemon::start(&broker.bootstrap_servers, &golden("tiny-llama"), &[]);
        daemon.wait_for_end(69);
        assert!(daemon.log().contains(&format!("the topic `{missing}` does not exist")), "{}", daemon.log());
    }
}

/// A topic that takes records with keys alone, and a dead letter without.
#[test]
fn publishing_that_is_refused_again_and_again_shows_and_goes_on_once_it_is_not() {
    const WHY: &str = "what is published is refused again and again: the log says why\n";
    let cluster = Cluster::with_topics(1);
    cluster.kafka.set_topic("sluice.dead-letters", &[("cleanup.policy", "compact")]);
    let daemon = cluster.daemon(&["--limits-drain-seconds", "3"]);
    daemon.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    produce_keyless(cluster.servers(), "sluice.documents", b"no document");
    cluster.send(0..10, 20);
    daemon.wait("a word on it", |daemon| daemon.get("/ready") == (503, WHY.to_owned()));
    let is_said = |line: &str| line.contains("\"level\":\"ERROR\"") && line.contains("for the same reason");
    daemon.wait("an error", |daemon| daemon.log().lines().any(is_said));
    assert!(daemon.metric("sluiced_aborts_total") >= 10);
    // It holds up no end either.
    let begun = Instant::now();
    assert_eq!(daemon.stop().code(), Some(1));
    assert!(begun.elapsed() < PROMPT, "it took {:?}", begun.elapsed());

    let next = cluster.daemon(&[]);
    next.wait("a word on it", |daemon| daemon.get("/ready") == (503, WHY.to_owned()));
    cluster.kafka.set_topic("sluice.dead-letters", &[]);
    cluster.wait_scored(10);
    next.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    assert_eq!(next.stop().code(), Some(0));
    cluster.assert_each_once(10);
    assert_eq!(read_all(cluster.servers(), "sluice.dead-letters").len(), 1);
}

/// Two pods with one copied setting: the brokers throw the first one's consumer out for good.
#[test]
fn a_consumer_that_has_failed_for_good_ends_its_daemon() {
    let cluster = Cluster::with_topics(1);
    let member = ["--kafka-properties", "group.instance.id=one", "--kafka-instance"];
    let mut first = cluster.daemon(&[&member[..], &["first"]].concat());
    first.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    let second = cluster.daemon(&[&member[..], &["second"]].concat());
    first.wait_for_end(78);
    assert!(first.log().contains("the same group.instance.id"), "{}", first.log());
    cluster.send(0..10, 20);
    cluster.wait_scored(10);
    assert_eq!(second.stop().code(), Some(0));
    cluster.assert_each_once(10);
}
