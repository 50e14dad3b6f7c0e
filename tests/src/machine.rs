//! A systemd of the tests' own, with the unit that Sluice ships. Root, or sudo without a password, is needed.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::{binary, onnxruntime, root};

const PATIENCE: Duration = Duration::from_mins(1);
/// Daemons that can be started.
const INSTANCES: usize = 3;

/// A running systemd, which ends with this value.
pub struct Machine {
    process: Child,
    /// Its first process, as this machine counts.
    leader: u32,
}

impl Machine {
    /// Boots one, and installs in it what the Debian package would: the daemon, the unit, the user, the folders.
    pub fn with_sluiced() -> Self {
        let machine = Self::boot();
        machine.copy(&binary("sluiced"), "/usr/bin/sluiced");
        machine.copy(&onnxruntime(), "/usr/lib/sluice/libonnxruntime.so");
        let units = root().join("ops/systemd");
        for unit in ["sluiced@.service", "sluice-devices@.service"] {
            machine.copy(&units.join(unit), &format!("/usr/lib/systemd/system/{unit}"));
        }
        machine.copy(&units.join("sluice.sysusers.conf"), "/usr/lib/sysusers.d/sluice.conf");
        machine.copy(&units.join("sluice.tmpfiles.conf"), "/usr/lib/tmpfiles.d/sluice.conf");
        machine.run(&["systemd-sysusers", "sluice.conf"]);
        machine.run(&["systemd-tmpfiles", "--create", "sluice.conf"]);
        machine
    }

    fn boot() -> Self {
        let mut process = as_root()
            .arg(root().join("tests/systemd/machine"))
            .stdin(Stdio::piped())
            .spawn()
            .expect("tests/systemd/machine, or sudo");
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(process.try_wait().unwrap().is_none(), "a systemd needs root; see tests/systemd/machine");
            let booted = first_process_below(process.id()).map(Self::enter);
            if let Some(mut command) = booted {
                let state = command.args(["systemctl", "is-system-running"]).output().unwrap();
                if state.stdout.starts_with(b"running") {
                    break;
                }
            }
            assert!(Instant::now() < deadline, "waited a minute for systemd");
            std::thread::sleep(Duration::from_millis(50));
        }
        let leader = first_process_below(process.id()).unwrap();
        Self { process, leader }
    }

    fn enter(leader: u32) -> Command {
        let mut command = as_root();
        command.args(["nsenter", "--all", "--target"]).arg(leader.to_string());
        command
    }

    /// Runs a command in it, whatever comes of it.
    pub fn try_run(&self, command: &[&str]) -> Output {
        Self::enter(self.leader).args(command).output().unwrap()
    }

    /// Runs a command in it that must succeed; what it prints.
    pub fn run(&self, command: &[&str]) -> String {
        let output = self.try_run(command);
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?} failed: {message}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Writes a file in it.
    pub fn write(&self, path: &str, bytes: &[u8]) {
        let mut process = Self::enter(self.leader)
            .args(["install", "-D", "-m", "755", "/dev/stdin", path])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        process.stdin.take().unwrap().write_all(bytes).unwrap();
        assert!(process.wait().unwrap().success(), "cannot write {path}");
    }

    /// Copies a file of this machine into it.
    pub fn copy(&self, from: &Path, to: &str) {
        let bytes = std::fs::read(from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        self.write(to, &bytes);
    }

    /// What systemd says of a unit, such as `NRestarts`.
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.run(&["systemctl", "show", "--value", "--property", name, unit])
    }

    /// Waits until a unit's property has a value.
    pub fn wait_for(&self, unit: &str, name: &str, holds: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.property(unit, name);
            if holds(&value) {
                return value;
            }
            assert!(
                Instant::now() < deadline,
                "waited a minute for {name} of {unit}, which is {value}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a daemon has logged `text`.
    pub fn wait_for_log(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "waited a minute for {text:?} in\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the daemons have logged; [`Self::configure`] says where to.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&self.try_run(&["cat", LOG]).stdout).into_owned()
    }

    /// Configures `sluiced@0` to `@2` for the CPU, for a broker in memory and for `model`, with further lines of TOML and of
    /// its unit.
    pub fn configure(&self, bootstrap_servers: &str, model: &Path, settings: &str, unit: &str) {
        for file in ["model.onnx", "tokenizer.json", "config.json"] {
            self.copy(&model.join(file), &format!("/var/lib/sluice/models/tiny/{file}"));
        }
        let config = format!(
            "[kafka]\nbootstrap_servers = \"{bootstrap_servers}\"\ndelivery = \"at-least-once\"\n\
             [model]\npath = \"/var/lib/sluice/models/tiny\"\n{settings}\n"
        );
        self.write("/etc/sluice/sluiced.toml", config.as_bytes());
        let environment =
            "SLUICED_MODEL_DEVICE=cpu\nSLUICED_HTTP_LISTEN=127.0.0.1:0\nSLUICED_LOG_FORMAT=json\n";
        for instance in 0..INSTANCES {
            self.write(&format!("/etc/sluice/sluiced-{instance}.env"), environment.as_bytes());
        }
        let unit = format!("[Service]\nStandardError=append:{LOG}\nRestartSec=200ms\n{unit}\n");
        self.write("/etc/systemd/system/sluiced@.service.d/test.conf", unit.as_bytes());
        self.run(&["systemctl", "daemon-reload"]);
    }
}

const LOG: &str = "/run/sluiced.log";

impl Drop for Machine {
    fn drop(&mut self) {
        // Its standard input is what it lives by.
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

fn as_root() -> Command {
    let output = Command::new("id").arg("-u").output().unwrap();
    let mut command;
    if output.stdout == b"0\n" {
        // `env` only, so that both ways take the command as arguments.
        command = Command::new("env");
    } else {
        command = Command::new("sudo");
        command.arg("--non-interactive");
    }
    command
}

/// The systemd that was started by `process`, once there is one.
fn first_process_below(process: u32) -> Option<u32> {
    let mut id = process;
    // sudo, the script, unshare, unshare, systemd: no chain is longer.
    for _ in 0..8 {
        let name = std::fs::read_to_string(format!("/proc/{id}/comm")).ok()?;
        if name.trim() == "systemd" {
            return Some(id);
        }
        let children: PathBuf = format!("/proc/{id}/task/{id}/children").into();
        id = std::fs::read_to_string(children).ok()?.split_whitespace().next()?.parse().ok()?;
    }
    None
}
