//! A wrong model turns documents into dead letters, not many of them, and they come back once it is gone.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::{Command, Stdio};

use bytes::Bytes;
use sluice_tests::{Cluster, Daemon, Proxy, Request, binary, golden, produce, read_all};

const DOCUMENTS: usize = 40;
const DEAD_LETTERS: &str = "sluice.dead-letters";

/// The golden model with another tokenizer's file.
fn write_foreign_model(folder: &Path) {
    for file in ["model.onnx", "config.json", "tokenizer.json"] {
        std::fs::copy(golden("tiny-llama").join(file), folder.join(file)).unwrap();
    }
    let tokenizer = std::fs::read_to_string(folder.join("tokenizer.json")).unwrap();
    std::fs::write(folder.join("tokenizer.json"), tokenizer + "\n").unwrap();
}

fn replay_command(cluster: &Cluster, reason: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(binary("sluiced"));
    command
        .args(["dead-letters", "replay", "--bootstrap-servers", cluster.servers(), "--reason", reason])
        .args(flags);
    command
}

/// What `sluiced dead-letters replay` prints.
fn replay(cluster: &Cluster, reason: &str, flags: &[&str]) -> String {
    let output = replay_command(cluster, reason, flags).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn dead_letters_come_back_once_when_their_reason_is_gone() {
    let cluster = Cluster::with_topics(2);
    let folder = tempfile::tempdir().unwrap();
    write_foreign_model(folder.path());
    produce(cluster.servers(), "sluice.documents", &[("broken", Some(Bytes::from_static(b"no document")))]);
    cluster.send(0..DOCUMENTS, 20);
    let wrong = Daemon::start_with(cluster.servers(), folder.path(), &[]);
    wrong.wait("dead letters", |daemon| daemon.finished() > DOCUMENTS);
    assert_eq!(wrong.stop().code(), Some(0));

    let dry = replay(&cluster, "foreign_tokenizer", &["--dry-run"]);
    let counted =
        format!("{DOCUMENTS} dead letters of reason foreign_tokenizer would come back to sluice.documents\n");
    assert_eq!(dry, counted.clone() + "1 of reason malformed stay\n");
    // Whoever reads the counts may have seen enough before they come; a disk that is full is an error.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    for (output, code, words) in
        [(Stdio::from(writer), 0, ""), (Stdio::from(full), 1, "cannot write to standard output")]
    {
        let mut command = replay_command(&cluster, "foreign_tokenizer", &["--dry-run"]);
        let output = command.stdout(output).stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(words) && !said.contains("panicked"), "{said}");
    }
    let right = cluster.daemon(&[]);
    let back = replay(&cluster, "foreign_tokenizer", &[]);
    assert_eq!(back, counted.replace("would come back", "came back") + "1 of reason malformed stay\n");
    cluster.wait_scored(DOCUMENTS);
    let again = replay(&cluster, "foreign_tokenizer", &[]);
    assert!(again.starts_with("0 dead letters of reason foreign_tokenizer came back"), "{again}");

    // A topic that was emptied by deleting it holds other letters, at offsets that were read before.
    assert_eq!(right.stop().code(), Some(0));
    cluster.kafka.delete_topic(DEAD_LETTERS);
    cluster.kafka.create_topic(DEAD_LETTERS, 1);
    cluster.send(DOCUMENTS..DOCUMENTS + 5, 20);
    let wrong = Daemon::start_with(cluster.servers(), folder.path(), &[]);
    wrong.wait("dead letters", |daemon| daemon.finished() == 5);
    assert_eq!(wrong.stop().code(), Some(0));
    let right = cluster.daemon(&[]);
    assert!(replay(&cluster, "foreign_tokenizer", &[]).starts_with("5 dead letters"));
    cluster.wait_scored(DOCUMENTS + 5);
    assert_eq!(right.stop().code(), Some(0));
    cluster.assert_each_once(DOCUMENTS + 5);
}

/// `sluiced dead-letters replay` that is killed while its commit is on the way to the brokers, or was never sent; what
/// becomes of the commit then is decided by `late`, and after another replay by `later`.
fn a_replay_that_is_killed(late: impl Fn(&Proxy), later: impl Fn(&Proxy), comes_back: usize) {
    const REASON: &str = "foreign_tokenizer";
    let cluster = Cluster::with_topics(2);
    let folder = tempfile::tempdir().unwrap();
    write_foreign_model(folder.path());
    cluster.send(0..DOCUMENTS, 20);
    let wrong = Daemon::start_with(cluster.servers(), folder.path(), &[]);
    wrong.wait("dead letters", |daemon| daemon.finished() >= DOCUMENTS);
    assert_eq!(wrong.stop().code(), Some(0));

    let proxy = Proxy::start(cluster.servers());
    proxy.hold(Request::EndTxn);
    let mut killed = Command::new(binary("sluiced"))
        .args(["dead-letters", "replay", "--bootstrap-servers", &proxy.bootstrap_servers, "--reason", REASON])
        .spawn()
        .unwrap();
    proxy.wait_held(Request::EndTxn);
    killed.kill().unwrap();
    killed.wait().unwrap();
    proxy.let_pass(Request::EndTxn);
    late(&proxy);
    let again = replay(&cluster, REASON, &[]);
    assert!(again.starts_with(&format!("{comes_back} dead letters")), "{again}");
    later(&proxy);
    let nothing = replay(&cluster, REASON, &[]);
    assert!(nothing.starts_with("0 dead letters"), "{nothing}");
    let right = cluster.daemon(&[]);
    cluster.wait_scored(DOCUMENTS);
    assert_eq!(right.stop().code(), Some(0));
    cluster.assert_each_once(DOCUMENTS);
}

#[test]
fn dead_letters_come_back_once_when_the_replay_is_killed_before_its_commit() {
    a_replay_that_is_killed(|_| {}, |_| {}, DOCUMENTS);
}

#[test]
fn dead_letters_come_back_once_when_the_commit_of_a_killed_replay_arrives_after_its_end() {
    a_replay_that_is_killed(|proxy| proxy.release(Request::EndTxn), |_| {}, 0);
}

#[test]
fn dead_letters_come_back_once_when_the_commit_of_a_killed_replay_arrives_after_the_next() {
    a_replay_that_is_killed(|_| {}, |proxy| proxy.release(Request::EndTxn), DOCUMENTS);
}

#[test]
fn a_daemon_that_fails_on_most_records_ends_before_it_commits_them() {
    const LOOKED_AT: usize = 20;
    let cluster = Cluster::with_topics(2);
    let folder = tempfile::tempdir().unwrap();
    write_foreign_model(folder.path());
    cluster.send(0..DOCUMENTS, 20);
    let records = LOOKED_AT.to_string();
    let mut wrong = Daemon::start_with(
        cluster.servers(),
        folder.path(),
        &["--limits-failing-records", &records, "--limits-failing-percent", "50"],
    );
    wrong.wait_for_end(65);
    assert!(wrong.log().contains("foreign_tokenizer"), "{}", wrong.log());
    let lost = read_all(cluster.servers(), DEAD_LETTERS).len();
    assert!(lost <= LOOKED_AT / 2, "{lost} were committed");

    let right = cluster.daemon(&[]);
    assert!(replay(&cluster, "foreign_tokenizer", &[]).starts_with(&format!("{lost} dead letters")));
    cluster.wait_scored(DOCUMENTS);
    assert_eq!(right.stop().code(), Some(0));
    cluster.assert_each_once(DOCUMENTS);
}
