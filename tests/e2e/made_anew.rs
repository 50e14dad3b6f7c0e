//! Topics that are deleted and made anew while somebody reads or writes them.
#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use sluice_tests::{Cluster, Trainer};

const DOCUMENTS: &str = "sluice.documents";
const SCORED: &str = "sluice.scored";
const BEFORE: usize = 10;
/// More than before, so that a reader who goes on where it was finds records there.
const ALL: usize = 40;

#[test]
fn a_documents_topic_made_anew_is_read_from_its_beginning() {
    let cluster = Cluster::with_topics(1);
    cluster.send(0..BEFORE, 20);
    let daemon = cluster.daemon(&[]);
    cluster.wait_scored(BEFORE);
    cluster.kafka.delete_topic(DOCUMENTS);
    cluster.kafka.create_topic(DOCUMENTS, 1);
    cluster.send(BEFORE..ALL, 20);
    let last = format!("document-{}", ALL - 1);
    daemon.wait("the last document", |_| cluster.scored_ids().contains(&last));
    assert!(daemon.log().contains("the documents topic was deleted and made anew"), "{}", daemon.log());
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.assert_each_once(ALL);
}

/// Commits an offset for the daemons' group as `metadata` says.
fn commit(cluster: &Cluster, offset: i64, metadata: &str) {
    let settings = ClientConfig::new().set("bootstrap.servers", cluster.servers()).clone();
    let member: BaseConsumer = settings.clone().set("group.id", "sluiced").create().unwrap();
    let mut list = TopicPartitionList::new();
    let mut element = list.add_partition(DOCUMENTS, 0);
    element.set_offset(Offset::Offset(offset)).unwrap();
    element.set_metadata(metadata);
    member.commit(&list, CommitMode::Sync).unwrap();
}

fn committed_metadata(cluster: &Cluster) -> String {
    let settings = ClientConfig::new().set("bootstrap.servers", cluster.servers()).clone();
    let member: BaseConsumer = settings.clone().set("group.id", "sluiced").create().unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition(DOCUMENTS, 0);
    let committed = member.committed_offsets(list, Duration::from_secs(10)).unwrap();
    committed.elements()[0].metadata().to_owned()
}

/// What a commit leaves behind that comes when the topic has been made anew already.
#[test]
fn an_offset_of_another_topic_is_not_begun_at() {
    let cluster = Cluster::with_topics(1);
    cluster.send(0..BEFORE, 20);
    let daemon = cluster.daemon(&[]);
    cluster.wait_scored(BEFORE);
    assert_eq!(daemon.stop().code(), Some(0));
    let own = committed_metadata(&cluster);
    assert!(own.starts_with("scored-topic-id=") && own.contains(",topic-id="), "{own:?}");

    commit(&cluster, 5, "topic-id=5v5NtFUqT4CYhVXEZV3Wbw");
    let mut refusing = cluster.daemon(&[]);
    refusing.wait_for_end(65);
    let words = "has committed offset 5 of partition 0 in another topic `sluice.documents` (id 5v5NtFUqT4CYhVXEZV3Wbw)";
    assert!(refusing.log().contains(words), "{}", refusing.log());

    // As a person sets it.
    commit(&cluster, BEFORE as i64, "");
    cluster.send(BEFORE..ALL, 20);
    let daemon = cluster.daemon(&[]);
    cluster.wait_scored(ALL);
    assert_eq!(daemon.stop().code(), Some(0));
    assert_eq!(committed_metadata(&cluster), own);
    cluster.assert_each_once(ALL);
}

#[test]
fn a_scored_topic_made_anew_is_said_and_nothing_more_is_taken_for_scored() {
    let cluster = Cluster::with_topics(1);
    cluster.send(0..BEFORE, 20);
    // The client looks after its topics every few minutes by itself.
    let flags = ["--kafka-properties", "topic.metadata.refresh.interval.ms=1000"];
    let mut daemon = cluster.daemon(&flags);
    cluster.wait_scored(BEFORE);
    cluster.kafka.delete_topic(SCORED);
    cluster.kafka.create_topic(SCORED, 1);
    daemon.wait_for_end(65);
    assert!(daemon.log().contains("what was published to it before is gone"), "{}", daemon.log());

    go_on_in_a_scored_topic_made_anew(&cluster);
}

