//! A real Apache Kafka, through `ops/kafka`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
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
        let frozen = Frozen(self.process_ids()[node - 1]);
        frozen.signal("-STOP");
        frozen
    }

    /// Starts the brokers that do not run.
    pub fn start_again(&self) {
        self.run(&["start"]);
    }

    /// Process ids of the brokers that run.
    pub fn process_ids(&self) -> Vec<u32> {
        let status = self.run(&["status"]);
        let words = status.split_whitespace();
        words.filter_map(|word| word.strip_prefix("pid=")?.parse().ok()).collect()
    }

    /// The variables that `ops/kafka env` prints, such as `SLUICE_KAFKA_SASL_BOOTSTRAP`.
    pub fn variables(&self) -> BTreeMap<String, String> {
        let assignments = self.run(&["env"]);
        let pairs = assignments.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned())).collect()
    }

    /// `ops/kafka` with these words; what it prints.
    fn run(&self, words: &[&str]) -> String {
        let mut command = Command::new(root().join("ops/kafka"));
        command.args(words).arg("--data").arg(&self.data);
        let output = command.output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ops/kafka {words:?} failed: {message}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
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
        let admin = self.admin();
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset(topic, partition, Offset::Offset(before)).unwrap();
        let removed = rdkafka_wait(admin.delete_records(&offsets, &AdminOptions::new())).unwrap();
        let first = removed.elements()[0].offset();
        assert_eq!(first, Offset::Offset(before), "the partition begins there now");
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
