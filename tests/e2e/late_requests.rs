//! Requests that arrive long after their sender has given up on them and gone on.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::{Duration, Instant};

use sluice_tests::{Cluster, Daemon, Proxy, Request, golden};

const BEFORE: usize = 10;
const ALL: usize = 20;
/// How long the client waits for an answer before it asks again.
const IMPATIENT: [&str; 2] = ["--kafka-properties", "socket.timeout.ms=2000"];

fn daemon(proxy: &Proxy) -> Daemon {
    Daemon::start_with(&proxy.bootstrap_servers, &golden("tiny-llama"), &IMPATIENT)
}

/// A commit is kept back, and asked for again with success. It arrives in the middle of the next transaction, which has
/// got no further than to everything but `missing`, and then the daemon is killed.
fn a_late_commit_with(missing: Request) {
    let complete = match missing {
        Request::Produce => Request::TxnOffsetCommit,
        _ => Request::Produce,
    };
    let cluster = Cluster::with_topics(1);
    let proxy = Proxy::start(cluster.servers());
    proxy.hold(Request::EndTxn);
    let first = daemon(&proxy);
    cluster.send(0..BEFORE, 20);
    proxy.wait_held(Request::EndTxn);
    proxy.let_pass(Request::EndTxn);
    cluster.wait_scored(BEFORE);

    let answers = proxy.answers(complete);
    proxy.hold(missing);
    cluster.send(BEFORE..ALL, 20);
    proxy.wait_held(missing);
    proxy.wait_answers(complete, answers + 1);
    proxy.release(Request::EndTxn);
    drop(first);

    proxy.let_pass(missing);
    let second = daemon(&proxy);
    // What comes out behind it says that all the rest has come out, or never will.
    cluster.send(ALL..ALL + 1, 20);
    let last = format!("document-{ALL}");
    second.wait("the last document", |_| cluster.scored_ids().contains(&last));
    assert_eq!(second.stop().code(), Some(0));
    cluster.assert_each_once(ALL + 1);
}

#[test]
fn a_commit_that_arrives_late_commits_no_offsets_without_their_records() {
    a_late_commit_with(Request::Produce);
}

#[test]
fn a_commit_that_arrives_late_commits_no_records_without_their_offsets() {
    a_late_commit_with(Request::TxnOffsetCommit);
}

/// It is as if another daemon had taken over its name, for the brokers. A service manager that stayed away would stay away
/// for good.
#[test]
fn a_daemon_that_fences_itself_ends_with_what_starts_it_again() {
    let cluster = Cluster::with_topics(1);
    let proxy = Proxy::start(cluster.servers());
    proxy.hold(Request::InitProducerId);
    let mut first = daemon(&proxy);
    proxy.wait_held(Request::InitProducerId);
    proxy.let_pass(Request::InitProducerId);
    cluster.send(0..BEFORE, 20);
    cluster.wait_scored(BEFORE);
    proxy.release(Request::InitProducerId);
    cluster.send(BEFORE..ALL, 20);
    first.wait_for_end(1);
    assert!(first.log().contains("was repeated, and may have arrived once more"), "{}", first.log());

    let second = daemon(&proxy);
    cluster.wait_scored(ALL);
    assert_eq!(second.stop().code(), Some(0));
    cluster.assert_each_once(ALL);
}

/// The brokers give up what is open for too long. A daemon that ended for it would load its model again, with all others that
/// the same outage has struck.
#[test]
fn a_daemon_goes_on_whose_transaction_the_brokers_have_given_up() {
    const OPEN: Duration = Duration::from_secs(2);
    let cluster = Cluster::with_topics(1);
    let proxy = Proxy::start(cluster.servers());
    let flags = ["--kafka-properties", "transaction.timeout.ms=2000"];
    let mut daemon = Daemon::start_with(&proxy.bootstrap_servers, &golden("tiny-llama"), &flags);
    cluster.send(0..BEFORE, 20);
    cluster.wait_scored(BEFORE);
    proxy.hold(Request::AddOffsetsToTxn);
    cluster.send(BEFORE..ALL, 20);
    proxy.wait_held(Request::AddOffsetsToTxn);
    // The brokers look for such transactions once a second.
    std::thread::sleep(OPEN + Duration::from_secs(3));
    proxy.let_go(&[Request::AddOffsetsToTxn]);
    cluster.wait_scored(ALL);
    assert!(daemon.ended().is_none());
    assert_eq!(daemon.metric("sluiced_producers_replaced_total"), 1, "{}", daemon.log());
    let words = "the brokers have given up a transaction";
    assert!(daemon.log().contains(words), "{}", daemon.log());
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.assert_each_once(ALL);
}

