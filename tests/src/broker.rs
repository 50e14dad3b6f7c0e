//! librdkafka's mock cluster behind the real `sluiced dev-broker`.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use crate::binary;

/// A broker in a process of its own, which ends with this value.
pub struct Broker {
    process: Child,
    /// Its address.
    pub bootstrap_servers: String,
}

impl Broker {
    /// Starts one with `topics`, each `NAME:PARTITIONS`.
    pub fn start(topics: &[&str]) -> Self {
        let mut process = Command::new(binary("sluiced"))
            .args(["dev-broker", "--until-stdin-closes"])
            .args(topics.iter().flat_map(|topic| ["--topic", topic]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.trim().contains(':'), "dev-broker prints its address first, not {line:?}");
        Self { process, bootstrap_servers: line.trim().to_owned() }
    }

    /// A broker with the three topics of the daemon.
    pub fn with_sluice_topics() -> Self {
        Self::start(&["sluice.documents:4", "sluice.scored:4", "sluice.dead-letters:1"])
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
