//! What people on call see of a daemon on a real Kafka: its lag, its end, and its topics.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::{Command, Output};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{TokenIds, TokenizedDocument};
use sluice_tests::{Broker, Cluster, Daemon, TRAP, binary, golden, produce, write_hanging_model};

const CALL: Duration = Duration::from_secs(30);
const LAG: &str = "sluiced_consumer_lag_records";

#[test]
fn offsets_that_hold_no_record_are_no_lag() {
    let cluster = Cluster::with_topics(2);
    let daemon = cluster.daemon(&[]);
    cluster.send(0..20, 30);
    daemon.wait("the documents", |daemon| daemon.finished() >= 20);
    let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", cluster.servers())
        .set("transactional.id", "ingest")
        .create()
        .unwrap();
    producer.init_transactions(CALL).unwrap();
    let send = |records: usize, payload: &str| {
        producer.begin_transaction().unwrap();
        for _ in 0..records {
            let record = BaseRecord::<str, str>::to("sluice.documents").partition(0).payload(payload);
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
        producer.flush(CALL).unwrap();
    };
    // One that is dead-lettered, and the mark of its transaction behind it.
    send(1, "poison");
    producer.commit_transaction(CALL).unwrap();
    daemon.wait("the last record", |daemon| daemon.finished() >= 21);
    send(50, "never seen");
    producer.abort_transaction(CALL).unwrap();
    // Longer than the lag takes to be worked out anew.
    std::thread::sleep(Duration::from_secs(3));
    daemon.wait("a lag of 0", |daemon| daemon.metric(LAG) == 0);
    assert_eq!(daemon.finished(), 21);
    // It still counts what does wait.
    daemon.signal("STOP");
    cluster.send(20..40, 30);
    daemon.signal("CONT");
    daemon.wait("the rest", |daemon| daemon.finished() >= 41 && daemon.metric(LAG) == 0);
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.assert_each_once(40);
}

fn create(cluster: &Cluster, words: &[&str]) -> Output {
    Command::new(binary("sluiced"))
        .args(["topics", "create", "--bootstrap-servers", cluster.servers()])
        .args(words)
        .output()
        .unwrap()
}

/// Asserts how `sluiced topics create` ended, and what it said.
fn ends(output: &Output, code: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
}

#[test]
fn topics_that_are_not_as_asked_for_are_named() {
    let cluster = Cluster::start(1);
    let words = ["a:2", "b:3"];
    ends(&create(&cluster, &words), 0, &["created", "a", "b"]);
    ends(&create(&cluster, &words), 0, &["exists already"]);
    ends(
        &create(&cluster, &["a:4", "b:3", "c:1"]),
        64,
        &["the topic `a` exists and has 2 partitions, not 4", "created"],
    );
    ends(&create(&cluster, &["c:1"]), 0, &["exists already"]);
    ends(&create(&cluster, &["--replication", "3", "b:3"]), 64, &["has 1 copies of each, not 3"]);
    for wrong in ["nopart", "a:", "a:0", "a:many", ":3", "a b:3", "../a:3", ".:1"] {
        ends(&create(&cluster, &[wrong]), 64, &[]);
    }
    ends(&create(&cluster, &["nopart"]), 64, &["NAME:PARTITIONS"]);
    ends(&create(&cluster, &[&format!("{}:1", "x".repeat(250))]), 64, &["no name that Kafka takes"]);
}

#[test]
fn a_second_interrupt_ends_at_once_and_blames_nobody() {
    let broker = Broker::with_sluice_topics();
    let model = tempfile::tempdir().unwrap();
    write_hanging_model(model.path());
    let mut daemon = Daemon::start(&broker.bootstrap_servers, model.path(), &[]);
    let document = TokenizedDocument {
        id: "hangs".to_owned(),
        tokens: TokenIds::new(&[1, TRAP, 3]),
        tokenizer: Fingerprint::of_bytes(&std::fs::read(golden("tiny-llama/tokenizer.json")).unwrap()),
        source: String::new(),
        attributes: [].into(),
    };
    produce(&broker.bootstrap_servers, "sluice.documents", &[("hangs", Some(document.encode()))]);
    daemon.wait("the document", |daemon| daemon.metric("sluiced_documents_read_total") == 1);
    std::thread::sleep(Duration::from_millis(500));
    daemon.signal("INT");
    daemon.wait("the drain", |daemon| daemon.get("/ready").1.contains("stopping"));
    daemon.signal("INT");
    daemon.wait_for_end(130);
    std::thread::sleep(Duration::from_millis(200));
    let log = daemon.log();
    assert!(log.contains("stopping at once") && !log.contains("failed"), "{log}");
}
