//! A place for a daemon: started again whenever it ends, as systemd would.

use std::ops::Add;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use super::options::{Options, SESSION, TRANSACTION};
use super::topics::Topics;
use crate::Daemon;

/// The exit code of a daemon whose documents are gone.
const GAP: i32 = 65;
const SIGKILL: i32 = 9;
/// How long a daemon may answer nothing at all, as one does that ends at this moment.
const UNHEARD: Duration = Duration::from_secs(30);

/// Counters of daemons, summed over those that could still be asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Groups committed.
    pub commits: usize,
    /// Transactions aborted.
    pub aborts: usize,
    /// Rebalances seen.
    pub rebalances: usize,
    /// Producers replaced because a call did not return, or one of their requests may still be under way.
    pub replaced: usize,
}

impl Add for Counters {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            commits: self.commits + other.commits,
            aborts: self.aborts + other.aborts,
            rebalances: self.rebalances + other.rebalances,
            replaced: self.replaced + other.replaced,
        }
    }
}

/// Why nothing is expected of a daemon, and until when.
#[derive(Clone, Copy, Debug)]
enum Away {
    /// It is suspended.
    Paused(Instant),
    /// It was killed, and nobody starts it.
    Lost(Instant),
}

/// A daemon with a stable name.
pub struct Slot {
    bootstrap_servers: String,
    model: PathBuf,
    flags: Vec<String>,
    instance: usize,
    daemon: Option<Daemon>,
    away: Option<Away>,
    /// When it last answered.
    heard: Instant,
    lived: Counters,
    /// Times that the daemon ended by itself, other than by a signal of ours.
    pub exits: usize,
    /// Times that a loop of the daemon stood still and it was killed for it.
    pub hangs: usize,
}

