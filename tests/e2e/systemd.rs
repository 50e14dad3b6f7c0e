//! The unit under a real systemd: how the daemon starts, and how each way of going wrong ends.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{TokenIds, TokenizedDocument};
use sluice_tests::oracle::{Options, Traffic};
use sluice_tests::{Broker, Cluster, Machine, TRAP, golden, produce, read_all, root, write_hanging_model};

const UNIT: &str = "sluiced@0";

fn send(broker: &Broker, id: &str, tokens: &[u32]) {
    let tokenizer = std::fs::read(golden("tiny-llama/tokenizer.json")).unwrap();
    let document = TokenizedDocument {
        id: id.to_owned(),
        tokens: TokenIds::new(tokens),
        tokenizer: Fingerprint::of_bytes(&tokenizer),
        source: String::new(),
        attributes: BTreeMap::new(),
    };
    produce(&broker.bootstrap_servers, "sluice.documents", &[(id, Some(document.encode()))]);
}

fn wait_for_scored(broker: &Broker, count: usize) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while read_all(&broker.bootstrap_servers, "sluice.scored").len() < count {
        assert!(Instant::now() < deadline, "waited a minute for {count} scored documents");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn the_unit_is_hardened() {
    let output = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--threshold=20", "--no-pager"])
        .arg(root().join("ops/systemd/sluiced@.service"))
        .output()
        .expect("systemd-analyze, which Debian has in the package systemd");
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "the exposure is above 2.0:\n{table}");
    assert!(table.contains("Overall exposure level"), "{table}");
}

#[test]
fn a_start_is_over_when_work_can_be_taken_and_a_killed_daemon_comes_back() {
    let broker = Broker::with_sluice_topics();
    let machine = Machine::with_sluiced();
    // So that the group soon notices that the killed daemon is gone.
    let settings = "[kafka.properties]\n\"session.timeout.ms\" = \"6000\"";
    // A setting that root alone can read comes to the daemon as a credential.
    let credential = "Environment=SLUICED_KAFKA_PROPERTIES=client.id.from_file=%d/kafka_name";
    machine.configure(&broker.bootstrap_servers, &golden("tiny-llama"), settings, credential);
    machine.write("/etc/sluice/credentials/name", b"sluiced");
    machine.run(&["chmod", "600", "/etc/sluice/credentials/name"]);
    machine.run(&["systemctl", "start", UNIT]);
    // Asked once: a start that is over before there is a partition lets a rolling restart go on too soon.
    let status = machine.property(UNIT, "StatusText");
    assert!(status.starts_with("scoring 4 partitions"), "{status}");
    assert_eq!(machine.property(UNIT, "ActiveState"), "active");
    assert!(status.contains("records behind"), "{status}");
    send(&broker, "first", &[1, 2, 3]);
    wait_for_scored(&broker, 1);

    let first = machine.property(UNIT, "MainPID");
    let owner = machine.run(&["stat", "--format", "%U", &format!("/proc/{first}")]);
    assert_eq!(owner, "sluice");
    let process = machine.run(&["cat", &format!("/proc/{first}/status")]);
    assert!(process.contains("CapEff:\t0000000000000000") && process.contains("NoNewPrivs:\t1"), "{process}");

    machine.run(&["kill", "-KILL", &first]);
    machine.wait_for(UNIT, "NRestarts", |restarts| restarts == "1");
    machine.wait_for(UNIT, "ActiveState", |state| state == "active");
    assert_ne!(machine.property(UNIT, "MainPID"), first);
    send(&broker, "second", &[1, 2, 3]);
    wait_for_scored(&broker, 2);

    machine.run(&["systemctl", "reload", UNIT]);
    machine.wait_for_log("configuration reloaded");
    machine.wait_for(UNIT, "ActiveState", |state| state == "active");

    machine.run(&["systemctl", "stop", UNIT]);
    assert_eq!(machine.property(UNIT, "ActiveState"), "inactive", "{}", machine.log());
    assert_eq!(machine.property(UNIT, "Result"), "success");
    assert_eq!(machine.property(UNIT, "ExecMainStatus"), "0");
}

#[test]
fn bad_settings_end_with_64_and_are_not_tried_again() {
    let broker = Broker::with_sluice_topics();
    let machine = Machine::with_sluiced();
    let settings = "[limits]\npublish_tokens = 0";
    machine.configure(&broker.bootstrap_servers, &golden("tiny-llama"), settings, "");
    assert!(!machine.try_run(&["systemctl", "start", UNIT]).status.success());
    assert_eq!(machine.property(UNIT, "ActiveState"), "failed");
    // Five times as long as it takes to start again.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(machine.property(UNIT, "ActiveState"), "failed");
    assert_eq!(machine.property(UNIT, "NRestarts"), "0");
    assert!(machine.log().contains("limits.publish_tokens must be at least 1"), "{}", machine.log());
}

