//! A real Prometheus, as `ops/setup-prometheus` brings it.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{environment, http_get, root};

/// A running Prometheus with the recording and alert rules of Sluice, which is killed with this value.
pub struct Prometheus {
    process: Child,
    address: String,
}

impl Prometheus {
    /// Starts one that asks each of `targets`, a job and its address, for its metrics every second.
    pub fn scraping(targets: &[(&str, &str)], data: &Path) -> Self {
        let rules = root().join("ops/prometheus");
        let jobs = targets
            .iter()
            .map(|(job, target)| format!("{{job_name: {job}, static_configs: [{{targets: ['{target}']}}]}}"));
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
             rule_files: ['{rules}/recording.yml', '{rules}/alerts.yml']\n\
             scrape_configs: [{jobs}]\n",
            rules = rules.display(),
            jobs = jobs.collect::<Vec<_>>().join(", ")
        );
        let file = data.join("prometheus.yml");
        std::fs::write(&file, config).unwrap();
        // Free a moment ago; Prometheus does not say which port it took of its own choice.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let process = Command::new(environment("SLUICE_TEST_PROMETHEUS").join("prometheus"))
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", data.join("series").display()))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let prometheus = Self { process, address };
        let deadline = Instant::now() + Duration::from_mins(1);
        // It answers before it has read what it keeps, and then only that it is not ready.
        let is_ready = || {
            std::net::TcpStream::connect(&prometheus.address).is_ok()
                && http_get(&prometheus.address, "/-/ready").0 == 200
        };
        while !is_ready() {
            assert!(Instant::now() < deadline, "waited a minute for Prometheus");
            std::thread::sleep(Duration::from_millis(50));
        }
        prometheus
    }

    /// What its API answers at `path`, with a query where there is one.
    pub fn api(&self, path: &str, parameters: &[(&str, &str)]) -> serde_json::Value {
        let pairs: Vec<_> =
            parameters.iter().map(|(name, value)| format!("{name}={}", percent_encode(value))).collect();
        let (status, body) = http_get(&self.address, &format!("/api/v1/{path}?{}", pairs.join("&")));
        assert_eq!(status, 200, "{path} {parameters:?}: {body}");
        serde_json::from_str::<serde_json::Value>(&body).unwrap()["data"].take()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn percent_encode(text: &str) -> String {
    text.bytes()
        .map(
            |byte| {
                if byte.is_ascii_alphanumeric() {
                    char::from(byte).to_string()
                } else {
                    format!("%{byte:02X}")
                }
            },
        )
        .collect()
}

/// Runs promtool in `ops/prometheus`; what it says, where all is well.
pub fn promtool(arguments: &[&str]) -> String {
    let output = Command::new(environment("SLUICE_TEST_PROMETHEUS").join("promtool"))
        .args(arguments)
        .current_dir(root().join("ops/prometheus"))
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "promtool {arguments:?}:\n{said}");
    said
}