impl Slot {
    /// Starts a daemon under the name `index`, which reaches the brokers at `bootstrap_servers`.
    pub(super) fn new(
        index: usize,
        bootstrap_servers: &str,
        topics: &Topics,
        model: &Path,
        options: &Options,
    ) -> Self {
        let delivery = if options.exactly_once { "exactly-once" } else { "at-least-once" };
        // A short session and short transactions: zombies, and nodes that are lost for good, within seconds. Requests are
        // made again while the first may still arrive, and partitions that are new are found soon.
        let properties = format!(
            "session.timeout.ms={},heartbeat.interval.ms=1000,transaction.timeout.ms={},socket.timeout.ms=5000,\
             topic.metadata.refresh.interval.ms=2000",
            SESSION.as_millis(),
            TRANSACTION.as_millis()
        );
        let flags = [
            ("--kafka-delivery", delivery),
            ("--kafka-group-id", &topics.group),
            ("--kafka-documents-topic", &topics.documents),
            ("--kafka-scored-topic", &topics.scored),
            ("--kafka-dead-letter-topic", &topics.dead_letters),
            // Small groups: many transactions.
            ("--limits-publish-tokens", "2000"),
            // Reading is paused whenever there is a backlog.
            ("--limits-in-flight-tokens", "4000"),
            ("--limits-drain-seconds", "20"),
            ("--limits-stalled-seconds", "45"),
            ("--model-threads", "1"),
            ("--kafka-properties", &properties),
        ];
        let flags = flags.iter().flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]);
        Self::begin(bootstrap_servers.to_owned(), model.to_owned(), flags.collect(), index)
    }

    /// A further daemon of the same group, under a name of its own.
    pub fn sibling(&self, index: usize) -> Self {
        Self::begin(self.bootstrap_servers.clone(), self.model.clone(), self.flags.clone(), index)
    }

    fn begin(bootstrap_servers: String, model: PathBuf, flags: Vec<String>, instance: usize) -> Self {
        let lived = Counters::default();
        let mut slot = Self {
            bootstrap_servers,
            model,
            flags,
            instance,
            daemon: None,
            away: None,
            heard: Instant::now(),
            lived,
            exits: 0,
            hangs: 0,
        };
        slot.start();
        slot
    }

    fn start(&mut self) {
        let instance = self.instance.to_string();
        let mut flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        flags.extend(["--kafka-instance", &instance]);
        self.daemon = Some(Daemon::start_with(&self.bootstrap_servers, &self.model, &flags));
        self.heard = Instant::now();
    }

    /// Sends SIGKILL to the daemon, if it runs.
    pub fn kill(&self) {
        if let Some(daemon) = &self.daemon {
            daemon.signal("KILL");
        }
    }

    /// Suspends the daemon for so long.
    pub fn pause(&mut self, length: Duration) {
        if let Some(daemon) = &self.daemon {
            daemon.signal("STOP");
            self.away = Some(Away::Paused(Instant::now() + length));
        }
    }

    /// Kills the daemon and has nobody start it for so long.
    pub fn lose(&mut self, length: Duration) {
        self.kill();
        self.away = Some(Away::Lost(Instant::now() + length));
    }

    /// Whether nothing is expected of the daemon at the moment.
    pub fn is_away(&self) -> bool {
        self.away.is_some()
    }

    /// Stops the daemon with SIGTERM; it must drain and exit 0, unless the broker kept it from draining.
    pub fn terminate(&mut self) {
        self.lived = self.counters();
        if let Some(daemon) = self.daemon.take() {
            let log = daemon.log();
            let status = daemon.stop();
            if status.code() != Some(0) && !is_gap(status, &log) {
                eprintln!("daemon {} ended with {status} when asked to stop", self.instance);
                self.exits += 1;
            }
        }
    }

    /// Starts the daemon again where it has ended and somebody looks after it.
    pub fn revive(&mut self) {
        match self.away {
            Some(Away::Paused(until) | Away::Lost(until)) if Instant::now() < until => return,
            Some(Away::Paused(_)) => {
                if let Some(daemon) = &self.daemon {
                    daemon.signal("CONT");
                    self.heard = Instant::now();
                }
            }
            _ => {}
        }
        self.away = None;
        if let Some(daemon) = &mut self.daemon {
            let answer = daemon.try_get("/live");
            if answer.is_some() {
                self.heard = Instant::now();
            }
            match daemon.ended() {
                None if matches!(answer, Some((200, _))) => return,
                None if answer.is_none() && self.heard.elapsed() < UNHEARD => return,
                // As a watchdog would.
                None => {
                    eprintln!("daemon {} hangs; killing it", self.instance);
                    self.hangs += 1;
                    daemon.signal("KILL");
                }
                Some(status) if status.signal() == Some(SIGKILL) => {}
                Some(status) => {
                    let log = daemon.log();
                    let last = log.lines().rev().find(|line| line.contains("ERROR")).unwrap_or_default();
                    eprintln!("daemon {} ended by itself with {status}: {last}", self.instance);
                    self.exits += 1;
                }
            }
        }
        self.start();
    }

    /// Whether the daemon has ended because documents are gone, and has said each of `words`.
    pub fn told_gap(&mut self, words: &[String]) -> bool {
        let Some(daemon) = &mut self.daemon else { return false };
        let Some(status) = daemon.ended() else { return false };
        let log = daemon.log();
        is_gap(status, &log) && words.iter().all(|words| log.contains(words))
    }

    /// Whether the daemon has ended by itself because documents are gone.
    pub fn has_gap(&mut self) -> bool {
        let Some(daemon) = &mut self.daemon else { return false };
        daemon.ended().is_some_and(|status| is_gap(status, &daemon.log()))
    }

    /// What the daemons in this place have counted, as far as they could be asked.
    pub fn counters(&mut self) -> Counters {
        let Some(daemon) = &mut self.daemon else { return self.lived };
        let Some((200, text)) = daemon.try_get("/metrics") else { return self.lived };
        let value = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        let now = Counters {
            commits: value("sluiced_commits_total"),
            aborts: value("sluiced_aborts_total"),
            rebalances: value("sluiced_rebalances_total"),
            replaced: value("sluiced_producers_replaced_total"),
        };
        self.lived + now
    }
}

fn is_gap(status: ExitStatus, log: &str) -> bool {
    status.code() == Some(GAP) && log.contains("has no record any more at offset")
}
