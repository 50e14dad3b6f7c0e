//! A real Apache Kafka, through `ops/kafka`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::metadata::MetadataTopic;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::root;

/// What [`Kafka::start_with`] starts.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Brokers: 1, or 3 that copy each other's records.
    pub brokers: usize,
    /// Whether there is a listener with TLS and SASL beside the plain one.
    pub tls_sasl: bool,
}

/// A cluster, which ends with this value.
pub struct Kafka {
    data: PathBuf,
    /// Number of brokers; their nodes are numbered from 1.
    pub brokers: usize,
    /// Their addresses, the same over restarts.
    pub bootstrap_servers: String,
}

impl Kafka {
    /// Starts one broker with its data in `data`.
    pub fn start(data: &Path) -> Self {
        Self::start_with(data, Shape { brokers: 1, tls_sasl: false })
    }

    /// Starts a cluster with its data in `data`.
    pub fn start_with(data: &Path, shape: Shape) -> Self {
        let mut kafka =
            Self { data: data.to_owned(), brokers: shape.brokers, bootstrap_servers: String::new() };
        let brokers = shape.brokers.to_string();
        let mut words = vec!["start", "--brokers", &brokers];
        if shape.tls_sasl {
            words.push("--tls-sasl");
        }
        kafka.bootstrap_servers = kafka.run(&words);
        kafka
    }

    /// SIGKILL to a broker.
    pub fn kill(&self, node: usize) {
        self.run(&["kill", "--node", &node.to_string()]);
    }

    /// Asks a broker to end, and waits.
    pub fn stop(&self, node: usize) {
        self.run(&["stop", "--node", &node.to_string()]);
    }

    /// SIGSTOP to a broker, until the value that is returned is dropped.
    pub fn freeze(&self, node: usize) -> Frozen {
        let frozen = Frozen(self.process_id(node).expect("the broker runs"));
        frozen.signal("-STOP");
        frozen
    }

    /// Fills a broker's disk, as far as it can tell: no file of its grows any more but by `room` bytes of the largest log,
    /// so that a record may be torn. It ends by itself, and has room again when it is started.
    ///
    /// A limit of the process stands in for the disk, for a small file system of its own takes privileges. The broker sees
    /// EFBIG where a full disk gives ENOSPC, and takes both for the end of its log folder.
    pub fn fill_disk(&self, node: usize, room: u64) {
        const ENDS_WITHIN: Duration = Duration::from_secs(30);
        let process = self.process_id(node).expect("the broker runs");
        let limit = largest_log(&self.data.join(format!("broker-{node}.data"))) + room;
        let limit = format!("--fsize={limit}:");
        let set = Command::new("prlimit").args(["--pid", &process.to_string(), &limit]).status();
        assert!(set.expect("prlimit, which util-linux has").success(), "cannot limit the files of a broker");
        let begun = Instant::now();
        while self.process_id(node).is_some() {
            assert!(begun.elapsed() < ENDS_WITHIN, "broker {node} goes on without room for a record");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Starts the brokers that do not run.
    pub fn start_again(&self) {
        self.run(&["start"]);
    }

    /// Process ids of the brokers that run.
    pub fn process_ids(&self) -> Vec<u32> {
        (1..=self.brokers).filter_map(|node| self.process_id(node)).collect()
    }

    /// The process of a broker that runs.
    fn process_id(&self, node: usize) -> Option<u32> {
        let (_, status) = self.try_run(&["status"]);
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("node={node} ")))?.to_owned();
        line.split_whitespace().find_map(|word| word.strip_prefix("pid=")?.parse().ok())
    }

    /// Waits until every broker serves and has all copies that it should have.
    pub fn wait_until_well(&self) {
        const WITHIN: Duration = Duration::from_mins(2);
        let begun = Instant::now();
        while !(self.try_run(&["status"]).0 && self.has_all_copies()) {
            assert!(begun.elapsed() < WITHIN, "the brokers are not well again after {WITHIN:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn has_all_copies(&self) -> bool {
        let Ok(metadata) = self.admin().inner().fetch_metadata(None, Duration::from_secs(5)) else {
            return false;
        };
        let mut partitions = metadata.topics().iter().flat_map(MetadataTopic::partitions);
        partitions.all(|it| it.leader() >= 0 && it.isr().len() == it.replicas().len())
    }

    /// The variables that `ops/kafka env` prints, such as `SLUICE_KAFKA_SASL_BOOTSTRAP`.
    pub fn variables(&self) -> BTreeMap<String, String> {
        let assignments = self.run(&["env"]);
        let pairs = assignments.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned())).collect()
    }