/// Nobody can tell then whether the commit was made, but the group's offsets at the next start. Meanwhile the partitions of a
/// daemon that has given up, and does not end, are nobody's.
#[test]
fn a_daemon_whose_commit_was_refused_ends_at_once() {
    const OPEN: Duration = Duration::from_secs(2);
    /// As long as a call may take that is under way, and half of what a daemon that hangs is given.
    const AT_ONCE: Duration = Duration::from_secs(5);
    for is_asked_to_stop in [false, true] {
        let cluster = Cluster::with_topics(1);
        let proxy = Proxy::start(cluster.servers());
        let flags = ["--kafka-properties", "transaction.timeout.ms=2000"];
        let mut first = Daemon::start_with(&proxy.bootstrap_servers, &golden("tiny-llama"), &flags);
        proxy.hold(Request::EndTxn);
        cluster.send(0..BEFORE, 20);
        proxy.wait_held(Request::EndTxn);
        if is_asked_to_stop {
            first.signal("TERM");
        }
        std::thread::sleep(OPEN + Duration::from_secs(3));
        assert!(first.ended().is_none());
        let begun = Instant::now();
        proxy.let_go(&[Request::EndTxn]);
        first.wait_for_end(1);
        assert!(begun.elapsed() < AT_ONCE, "it took {:?}\n{}", begun.elapsed(), first.log());
        let second = daemon(&proxy);
        cluster.wait_scored(BEFORE);
        assert_eq!(second.stop().code(), Some(0));
        cluster.assert_each_once(BEFORE);
    }
}

#[test]
fn connections_that_are_cut_while_nothing_happens_hold_up_nothing_afterwards() {
    let cluster = Cluster::with_topics(1);
    let proxy = Proxy::start(cluster.servers());
    let daemon = daemon(&proxy);
    cluster.send(0..BEFORE, 20);
    cluster.wait_scored(BEFORE);
    assert_eq!(daemon.metric("sluiced_producers_replaced_total"), 0, "nothing was in doubt");
    proxy.cut();
    cluster.send(BEFORE..ALL, 20);
    cluster.wait_scored(ALL);
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.assert_each_once(ALL);
}

/// The broker that alone has the transactions' own topic.
const COORDINATOR: usize = 3;

/// What freezes a virtual machine: requests wait in its sockets and are served when it wakes, in the order in which they
/// came, while their sender has asked again and again.
#[test]
fn a_coordinator_that_freezes_and_thaws_loses_and_doubles_nothing() {
    const ROUNDS: usize = 3;
    let cluster = Cluster::start(3);
    let settings = [("cleanup.policy", "compact"), ("min.insync.replicas", "1")];
    cluster.kafka.create_topic_on(COORDINATOR as i32, "__transaction_state", 4, &settings);
    for topic in ["sluice.documents", "sluice.scored", "sluice.dead-letters"] {
        cluster.kafka.create_topic(topic, 2);
    }
    let daemon = cluster.daemon(&IMPATIENT);
    cluster.send(0..BEFORE, 20);
    cluster.wait_scored(BEFORE);
    for round in 1..=ROUNDS {
        let frozen = cluster.kafka.freeze(COORDINATOR);
        cluster.send(round * BEFORE..(round + 1) * BEFORE, 20);
        daemon.wait("a word on it", |daemon| daemon.get("/ready").0 == 503);
        drop(frozen);
        cluster.wait_scored((round + 1) * BEFORE);
        daemon.wait("readiness", |daemon| daemon.get("/ready").0 == 200);
    }
    assert!(daemon.metric("sluiced_producers_replaced_total") > 0);
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.assert_each_once((ROUNDS + 1) * BEFORE);
}
