//! The programs that an experiment runs: the trainer, the daemon, and the scripts beside the sources.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use sluice_trainer::failure::Classify;

use super::options::Options;
use crate::process::cpu_seconds;

/// How often a program that runs is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Longest time in which a daemon says its address.
const START_MAX: Duration = Duration::from_mins(1);

/// With what the names of variables begin that are settings of the trainer and of the daemon.
const SETTINGS: [&str; 2] = ["SLUICE_TRAIN_", "SLUICED_"];

/// Somebody has asked the experiment to stop.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; the same command goes on from here")]
pub struct Interrupted;

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    sources: PathBuf,
    daemon: PathBuf,
    trainer: PathBuf,
    stop: Arc<AtomicBool>,
}

impl Programs {
    /// The daemon and the trainer lie beside this program unless named; the scripts lie in the checkout.
    pub fn find(options: &Options, stop: Arc<AtomicBool>) -> anyhow::Result<Self> {
        let Options { sources, .. } = options;
        let this = std::env::current_exe().context("cannot find this program's own file")?;
        let program = |given: Option<&Path>, name: &str, flag: &str| {
            let path = given.map_or_else(|| this.with_file_name(name), Path::to_owned);
            if path.is_file() {
                return Ok(path);
            }
            Err(anyhow!("there is no {}; build it, or give its path to {flag}", path.display())).or_usage()
        };
        let daemon = program(options.daemon.as_deref(), "sluiced", "--daemon")?;
        let trainer = program(options.trainer.as_deref(), "sluice-train", "--trainer")?;
        if !sources.join("ops/corpus/build").is_file() {
            let error = anyhow!(
                "{} holds no ops/corpus/build; run this in a checkout of Sluice, or give one to --sources",
                sources.display()
            );
            return Err(error).or_usage();
        }
        Ok(Self { sources: sources.to_owned(), daemon, trainer, stop })
    }

    /// Runs a script of the checkout; the last line it prints.
    pub fn script(&self, name: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = command(&self.sources.join(name));
        let output = command.args(arguments).stderr(Stdio::inherit()).output();
        let output = output.with_context(|| format!("cannot run {name}"))?;
        if !output.status.success() {
            bail!("{name} failed ({}); see its message above", output.status);
        }
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.trim_end().lines().last().unwrap_or_default().to_owned())
    }

    /// Runs a command of the trainer's, to its end.
    pub fn train(&self, arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<()> {
        self.run(command(&self.trainer).args(arguments).stdout(Stdio::null())).map(drop)
    }

    /// Runs a command of the daemon's, to its end.
    pub fn daemon(&self, arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<()> {
        self.run(command(&self.daemon).args(arguments).stdout(Stdio::null())).map(drop)
    }

    /// Scores a file of documents with a model in windows of so many tokens, `stride` apart, and writes what `sluiced model
    /// score` prints to another file; seconds of wall and of CPU time. CPU time is looked at every tenth of a second.
    pub fn score(
        &self,
        (model, library): (&Path, &str),
        (window, stride): (usize, usize),
        documents: &Path,
        to: &Path,
    ) -> anyhow::Result<(f64, f64)> {
        let partial = to.with_extension("partial");
        let file = std::fs::File::create(&partial)
            .with_context(|| format!("cannot create {}", partial.display()))?;
        let mut command = command(&self.daemon);
        command.args(["model", "score"]).arg(documents);
        command.env("ORT_DYLIB_PATH", library).env("SLUICED_MODEL_PATH", model);
        command.env("SLUICED_SCORE_WINDOW_TOKENS", window.to_string());
        command.env("SLUICED_SCORE_STRIDE_TOKENS", stride.to_string());
        let started = Instant::now();
        let cpu = self.run(command.stdout(file))?;
        let seconds = started.elapsed().as_secs_f64();
        std::fs::rename(&partial, to)
            .with_context(|| format!("cannot rename {} into place", partial.display()))?;
        Ok((seconds, cpu))
    }

    /// Runs a command to its end; seconds of CPU time, as they were last seen.
    fn run(&self, command: &mut Command) -> anyhow::Result<f64> {
        let mut child = Running::start(command.stdin(Stdio::null()))?;
        let mut cpu = 0.0;
        loop {
            let ended = child.0.try_wait().context("cannot wait for a program")?;
            // A run that was interrupted ends well, but it is not done.
            self.check()?;
            match ended {
                Some(status) if status.success() => return Ok(cpu),
                Some(status) => bail!("`{command:?}` failed ({status}); see its message above"),
                None => std::thread::sleep(POLL),
            }
            // One that has ended meanwhile has none any more.
            cpu = cpu_seconds(child.0.id()).map_or(cpu, |seconds| seconds.max(cpu));
        }
    }

    /// Fails once somebody has asked to stop.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(Interrupted.into()) } else { Ok(()) }
    }

    /// Starts a broker in memory with these topics (NAME:PARTITIONS); it ends with the value that comes with its address.
    pub fn broker(&self, topics: &[String]) -> anyhow::Result<(Running, String)> {
        let mut command = command(&self.daemon);
        command.args(["dev-broker", "--until-stdin-closes"]);
        for topic in topics {
            command.args(["--topic", topic]);
        }
        let mut broker = Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let output = broker.0.stdout.take().context("the broker's output is not to be had")?;
        let mut address = String::new();
        BufReader::new(output).read_line(&mut address).context("cannot read the broker's address")?;
        if address.trim().is_empty() {
            bail!("the broker in memory did not start; see its message above");
        }
        Ok((broker, address.trim().to_owned()))
    }

    /// Starts `sluiced serve`, its log in a file, and waits until it says where its metrics are.
    pub fn serve(
        &self,
        arguments: &[impl AsRef<OsStr>],
        library: &str,
        log: &Path,
    ) -> anyhow::Result<Server> {
        let file = std::fs::File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = command(&self.daemon);
        command.args(["serve", "--http-listen", "127.0.0.1:0"]).args(arguments);
        command.env("ORT_DYLIB_PATH", library).env("SLUICED_LOG_FORMAT", "json");
        let running = Running::start(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file))?;
        let mut server = Server { running, address: String::new(), log: log.to_owned() };
        let started = Instant::now();
        while started.elapsed() < START_MAX {
            self.check()?;
            let text = std::fs::read_to_string(log).unwrap_or_default();
            let mut lines =
                text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            if let Some(address) = lines.find_map(|line| Some(line["address"].as_str()?.to_owned())) {
                server.address = address;
                return Ok(server);
            }
            server.check()?;
            std::thread::sleep(POLL);
        }
        bail!("sluiced said no address within {} s; its log is {}", START_MAX.as_secs(), log.display())
    }
}