    /// `ops/kafka` with these words, which must succeed; what it prints.
    fn run(&self, words: &[&str]) -> String {
        let output = self.command(words).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ops/kafka {words:?} failed: {message}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// The same, whatever comes of it.
    fn try_run(&self, words: &[&str]) -> (bool, String) {
        let output = self.command(words).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(root().join("ops/kafka"));
        command.args(words).arg("--data").arg(&self.data);
        command
    }

    /// Creates a topic.
    pub fn create_topic(&self, name: &str, partitions: i32) {
        self.create_topic_with(name, partitions, &[]);
    }

    /// Creates a topic with settings of its own.
    pub fn create_topic_with(&self, name: &str, partitions: i32, settings: &[(&str, &str)]) {
        let admin = self.admin();
        let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(self.brokers as i32));
        for (key, value) in settings {
            topic = topic.set(key, value);
        }
        let created = rdkafka_wait(admin.create_topics(&[topic], &AdminOptions::new()));
        created.unwrap()[0].as_ref().unwrap();
    }

    /// Gives a topic these settings, and no others of its own.
    pub fn set_topic(&self, name: &str, settings: &[(&str, &str)]) {
        let mut change = AlterConfig::new(ResourceSpecifier::Topic(name));
        for (key, value) in settings {
            change = change.set(key, value);
        }
        let changed = rdkafka_wait(self.admin().alter_configs(&[change], &AdminOptions::new()));
        changed.unwrap()[0].as_ref().unwrap();
    }

    /// Deletes a topic and waits until no broker knows it any more.
    pub fn delete_topic(&self, name: &str) {
        let admin = self.admin();
        rdkafka_wait(admin.delete_topics(&[name], &AdminOptions::new())).unwrap()[0].as_ref().unwrap();
        let exists = || {
            let metadata = admin.inner().fetch_metadata(None, Duration::from_secs(10)).unwrap();
            metadata.topics().iter().any(|topic| topic.name() == name)
        };
        while exists() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Removes the records of a partition before an offset, as retention does.
    pub fn remove_records(&self, topic: &str, partition: i32, before: i64) {
        self.remove_records_of(topic, &[(partition, before)]);
    }

    /// The same of several partitions.
    pub fn remove_records_of(&self, topic: &str, before: &[(i32, i64)]) {
        let mut offsets = TopicPartitionList::new();
        for &(partition, before) in before {
            offsets.add_partition_offset(topic, partition, Offset::Offset(before)).unwrap();
        }
        let removed = rdkafka_wait(self.admin().delete_records(&offsets, &AdminOptions::new())).unwrap();
        for &(partition, before) in before {
            let first = removed.find_partition(topic, partition).map(|it| it.offset());
            assert_eq!(first, Some(Offset::Offset(before)), "partition {partition} begins there now");
        }
    }

    /// Gives a topic more partitions, `partitions` in all.
    pub fn grow_topic(&self, name: &str, partitions: usize) {
        let more = NewPartitions::new(name, partitions);
        let grown = rdkafka_wait(self.admin().create_partitions(&[more], &AdminOptions::new()));
        grown.unwrap()[0].as_ref().unwrap();
    }

    /// The leader of each partition of every topic.
    pub fn leaders(&self) -> BTreeMap<(String, i32), i32> {
        let metadata = self.admin().inner().fetch_metadata(None, Duration::from_secs(10)).unwrap();
        let topics = metadata.topics().iter();
        topics
            .flat_map(|topic| {
                topic.partitions().iter().map(|it| ((topic.name().to_owned(), it.id()), it.leader()))
            })
            .collect()
    }

    /// Creates a topic of which one broker alone has all partitions.
    pub fn create_topic_on(&self, node: i32, name: &str, partitions: usize, settings: &[(&str, &str)]) {
        let replicas: Vec<&[i32]> = vec![std::slice::from_ref(&node); partitions];
        let mut topic = NewTopic::new(name, partitions as i32, TopicReplication::Variable(&replicas));
        for (key, value) in settings {
            topic = topic.set(key, value);
        }
        let admin = self.admin();
        let created = rdkafka_wait(admin.create_topics(&[topic], &AdminOptions::new()));
        created.unwrap()[0].as_ref().unwrap();
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        ClientConfig::new().set("bootstrap.servers", &self.bootstrap_servers).create().unwrap()
    }
}

/// Bytes of the largest log segment below a folder.
fn largest_log(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => largest_log(&entry.path()),
        Ok(_) if entry.path().extension().is_some_and(|it| it == "log") => {
            entry.metadata().map_or(0, |it| it.len())
        }
        _ => 0,
    });
    sizes.max().unwrap_or(0)
}

/// A broker that is frozen, and goes on when this value goes.
pub struct Frozen(u32);

impl Frozen {
    fn signal(&self, name: &str) {
        // Fails where the process has ended, which is for the test to see.
        let _ = Command::new("kill").arg(name).arg(self.0.to_string()).status();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.signal("-CONT");
    }
}

/// Waits for a future of librdkafka, which completes on a thread of its own.
fn rdkafka_wait<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

impl Drop for Kafka {
    fn drop(&mut self) {
        // Without a look at the outcome: this may run while a test fails, and a second panic would hide the first.
        let _ = Command::new(root().join("ops/kafka")).args(["stop", "--data"]).arg(&self.data).status();
    }
}
