//! Daemons that share a group: one joins, one leaves, one comes back from the dead.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer};
use rdkafka::topic_partition_list::TopicPartitionList;
use sluice_tests::{Cluster, Daemon};

const CALL: Duration = Duration::from_secs(30);
const SAMPLE: Duration = Duration::from_millis(50);
/// Tokens of a document.
const TOKENS: usize = 60;
/// Longer than a rebalance, which waits for a heartbeat (3 s), on a machine with nothing else to do.
const STALL_MAX: Duration = Duration::from_secs(6);
/// Longer than the session of the daemons below.
const ZOMBIE: Duration = Duration::from_secs(9);
/// One thread, and few documents at a time: tens of thousands of them are a long queue.
const SLOW: [&str; 6] =
    ["--model-threads", "1", "--batch-tokens-max", "256", "--batch-lookahead-tokens", "2048"];

/// Watches `daemon` until `holds`; the longest time in which it has finished nothing.
fn longest_stall(daemon: &Daemon, holds: impl Fn() -> bool) -> Duration {
    let (mut finished, mut since, mut longest) = (daemon.finished(), Instant::now(), Duration::ZERO);
    while !holds() {
        std::thread::sleep(SAMPLE);
        longest = longest.max(since.elapsed());
        let now = daemon.finished();
        if now > finished {
            (finished, since) = (now, Instant::now());
        }
    }
    longest
}

/// What is far shorter than scoring what `daemon` has in flight, were it as fast as since `begun`, and no shorter than a
/// rebalance: on a machine with a lot to do, both take longer.
fn stall_max(daemon: &Daemon, begun: Instant) -> Duration {
    let tokens_per_second = (daemon.finished() * TOKENS) as f64 / begun.elapsed().as_secs_f64();
    let queue_seconds = daemon.metric("sluiced_in_flight_tokens") as f64 / tokens_per_second;
    STALL_MAX.max(Duration::from_secs_f64(queue_seconds / 4.0))
}

/// An open transaction of nobody's, which holds up the offsets of these partitions.
fn hold(cluster: &Cluster, partitions: &[i32]) -> ThreadedProducer<DefaultProducerContext> {
    let mut settings = ClientConfig::new();
    settings.set("bootstrap.servers", cluster.servers());
    let member: BaseConsumer = settings.clone().set("group.id", "sluiced").create().unwrap();
    let mut offsets = TopicPartitionList::new();
    for &partition in partitions {
        offsets.add_partition("sluice.documents", partition);
    }
    let offsets = member.committed_offsets(offsets, CALL).unwrap();
    let producer: ThreadedProducer<DefaultProducerContext> =
        settings.set("transactional.id", "holds-up").create().unwrap();
    producer.init_transactions(CALL).unwrap();
    producer.begin_transaction().unwrap();
    producer.send_offsets_to_transaction(&offsets, &member.group_metadata().unwrap(), CALL).unwrap();
    producer
}

#[test]
fn daemons_join_and_leave_while_the_others_go_on() {
    const DOCUMENTS: usize = 30_000;
    let cluster = Cluster::with_topics(4);
    cluster.send(0..DOCUMENTS, TOKENS);
    let first = cluster.daemon(&[&SLOW[..], &["--kafka-instance", "first"]].concat());
    let begun = Instant::now();
    first.wait("a long queue", |daemon| {
        daemon.finished() > 0 && daemon.metric("sluiced_in_flight_tokens") > DOCUMENTS * TOKENS / 4
    });
    let stall_max = stall_max(&first, begun);

    let mut second = cluster.daemon(&[&SLOW[..], &["--kafka-instance", "second"]].concat());
    let joining = longest_stall(&first, || second.finished() > 0);
    assert_eq!(first.metric("sluiced_assigned_partitions"), 2);
    assert_eq!(second.metric("sluiced_assigned_partitions"), 2);

    let left_by_second = second.metric("sluiced_in_flight_tokens");
    let before = second.finished();
    second.signal("TERM");
    second.wait_for_end(0);
    let log = second.log();
    let scored =
        log.lines().find_map(|line| line.split_once("\"scored\":")?.1.trim_end_matches('}').parse().ok());
    let scored: usize = scored.unwrap_or_else(|| panic!("no word on what was scored in {log}"));
    let meanwhile = (scored - before) * TOKENS;
    assert!(left_by_second > 20_000, "it had a long queue: {left_by_second} tokens");
    assert!(
        meanwhile < left_by_second / 2,
        "it scored {meanwhile} of {left_by_second} tokens before it ended"
    );
    let leaving = longest_stall(&first, || first.metric("sluiced_assigned_partitions") == 4);
    for stall in [joining, leaving] {
        assert!(stall < stall_max, "the first daemon stood still for {stall:?}, and may for {stall_max:?}");
    }
    // The rest is for the next reader; here only that nothing was doubled or left out so far.
    assert_eq!(first.stop().code(), Some(0));
    let third = cluster.daemon(&["--kafka-instance", "third"]);
    cluster.wait_scored(DOCUMENTS);
    assert_eq!(third.stop().code(), Some(0));
    cluster.assert_each_once(DOCUMENTS);
}

