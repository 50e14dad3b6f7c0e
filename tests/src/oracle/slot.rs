//! A place for a daemon: started again whenever it ends, as systemd would.

use std::ops::Add;
use std::path::{Path, PathBuf};

use super::options::Options;
use super::topics::Topics;
use crate::{Daemon, Kafka};

/// Counters of daemons, summed over those that could still be asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Groups committed.
    pub commits: usize,
    /// Transactions aborted.
    pub aborts: usize,
    /// Rebalances seen.
    pub rebalances: usize,
    /// Producers replaced because a call did not return.
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

/// A daemon with a stable name.
pub struct Slot {
    bootstrap_servers: String,
    model: PathBuf,
    flags: Vec<String>,
    instance: usize,
    daemon: Option<Daemon>,
    lived: Counters,
    /// Times that the daemon ended by itself, other than by a signal of ours.
    pub exits: usize,
    /// Times that a loop of the daemon stood still and it was killed for it.
    pub hangs: usize,
}

impl Slot {
    /// Starts a daemon under the name `index`.
    pub(super) fn new(index: usize, kafka: &Kafka, topics: &Topics, model: &Path, options: &Options) -> Self {
        let delivery = if options.exactly_once { "exactly-once" } else { "at-least-once" };
        let flags = [
            ("--kafka-delivery", delivery),
            ("--kafka-group-id", &topics.group),
            ("--kafka-documents-topic", &topics.documents),
            ("--kafka-scored-topic", &topics.scored),
            ("--kafka-dead-letter-topic", &topics.dead_letters),
            // Small groups and a short session: many transactions, and zombies within seconds.
            ("--limits-publish-tokens", "2000"),
            // Reading is paused whenever there is a backlog.
            ("--limits-in-flight-tokens", "4000"),
            ("--limits-drain-seconds", "20"),
            ("--limits-stalled-seconds", "45"),
            ("--model-threads", "1"),
            ("--kafka-properties", "session.timeout.ms=6000,heartbeat.interval.ms=1000"),
        ];
        let flags = flags.iter().flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]);
        Self::begin(kafka.bootstrap_servers.clone(), model.to_owned(), flags.collect(), index)
    }

    /// A further daemon of the same group, under a name of its own.
    pub fn sibling(&self, index: usize) -> Self {
        Self::begin(self.bootstrap_servers.clone(), self.model.clone(), self.flags.clone(), index)
    }

    fn begin(bootstrap_servers: String, model: PathBuf, flags: Vec<String>, instance: usize) -> Self {
        let lived = Counters::default();
        let mut slot =
            Self { bootstrap_servers, model, flags, instance, daemon: None, lived, exits: 0, hangs: 0 };
        slot.start();
        slot
    }

    fn start(&mut self) {
        let instance = self.instance.to_string();
        let mut flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        flags.extend(["--kafka-instance", &instance]);
        self.daemon = Some(Daemon::start_with(&self.bootstrap_servers, &self.model, &flags));
    }

    /// Sends a signal to the daemon, if it runs.
    pub fn signal(&mut self, name: &str) {
        if let Some(daemon) = &self.daemon {
            daemon.signal(name);
        }
    }

    /// Stops the daemon with SIGTERM; it must drain and exit 0, unless the broker kept it from draining.
    pub fn terminate(&mut self) {
        self.lived = self.counters();
        if let Some(daemon) = self.daemon.take() {
            let status = daemon.stop();
            if status.code() != Some(0) {
                eprintln!("daemon {} ended with {status} when asked to stop", self.instance);
                self.exits += 1;
            }
        }
    }

    /// Starts the daemon again where it has ended.
    pub fn revive(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            match daemon.ended() {
                None if daemon.get("/live").0 == 200 => return,
                // As a watchdog would.
                None => {
                    eprintln!("daemon {} hangs; killing it", self.instance);
                    self.hangs += 1;
                    daemon.signal("KILL");
                }
                Some(status) => {
                    use std::os::unix::process::ExitStatusExt as _;
                    if status.signal() != Some(9) {
                        eprintln!("daemon {} ended by itself with {status}", self.instance);
                        self.exits += 1;
                    }
                }
            }
        }
        self.start();
    }

    /// What the daemons in this place have counted, as far as they could be asked.
    pub fn counters(&mut self) -> Counters {
        let Some(daemon) = &mut self.daemon else { return self.lived };
        if daemon.ended().is_some() {
            return self.lived;
        }
        let now = Counters {
            commits: daemon.metric("sluiced_commits_total"),
            aborts: daemon.metric("sluiced_aborts_total"),
            rebalances: daemon.metric("sluiced_rebalances_total"),
            replaced: daemon.metric("sluiced_producers_replaced_total"),
        };
        self.lived + now
    }
}
