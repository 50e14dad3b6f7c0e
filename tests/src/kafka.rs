//! A real Apache Kafka, through `ops/kafka`.

use std::path::{Path, PathBuf};
use std::process::Command;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;

use crate::root;

/// A cluster of one broker, which ends with this value.
pub struct Kafka {
    data: PathBuf,
    /// Its address, the same over restarts.
    pub bootstrap_servers: String,
}

impl Kafka {
    /// Starts a broker with its data in `data`.
    pub fn start(data: &Path) -> Self {
        let mut kafka = Self { data: data.to_owned(), bootstrap_servers: String::new() };
        kafka.bootstrap_servers = kafka.command("start");
        kafka
    }

    /// `ops/kafka start|stop|kill`; what it prints.
    pub fn command(&self, action: &str) -> String {
        let mut command = Command::new(root().join("ops/kafka"));
        command.arg(action).arg("--data").arg(&self.data);
        if action == "kill" {
            command.args(["--node", "1"]);
        }
        let output = command.output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ops/kafka {action} failed: {message}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Creates a topic.
    pub fn create_topic(&self, name: &str, partitions: i32) {
        self.create_topic_with(name, partitions, &[]);
    }

    /// Creates a topic with settings of its own.
    pub fn create_topic_with(&self, name: &str, partitions: i32, settings: &[(&str, &str)]) {
        let admin: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", &self.bootstrap_servers).create().unwrap();
        let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        for (key, value) in settings {
            topic = topic.set(key, value);
        }
        let created = rdkafka_wait(admin.create_topics(&[topic], &AdminOptions::new()));
        created.unwrap()[0].as_ref().unwrap();
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