#[test]
fn a_daemon_that_was_given_up_for_dead_publishes_nothing_of_what_others_have_taken_over() {
    let cluster = Cluster::with_topics(2);
    let session = ["--kafka-properties", "session.timeout.ms=6000,heartbeat.interval.ms=1000"];
    // So few tokens that reading is paused when the zombie stops: what it is given afterwards must not stay paused.
    let budget = ["--limits-in-flight-tokens", "50000"];
    let flags = |instance| [&SLOW[..], &session, &budget, &["--kafka-instance", instance]].concat();
    let (zombie, other) = (cluster.daemon(&flags("zombie")), cluster.daemon(&flags("other")));
    let mut documents = 0;
    // Whether it was publishing when it was stopped is a matter of luck, so there is more than one try.
    while zombie.metric("sluiced_fences_total{by=\"group\"}") == 0 {
        assert!(documents < 50_000, "five times nothing was fenced");
        for daemon in [&zombie, &other] {
            daemon.wait("half of the partitions", |daemon| daemon.metric("sluiced_assigned_partitions") == 1);
        }
        let finished = zombie.finished();
        cluster.send(documents..documents + 10_000, TOKENS);
        documents += 10_000;
        zombie.wait("the zombie's first documents", |daemon| daemon.finished() > finished);
        zombie.signal("STOP");
        std::thread::sleep(ZOMBIE);
        other.wait("all partitions", |daemon| daemon.metric("sluiced_assigned_partitions") == 2);
        zombie.signal("CONT");
        zombie.wait("the zombie's return", |daemon| daemon.metric("sluiced_assigned_partitions") == 1);
    }
    cluster.wait_scored(documents);
    for daemon in [zombie, other] {
        assert_eq!(daemon.stop().code(), Some(0));
    }
    cluster.assert_each_once(documents);
}

/// What the oracle found: an offset that is held up by an open transaction was taken for none when a rebalance came, and
/// the partition was read again from its beginning.
#[test]
fn an_offset_that_an_open_transaction_holds_up_is_waited_for() {
    const PARTITIONS: i32 = 4;
    const BEFORE: usize = 400;
    const AFTER: usize = 500;
    let cluster = Cluster::with_topics(PARTITIONS);
    cluster.send(0..BEFORE, 20);
    let earlier = cluster.daemon(&[]);
    cluster.wait_scored(BEFORE);
    assert_eq!(earlier.stop().code(), Some(0));

    let holder = hold(&cluster, &(0..PARTITIONS).collect::<Vec<_>>());
    let first = cluster.daemon(&["--kafka-instance", "first"]);
    first.wait("an assignment", |daemon| daemon.metric("sluiced_rebalances_total") >= 1);
    let second = cluster.daemon(&["--kafka-instance", "second"]);
    second.wait("an assignment", |daemon| daemon.metric("sluiced_rebalances_total") >= 1);
    first.wait("a rebalance", |daemon| daemon.metric("sluiced_rebalances_total") >= 3);
    let (status, why) = first.get("/ready");
    assert!(status == 503 && why.starts_with("no assigned partition can be read yet"), "{why}");
    holder.abort_transaction(CALL).unwrap();

    cluster.send(BEFORE..AFTER, 20);
    cluster.wait_scored(AFTER);
    for daemon in [first, second] {
        assert_eq!(daemon.stop().code(), Some(0));
    }
    cluster.assert_each_once(AFTER);
}

/// The ordinary fail-over: a node died in the middle of a commit, and the transaction is open until it times out.
#[test]
fn a_held_partition_slows_no_other_and_shows() {
    const HELD: i32 = 2;
    const EACH: usize = 100;
    const QUEUE: usize = 500;
    let cluster = Cluster::with_topics(4);
    let mut sent = 0;
    let mut send = |partition: i32, documents: usize| {
        cluster.send_to(Some(partition), sent..sent + documents, 20);
        sent += documents;
        sent
    };
    for partition in 0..4 {
        send(partition, EACH);
    }
    let earlier = cluster.daemon(&[]);
    cluster.wait_scored(4 * EACH);
    assert_eq!(earlier.stop().code(), Some(0));

    let holder = hold(&cluster, &[HELD]);
    for partition in 0..4 {
        send(partition, QUEUE);
    }
    let daemon = cluster.daemon(&[]);
    daemon.wait("the other partitions", |daemon| daemon.finished() >= 3 * QUEUE);
    assert_eq!(daemon.get("/ready").0, 200);
    // What comes while the client is asked for the held offset again and again is read: were a read to wait for each of these
    // calls, there would be one a second.
    send(0, 4 * QUEUE);
    daemon.wait("a partition beside it", |daemon| daemon.finished() >= 7 * QUEUE);
    assert_eq!(daemon.metric("sluiced_assigned_partitions"), 3);
    assert_eq!(daemon.metric("sluiced_unplaced_partitions"), 1);
    daemon.wait("the held queue to count", |daemon| daemon.metric("sluiced_consumer_lag_records") == QUEUE);
    daemon.wait("a word on it", |daemon| {
        daemon.log().lines().any(|line| {
            line.contains("a partition is assigned and not read") && line.contains("\"partition\":2")
        })
    });
    assert!(daemon.log().contains("an open transaction holds its offset up"));

    holder.abort_transaction(CALL).unwrap();
    cluster.wait_scored(sent);
    assert_eq!(daemon.metric("sluiced_unplaced_partitions"), 0);
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.assert_each_once(sent);
}