/// A program that is told what the plan says and nothing else: a setting that the caller has exported would change the runs,
/// and the results name a command without it.
fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    leave_out_settings(&mut command, std::env::vars_os().map(|(name, _)| name));
    command
}

/// Takes those of the caller's variables that are settings out of a command's environment.
fn leave_out_settings(command: &mut Command, names: impl Iterator<Item = OsString>) {
    for name in names {
        if SETTINGS.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            command.env_remove(name);
        }
    }
}

/// A program, killed with this value.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> anyhow::Result<Self> {
        let shown = command.get_program().to_owned();
        Ok(Self(command.spawn().with_context(|| format!("cannot run {}", Path::new(&shown).display()))?))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended cannot be killed, which is as well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A daemon that scores.
#[derive(Debug)]
pub struct Server {
    running: Running,
    address: String,
    log: PathBuf,
}

impl Server {
    /// Its process.
    pub fn id(&self) -> u32 {
        self.running.0.id()
    }

    /// Fails if it has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.running.0.try_wait().context("cannot wait for sluiced")? {
            Some(status) => bail!("sluiced ended ({status}); its log is {}", self.log.display()),
            None => Ok(()),
        }
    }

    /// The sum of the metrics whose names begin so.
    pub fn metric(&self, name: &str) -> anyhow::Result<u64> {
        let text = http_get(&self.address, "/metrics").with_context(|| {
            format!("cannot read the metrics of sluiced; its log is {}", self.log.display())
        })?;
        let values = text.lines().filter(|line| line.starts_with(name));
        Ok(values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64)
    }
}

fn http_get(address: &str, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("that was no answer in HTTP")?;
    Ok(body.to_owned())
}

#[cfg(test)]
mod tests {
    use std::ffi::{OsStr, OsString};
    use std::process::Command;

    use super::leave_out_settings;

    #[test]
    fn settings_of_the_caller_reach_no_program() {
        let exported = [
            "PATH",
            "ORT_DYLIB_PATH",
            "SLUICE_TRAIN_SCOPE",
            "SLUICE_TRAIN_WEIGHT_DECAY",
            "SLUICED_SCORE_STRIDE_TOKENS",
            "SLUICE_CACHE",
        ];
        let mut command = Command::new("sluiced");
        leave_out_settings(&mut command, exported.iter().map(OsString::from));
        // Set afterwards, as a program's own settings are.
        command.env("SLUICED_LOG_FORMAT", "json");
        let mut changed: Vec<(&OsStr, Option<&OsStr>)> = command.get_envs().collect();
        changed.sort_unstable();
        let expected = [
            ("SLUICED_LOG_FORMAT", Some("json")),
            ("SLUICED_SCORE_STRIDE_TOKENS", None),
            ("SLUICE_TRAIN_SCOPE", None),
            ("SLUICE_TRAIN_WEIGHT_DECAY", None),
        ];
        assert_eq!(changed, expected.map(|(name, value)| (OsStr::new(name), value.map(OsStr::new))));
    }
}