#[test]
fn a_daemon_that_another_of_its_name_throws_out_ends_with_78_and_stays_away() {
    let cluster = Cluster::with_topics(2);
    let machine = Machine::with_sluiced();
    let delivery = "Environment=SLUICED_KAFKA_DELIVERY=exactly-once";
    machine.configure(cluster.servers(), &golden("tiny-llama"), "", delivery);
    machine.run(&["systemctl", "start", UNIT]);
    cluster.send(0..10, 20);
    cluster.wait_scored(10);
    // The name that the unit makes of its host and its instance.
    let other = cluster.daemon(&["--kafka-instance", "sluice-test-0"]);
    other.wait("a share of the partitions", |daemon| daemon.metric("sluiced_assigned_partitions") == 1);
    cluster.send(10..40, 20);
    machine.wait_for(UNIT, "ActiveState", |state| state == "failed");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(machine.property(UNIT, "ExecMainStatus"), "78", "{}", machine.log());
    assert_eq!(machine.property(UNIT, "NRestarts"), "0");
    assert!(machine.log().contains("give every daemon its own kafka.instance"), "{}", machine.log());
    cluster.wait_scored(40);
    assert_eq!(other.stop().code(), Some(0));
    cluster.assert_each_once(40);
}

/// As an upgrade does it: one unit after the other, with nothing but systemd's word that each is ready again. Nothing is lost
/// or doubled, and no partition stands still for as long as one of a daemon that was killed does.
#[test]
fn three_daemons_are_restarted_one_after_the_other_under_load() {
    const ROUNDS: usize = 2;
    const UNITS: [&str; 3] = ["sluiced@0", "sluiced@1", "sluiced@2"];
    /// The daemon's default, after which one that was killed is missed.
    const SESSION: Duration = Duration::from_secs(15);
    let cluster = Cluster::start(1);
    let machine = Machine::with_sluiced();
    let traffic = Traffic::start(&cluster.kafka, &golden("tiny-llama"), &Options::of(31, 0));
    let variables: Vec<String> = traffic
        .variables()
        .iter()
        .map(|(name, value)| format!("Environment=SLUICED_KAFKA_{name}={value}"))
        .collect();
    machine.configure(cluster.servers(), &golden("tiny-llama"), "", &variables.join("\n"));
    for unit in UNITS {
        machine.run(&["systemctl", "start", unit]);
    }
    // Nothing was to be expected before there was a daemon.
    traffic.watch.set_well(true);
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        for unit in UNITS {
            machine.run(&["systemctl", "restart", unit]);
        }
    }
    let restarts = begun.elapsed();
    let findings = traffic.finish(&cluster.kafka, &golden("tiny-llama"));
    eprintln!("{} restarts in {:.0} s; {findings}", ROUNDS * UNITS.len(), restarts.as_secs_f64());
    for (stall, _) in &findings.stalls {
        eprintln!("stood still for at most {stall}");
    }
    for unit in UNITS {
        machine.run(&["systemctl", "stop", unit]);
        assert_eq!(machine.property(unit, "Result"), "success", "{}", machine.log());
        assert_eq!(machine.property(unit, "NRestarts"), "0", "{}", machine.log());
    }
    assert!(findings.is_clean() && findings.obligations > 100, "{findings:#?}");
    assert!(findings.stalls.iter().all(|(stall, _)| stall.length < SESSION), "{:?}", findings.stalls);
}

#[test]
fn a_missing_broker_is_waited_for() {
    let machine = Machine::with_sluiced();
    // Nobody listens on the port of the discard protocol.
    machine.configure("127.0.0.1:9", &golden("tiny-llama"), "", "");
    machine.try_run(&["systemctl", "start", "--no-block", UNIT]);
    machine.wait_for(UNIT, "ExecMainStatus", |status| status == "69");
    machine.wait_for(UNIT, "NRestarts", |restarts| restarts != "0");
}

#[test]
fn a_scorer_that_hangs_is_killed_by_the_watchdog() {
    let broker = Broker::with_sluice_topics();
    let machine = Machine::with_sluiced();
    let model = tempfile::tempdir().unwrap();
    write_hanging_model(model.path());
    machine.configure(&broker.bootstrap_servers, model.path(), "", "WatchdogSec=3s");
    machine.run(&["systemctl", "start", UNIT]);
    // While all is well, the watchdog is content.
    send(&broker, "well", &[1, 2, 3]);
    wait_for_scored(&broker, 1);
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(machine.property(UNIT, "NRestarts"), "0", "{}", machine.log());
    send(&broker, "hangs", &[1, TRAP, 3]);
    machine.wait_for(UNIT, "Result", |result| result == "watchdog");
    machine.wait_for(UNIT, "NRestarts", |restarts| restarts != "0");
}

#[test]
fn a_drain_that_never_ends_is_given_up_in_time() {
    let broker = Broker::with_sluice_topics();
    let machine = Machine::with_sluiced();
    let model = tempfile::tempdir().unwrap();
    write_hanging_model(model.path());
    let settings = "[limits]\ndrain_seconds = 1";
    machine.configure(&broker.bootstrap_servers, model.path(), settings, "");
    machine.run(&["systemctl", "start", UNIT]);
    send(&broker, "hangs", &[1, TRAP, 3]);
    machine.wait_for(UNIT, "StatusText", |status| {
        status.contains("tokens in flight") && !status.contains(" 0 tokens in flight")
    });
    machine.run(&["systemctl", "stop", UNIT]);
    // It ended itself, before systemd would have killed it, and is not started again.
    assert_eq!(machine.property(UNIT, "Result"), "exit-code", "{}", machine.log());
    assert_eq!(machine.property(UNIT, "ExecMainStatus"), "1");
    assert_eq!(machine.property(UNIT, "ActiveState"), "failed");
    assert!(read_all(&broker.bootstrap_servers, "sluice.scored").is_empty());
}