#[test]
fn a_scored_topic_made_anew_while_no_daemon_runs_is_said_as_well() {
    let cluster = Cluster::with_topics(1);
    cluster.send(0..BEFORE, 20);
    let daemon = cluster.daemon(&[]);
    cluster.wait_scored(BEFORE);
    assert_eq!(daemon.stop().code(), Some(0));
    cluster.kafka.delete_topic(SCORED);
    cluster.kafka.create_topic(SCORED, 1);
    go_on_in_a_scored_topic_made_anew(&cluster);
}

/// A daemon that is started names it and commits nothing, until a person says where to go on.
fn go_on_in_a_scored_topic_made_anew(cluster: &Cluster) {
    cluster.send(BEFORE..ALL, 20);
    let mut refusing = cluster.daemon(&[]);
    refusing.wait_for_end(65);
    let words = "and its documents count as scored (partition 0)";
    assert!(refusing.log().contains(words), "{}", refusing.log());
    // As `--to-current` does, once the group has no members any more.
    commit(cluster, BEFORE as i64, "");
    let next = cluster.daemon(&[]);
    cluster.wait_scored(ALL - BEFORE);
    assert_eq!(next.stop().code(), Some(0));
    assert_eq!(cluster.scored_ids().len(), ALL - BEFORE);
}

#[test]
fn a_trainer_does_not_go_on_in_a_topic_made_anew() {
    const FEW: usize = 400;
    const MANY: usize = 1000;
    let cluster = Cluster::with_topics(1);
    let folder = tempfile::tempdir().unwrap();
    cluster.send(0..FEW, 20);
    let scorer = cluster.daemon(&[]);
    cluster.wait_scored(FEW);
    let flags = ["--follow", "--steps", "1000000", "--shuffle-buffer", "1"];
    let trainer = Trainer::start(cluster.servers(), &folder.path().join("run"), &flags, &[]);
    scorer.wait("steps", |_| trainer.metric("sluice_train_steps_total").is_some_and(|steps| steps > 0.0));
    assert_eq!(scorer.stop().code(), Some(0));

    cluster.kafka.delete_topic(SCORED);
    cluster.kafka.create_topic(SCORED, 1);
    cluster.send(FEW..MANY, 20);
    // Of a group that has published nothing to the topic before it was made anew; the first one's would not go on.
    let scorer = cluster.daemon(&["--kafka-group-id", "another"]);
    cluster.wait_scored(MANY);
    assert_eq!(trainer.wait().code(), Some(65));
    assert_eq!(scorer.stop().code(), Some(0));
}

#[test]
fn a_trainer_is_not_resumed_in_a_topic_made_anew_that_has_grown_longer() {
    const FEW: usize = 400;
    const MANY: usize = 1000;
    let cluster = Cluster::with_topics(1);
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    cluster.send(0..FEW, 20);
    let scorer = cluster.daemon(&[]);
    cluster.wait_scored(FEW);
    let flags = ["--follow", "--steps", "1000000", "--shuffle-buffer", "1", "--resume"];
    let trainer = Trainer::start(cluster.servers(), &run, &flags, &[]);
    scorer.wait("steps", |_| trainer.metric("sluice_train_steps_total").is_some_and(|steps| steps > 0.0));
    assert_eq!(trainer.stop().code(), Some(0));
    assert_eq!(scorer.stop().code(), Some(0));

    cluster.kafka.delete_topic(SCORED);
    cluster.kafka.create_topic(SCORED, 1);
    cluster.send(FEW..MANY, 20);
    let scorer = cluster.daemon(&["--kafka-group-id", "another"]);
    cluster.wait_scored(MANY);
    assert_eq!(scorer.stop().code(), Some(0));
    let mut resumed = Trainer::start(cluster.servers(), &run, &flags, &[]);
    assert_eq!(resumed.ended().code(), Some(65));
    assert!(resumed.log().contains("deleted and made anew since this run began"), "{}", resumed.log());
}
