//! Records that are gone before they were read: what a daemon says, what it has published by then, and who may go on.
#![allow(clippy::unwrap_used, missing_docs)]

use sluice_tests::Cluster;

#[test]
fn records_that_are_gone_before_they_were_read_are_named_and_the_way_on_with_them() {
    let cluster = Cluster::with_topics(2);
    cluster.send_to(Some(1), 0..10, 20);
    let earlier = cluster.daemon(&[]);
    cluster.wait_scored(10);
    assert_eq!(earlier.stop().code(), Some(0));
    cluster.send_to(Some(1), 10..30, 20);
    cluster.kafka.remove_records("sluice.documents", 1, 25);
    let mut daemon = cluster.daemon(&[]);
    daemon.wait_for_end(65);
    let log = daemon.log();
    for words in [
        "partition 1 of the topic `sluice.documents`",
        "at offset 10, where it would be read on (committed: 10)",
        "its log begins at 25 and ends at 30; 15 records were removed before they were read",
        "--topic sluice.documents:1 --to-offset 25",
    ] {
        assert!(log.contains(words), "`{words}` is not in: {log}");
    }
}

/// Retention overtakes a daemon that is paused: what it has read is gone from the topic too, and nowhere else.
#[test]
fn what_was_read_before_a_gap_is_published_before_the_daemon_ends() {
    const READ: usize = 4;
    const GONE: usize = 3;
    let cluster = Cluster::with_topics(1);
    // A document takes a second or more, and four of them are the budget, of which one is left when reading goes on.
    let slow = ["--model-threads", "1", "--score-stride-tokens", "1", "--batch-lookahead-tokens", "1000"];
    let mut daemon = cluster.daemon(&[&slow[..], &["--limits-in-flight-tokens", "40000"]].concat());
    cluster.send(0..READ + GONE + 1, 12_000);
    daemon.wait("a pause", |daemon| daemon.metric("sluiced_paused") == 1);
    assert_eq!(daemon.metric("sluiced_documents_read_total"), READ);
    cluster.kafka.remove_records("sluice.documents", 0, (READ + GONE) as i64);
    daemon.wait_for_end(65);
    let words = format!("; {GONE} records were removed before they were read");
    assert!(daemon.log().contains(&words), "{}", daemon.log());
    cluster.assert_each_once(READ);
}

/// One comes back late to a place that another has long passed, and whose records retention has removed since.
#[test]
fn a_place_that_another_daemon_has_passed_is_no_gap() {
    const EACH: usize = 100;
    let cluster = Cluster::with_topics(2);
    let session = ["--kafka-properties", "session.timeout.ms=6000,heartbeat.interval.ms=1000"];
    let daemon = |instance| cluster.daemon(&[&session[..], &["--kafka-instance", instance]].concat());
    let (late, other) = (daemon("late"), daemon("other"));
    for daemon in [&late, &other] {
        daemon.wait("half of the partitions", |daemon| daemon.metric("sluiced_assigned_partitions") == 1);
    }
    let mut sent = 0;
    let mut send = || {
        for partition in 0..2 {
            cluster.send_to(Some(partition), sent..sent + EACH, 20);
            sent += EACH;
        }
        cluster.wait_scored(sent);
        sent
    };
    send();
    late.signal("STOP");
    other.wait("all partitions", |daemon| daemon.metric("sluiced_assigned_partitions") == 2);
    send();
    for partition in 0..2 {
        cluster.kafka.remove_records("sluice.documents", partition, 2 * EACH as i64);
    }
    late.signal("CONT");
    late.wait("its return", |daemon| daemon.metric("sluiced_assigned_partitions") == 1);
    let all = send();
    for daemon in [late, other] {
        assert_eq!(daemon.stop().code(), Some(0));
    }
    cluster.assert_each_once(all);
}
