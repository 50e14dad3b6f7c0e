//! The real `sluiced serve`, its endpoints and its end.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::{binary, onnxruntime};

/// A running daemon, which is killed with this value.
pub struct Daemon {
    process: Child,
    address: String,
    log: Arc<Mutex<String>>,
}

impl Daemon {
    /// Starts `sluiced serve` on a mock cluster, which can only deliver at least once.
    pub fn start(bootstrap_servers: &str, model: &Path, flags: &[&str]) -> Self {
        Self::start_with(bootstrap_servers, model, &[&["--kafka-delivery", "at-least-once"], flags].concat())
    }

    /// Starts `sluiced serve` for `model` with further flags, and waits for its HTTP endpoint.
    pub fn start_with(bootstrap_servers: &str, model: &Path, flags: &[&str]) -> Self {
        let model = model.to_str().unwrap();
        Self::start_configured(bootstrap_servers, &[&["--model-path", model], flags].concat())
    }

    /// Starts `sluiced serve` with whatever `flags` say, and waits for its HTTP endpoint.
    pub fn start_configured(bootstrap_servers: &str, flags: &[&str]) -> Self {
        Self::start_in(bootstrap_servers, flags, &[])
    }

    /// The same with further variables in its environment.
    pub fn start_in(bootstrap_servers: &str, flags: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut process = Command::new(binary("sluiced"))
            .args(["serve", "--http-listen", "127.0.0.1:0", "--kafka-bootstrap-servers", bootstrap_servers])
            .args(flags)
            .env("ORT_DYLIB_PATH", onnxruntime())
            .env("SLUICED_LOG_FORMAT", "json")
            .envs(variables.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(process.stderr.take().unwrap());
        let (log, address) = follow_log(stderr, "the daemon", |line| {
            let fields: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            fields["address"].as_str().map(str::to_owned)
        });
        Self { process, address, log }
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The address of its HTTP endpoint.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Status code and body of `GET path`.
    pub fn get(&self, path: &str) -> (u16, String) {
        http_get(&self.address, path)
    }

    /// The same where the daemon may have ended, or may not answer; then nothing.
    pub fn try_get(&self, path: &str) -> Option<(u16, String)> {
        try_http_get(&self.address, path).ok()
    }

    /// The value of a metric, labels and all, such as `sluiced_dead_letters_total{reason="malformed"}`.
    pub fn metric(&self, name: &str) -> usize {
        let (_, text) = self.get("/metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no metric {name}")).parse().unwrap()
    }

    /// Waits until `holds`, for at most a minute.
    pub fn wait(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_mins(1);
        while !holds(self) {
            assert!(Instant::now() < deadline, "waited a minute for {what}\n{}", self.get("/metrics").1);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the daemon has ended by itself with exit code `code`.
    pub fn wait_for_end(&mut self, code: i32) {
        let deadline = Instant::now() + Duration::from_mins(1);
        loop {
            if let Some(status) = self.ended() {
                assert_eq!(status.code(), Some(code));
                return;
            }
            assert!(Instant::now() < deadline, "waited a minute for the daemon to end");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Records that were scored or dead-lettered so far.
    pub fn finished(&self) -> usize {
        let (_, text) = self.get("/metrics");
        let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<usize>().unwrap();
        text.lines()
            .filter(|line| {
                line.starts_with("sluiced_documents_scored_total")
                    || line.starts_with("sluiced_dead_letters_total{")
            })
            .map(value)
            .sum()
    }

    /// Sends a signal, such as `TERM`.
    pub fn signal(&self, name: &str) {
        // Fails where the process has just ended, which is for the caller to see.
        let _ =
            Command::new("kill").arg(format!("-{name}")).arg(self.process.id().to_string()).status().unwrap();
    }

    /// How the daemon ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().unwrap()
    }

    /// Sends SIGTERM and waits for the end.
    pub fn stop(mut self) -> ExitStatus {
        self.signal("TERM");
        self.process.wait().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Keeps what `who` logs, and passes it on to where the test's own output goes. Returns once a line has what `find`
/// looks for.
pub(crate) fn follow_log(
    mut log: BufReader<ChildStderr>,
    who: &str,
    find: impl Fn(&str) -> Option<String>,
) -> (Arc<Mutex<String>>, String) {
    let mut seen = String::new();
    let found = loop {
        let mut line = String::new();
        assert!(log.read_line(&mut line).unwrap() > 0, "{who} ended at its start:\n{seen}");
        seen.push_str(&line);
        if let Some(found) = find(&line) {
            break found;
        }
    };
    let kept = Arc::new(Mutex::new(seen));
    let keep = Arc::clone(&kept);
    std::thread::spawn(move || {
        for line in log.lines().map_while(Result::ok) {
            eprintln!("{line}");
            let mut kept = keep.lock().unwrap();
            kept.push_str(&line);
            kept.push('\n');
        }
    });
    (kept, found)
}

/// Status code and body of `GET path` at `address`.
pub fn http_get(address: &str, path: &str) -> (u16, String) {
    try_http_get(address, path).unwrap()
}

fn try_http_get(address: &str, path: &str) -> io::Result<(u16, String)> {
    const PATIENCE: Duration = Duration::from_mins(1);
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let parts = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    });
    parts.ok_or_else(|| io::Error::other(format!("{address} answers {answer:?} to {path}")))
}
