//! What brokers allow; and of three of them, leaders that move while all are well, and one that leaves for good.
#![allow(clippy::unwrap_used, missing_docs)]

use std::process::Command;
use std::time::{Duration, Instant};

use sluice_tests::oracle::{Options, Traffic};
use sluice_tests::{Cluster, Daemon, binary, golden, onnxruntime};

const BROKERS: usize = 3;
const MODEL: &str = "tiny-llama";

/// Documents on their way, and the daemon that scores them, once the first have come out.
fn begin(cluster: &Cluster, seed: u64) -> (Traffic, Daemon) {
    let traffic = Traffic::start(&cluster.kafka, &golden(MODEL), &Options::of(seed, 0));
    let flags = traffic.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let daemon = Daemon::start_with(cluster.servers(), &golden(MODEL), &flags);
    daemon.wait("the first documents", |daemon| daemon.finished() > 0);
    traffic.watch.set_well(true);
    (traffic, daemon)
}

fn end(cluster: &Cluster, traffic: Traffic, daemon: Daemon) {
    let findings = traffic.finish(&cluster.kafka, &golden(MODEL));
    eprintln!("{findings}");
    assert!(findings.is_clean() && findings.obligations > 100, "{findings:#?}");
    assert_eq!(daemon.stop().code(), Some(0), "it has not ended meanwhile");
}

/// An idempotent producer numbers its records by partition, and leaders that change faster than it hears of them have been
/// taken for records out of their order (confluentinc/librdkafka issue 3575). The coordinators move as well.
#[test]
fn leaders_that_move_again_and_again_lose_double_and_reorder_nothing() {
    const ELECTIONS: usize = 15;
    const BETWEEN: Duration = Duration::from_millis(300);
    let cluster = Cluster::start(BROKERS);
    let (traffic, daemon) = begin(&cluster, 41);
    let mut moved = 0;
    for election in 0..ELECTIONS {
        moved += cluster
            .kafka
            .elect(|topic, partition| ((topic.len() + partition as usize + election) % BROKERS) as i32 + 1);
        std::thread::sleep(BETWEEN);
    }
    assert!(moved > ELECTIONS, "{moved} leaders moved");
    end(&cluster, traffic, daemon);
}

/// A client that waits for the answer of a coordinator which is no member of the cluster any more waits for ever
/// (confluentinc/librdkafka issue 5511).
#[test]
fn a_coordinator_that_leaves_the_cluster_for_good_holds_nothing_up() {
    const COORDINATOR: usize = 3;
    const AFTERWARDS: usize = 300;
    let cluster = Cluster::start(BROKERS);
    let (traffic, mut daemon) = begin(&cluster, 42);
    cluster.kafka.elect(|topic, _| match topic {
        "__transaction_state" | "__consumer_offsets" => COORDINATOR as i32,
        _ => 1,
    });
    let commits = || daemon.metric("sluiced_commits_total");
    let before = commits();
    daemon.wait("commits by the new coordinator", |_| commits() > before + 2);
    cluster.kafka.kill(COORDINATOR);
    cluster.kafka.unregister(COORDINATOR);
    let (sent, begun) = (traffic.acknowledged(), Instant::now());
    while traffic.acknowledged() < sent + AFTERWARDS {
        assert!(begun.elapsed() < Duration::from_mins(1), "nothing is acknowledged any more");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(daemon.ended().is_none());
    end(&cluster, traffic, daemon);
}

#[test]
fn times_that_the_brokers_do_not_allow_are_refused_in_words() {
    let cluster = Cluster::with_topics(1);
    for (properties, code, words) in [
        (
            "session.timeout.ms=5999",
            64,
            "session.timeout.ms = 5999 is less than the brokers' group.min.session.timeout.ms = 6000",
        ),
        (
            "session.timeout.ms=1800001,max.poll.interval.ms=1800001",
            64,
            "is more than the brokers' group.max.session.timeout.ms = 1800000",
        ),
        (
            "transaction.timeout.ms=900001",
            64,
            "is more than the brokers' transaction.max.timeout.ms = 900000",
        ),
        ("transaction.timeout.ms=900000", 0, "transaction.timeout.ms = 900000 is within"),
    ] {
        // A daemon ends with the same words; one that starts would go on.
        for command in ["validate", "serve"].into_iter().take(if code == 0 { 1 } else { 2 }) {
            let output = Command::new(binary("sluiced"))
                .args([command, "--kafka-bootstrap-servers", cluster.servers()])
                .args(["--kafka-properties", properties, "--http-listen", "127.0.0.1:0"])
                .arg("--model-path")
                .arg(golden(MODEL))
                .env("ORT_DYLIB_PATH", onnxruntime())
                .output()
                .unwrap();
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert_eq!(output.status.code(), Some(code), "{command}, {properties}: {said}");
            assert!(said.contains(words), "`{words}` is not in: {said}");
        }
    }
}