/// The log of the held partition begins where the group has committed, as it does wherever retention has been at work: no
/// other place in it can be read, not even for a moment.
#[test]
fn a_held_partition_is_not_read_before_its_place_whatever_pauses_and_resumes() {
    const EACH: usize = 100;
    const LONG: usize = 10;
    let cluster = Cluster::with_topics(2);
    for partition in 0..2_usize {
        cluster.send_to(Some(partition as i32), partition * EACH..(partition + 1) * EACH, 20);
    }
    let session = ["--kafka-properties", "session.timeout.ms=6000,heartbeat.interval.ms=1000"];
    // A document takes seconds and is all of the budget, so that reading pauses again and again.
    let slow = ["--model-threads", "1", "--score-stride-tokens", "1", "--batch-lookahead-tokens", "20000"];
    let budget = ["--limits-in-flight-tokens", "20000"];
    let flags = |instance| [&slow[..], &session, &budget, &["--kafka-instance", instance]].concat();
    let survivor = cluster.daemon(&flags("survivor"));
    cluster.wait_scored(2 * EACH);
    let other = cluster.daemon(&flags("other"));
    for daemon in [&survivor, &other] {
        daemon.wait("a share", |daemon| daemon.metric("sluiced_assigned_partitions") == 1);
    }
    let assigned = other.log();
    let assigned = assigned.rsplit("\"partitions\":\"[").next().unwrap();
    let held: i32 = assigned.split(']').next().unwrap().parse().unwrap();
    cluster.kafka.remove_records("sluice.documents", held, EACH as i64);
    cluster.send_to(Some(1 - held), 2 * EACH..2 * EACH + LONG, 24_000);
    survivor.wait("a pause", |daemon| daemon.metric("sluiced_paused") == 1);

    let holder = hold(&cluster, &[held]);
    // It is killed, and nothing comes back under its name.
    drop(other);
    survivor.wait("the other's partition", |daemon| daemon.metric("sluiced_rebalances_total") >= 5);
    let before = survivor.finished();
    survivor.wait("more of its own", |daemon| daemon.finished() >= before + 2);
    assert_eq!(survivor.metric("sluiced_unplaced_partitions"), 1);
    holder.abort_transaction(CALL).unwrap();
    let sent = 2 * EACH + LONG + 10;
    cluster.send_to(Some(held), sent - 10..sent, 20);
    cluster.wait_scored(sent);
    assert_eq!(survivor.stop().code(), Some(0));
    cluster.assert_each_once(sent);
}

/// A producer of documents that hangs in the middle of a transaction: everything behind it waits, and the lag that the daemon
/// can see is none.
#[test]
fn documents_behind_a_transaction_that_hangs_are_shown() {
    const DOCUMENTS: usize = 10;
    let cluster = Cluster::with_topics(1);
    let hanging: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", cluster.servers())
        .set("transactional.id", "hangs")
        .create()
        .unwrap();
    hanging.init_transactions(CALL).unwrap();
    hanging.begin_transaction().unwrap();
    let record = BaseRecord::<str, str>::to("sluice.documents").payload("never committed");
    hanging.send(record).map_err(|(error, _)| error).unwrap();
    hanging.flush(CALL).unwrap();
    cluster.send(0..DOCUMENTS, 20);
    let daemon = cluster.daemon(&[]);
    daemon.wait("word of it", |daemon| daemon.metric("sluiced_open_transaction_seconds") >= 3);
    assert_eq!((daemon.finished(), daemon.metric("sluiced_consumer_lag_records")), (0, 0));
    hanging.abort_transaction(CALL).unwrap();
    cluster.wait_scored(DOCUMENTS);
    daemon.wait("its end", |daemon| daemon.metric("sluiced_open_transaction_seconds") == 0);
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.assert_each_once(DOCUMENTS);
}

/// In the client a pause outlives the assignment that it was made in.
#[test]
fn partitions_that_were_lost_while_reading_was_paused_are_read_again() {
    const DOCUMENTS: usize = 15_000;
    let cluster = Cluster::with_topics(4);
    cluster.send(0..DOCUMENTS, TOKENS);
    let session = ["--kafka-properties", "session.timeout.ms=6000,heartbeat.interval.ms=1000"];
    let budget = ["--limits-in-flight-tokens", "100000"];
    let daemon = cluster.daemon(&[&session[..], &budget, &["--model-threads", "1"]].concat());
    daemon.wait("the first documents", |daemon| daemon.finished() > 0);
    // Meanwhile nothing is committed, so that the budget stays used up.
    daemon.signal("STOP");
    std::thread::sleep(ZOMBIE);
    daemon.signal("CONT");
    cluster.wait_scored(DOCUMENTS);
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.assert_each_once(DOCUMENTS);
}
