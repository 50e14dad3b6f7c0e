//! The real `sluice-train run` on a topic, with its metrics.

use std::io::BufReader;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::daemon::follow_log;
use crate::{binary, golden, http_get};

/// A small model, so that a step takes milliseconds.
const TINY: [&str; 10] =
    ["--hidden-size", "16", "--layers", "1", "--heads", "2", "--batch-size", "2", "--sequence-length", "32"];

/// A running trainer, which is killed with this value.
pub struct Trainer {
    process: Child,
    address: String,
    log: Arc<Mutex<String>>,
}

impl Trainer {
    /// Starts one on `sluice.scored` that writes to `out`, with further flags and variables, and waits for its metrics.
    pub fn start(bootstrap_servers: &str, out: &Path, flags: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut process = Command::new(binary("sluice-train"))
            .args(["run", "--bootstrap-servers", bootstrap_servers, "--metrics-listen", "127.0.0.1:0"])
            .args(TINY)
            .arg("--tokenizer")
            .arg(golden("tiny-llama/tokenizer.json"))
            .arg("--out")
            .arg(out)
            .args(flags)
            .envs(variables.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(process.stderr.take().unwrap());
        let (log, address) = follow_log(stderr, "the trainer", |line| {
            let (_, address) = line.split_once("address=")?;
            Some(address.split_whitespace().next()?.to_owned())
        });
        Self { process, address, log }
    }

    /// The address of its metrics.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The value of a metric, labels and all; nothing where it is not there.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let (status, text) = http_get(&self.address, "/metrics");
        assert_eq!(status, 200, "{text}");
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// Waits for the end, after which its log is complete.
    pub fn ended(&mut self) -> ExitStatus {
        let status = self.process.wait().unwrap();
        // The thread that reads the log holds the other one until it has read all of it.
        while Arc::strong_count(&self.log) > 1 {
            std::thread::sleep(Duration::from_millis(10));
        }
        status
    }

    /// Waits for the end.
    pub fn wait(mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }

    /// Sends SIGTERM and waits for the end.
    pub fn stop(self) -> ExitStatus {
        let _ = Command::new("kill").arg(self.process.id().to_string()).status().unwrap();
        self.wait()
    }
}

impl Drop for Trainer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
