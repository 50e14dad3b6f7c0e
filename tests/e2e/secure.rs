//! TLS and SASL towards a real Apache Kafka, with the build that is shipped.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sluice_tests::{Daemon, Kafka, Shape, binary, golden, onnxruntime, read_all};
use tempfile::TempDir;

struct Secure {
    kafka: Kafka,
    variables: BTreeMap<String, String>,
    folder: TempDir,
}

impl Secure {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kafka = Kafka::start_with(&folder.path().join("kafka"), Shape { brokers: 1, tls_sasl: true });
        let variables = kafka.variables();
        for (topic, partitions) in [("sluice.scored", 2), ("sluice.dead-letters", 1)] {
            kafka.create_topic(topic, partitions);
        }
        Self { kafka, variables, folder }
    }

    fn servers(&self) -> &str {
        &self.variables["SLUICE_KAFKA_SASL_BOOTSTRAP"]
    }

    /// Properties for a mechanism that takes a password.
    fn password_properties(&self, mechanism: &str, password_file: &Path) -> Vec<String> {
        vec![
            "security.protocol=SASL_SSL".to_owned(),
            format!("ssl.ca.location={}", self.variables["SLUICE_KAFKA_CA"]),
            format!("sasl.mechanism={mechanism}"),
            format!("sasl.username={}", self.variables["SLUICE_KAFKA_USER"]),
            format!("sasl.password.from_file={}", password_file.display()),
        ]
    }

    fn token_properties(&self) -> Vec<String> {
        vec![
            "security.protocol=SASL_SSL".to_owned(),
            format!("ssl.ca.location={}", self.variables["SLUICE_KAFKA_CA"]),
            "sasl.mechanism=OAUTHBEARER".to_owned(),
            format!("sasl.oauthbearer.config=file={}", self.token().display()),
        ]
    }

    /// A token that nobody has signed, which this broker takes.
    fn token(&self) -> PathBuf {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let claims = format!(r#"{{"sub":"sluice","iat":{now},"exp":{}}}"#, now + 3600);
        let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let path = self.folder.path().join("token");
        std::fs::write(&path, format!("{}.{}.", encode(r#"{"alg":"none"}"#), encode(&claims))).unwrap();
        path
    }

    fn sluiced(&self, words: &[&str], properties: &[String]) -> Output {
        let mut command = Command::new(binary("sluiced"));
        command.args(words).env("ORT_DYLIB_PATH", onnxruntime());
        command.env("SLUICED_KAFKA_BOOTSTRAP_SERVERS", self.servers());
        command.env("SLUICED_KAFKA_PROPERTIES", properties.join(","));
        command.output().unwrap()
    }

    fn ingest(&self, documents: usize, properties: &[String]) {
        let file = self.folder.path().join("text.jsonl");
        let lines: Vec<String> =
            (0..documents).map(|number| format!(r#"{{"text":"the number {number}"}}"#)).collect();
        std::fs::write(&file, lines.join("\n")).unwrap();
        let tokenizer = golden("tiny-llama/tokenizer.json");
        let words = ["ingest", "--tokenizer", tokenizer.to_str().unwrap(), file.to_str().unwrap()];
        succeeded(&self.sluiced(&words, properties));
    }

    fn serve(&self, documents: usize, properties: &[String]) {
        let joined = properties.join(",");
        let daemon =
            Daemon::start_with(self.servers(), &golden("tiny-llama"), &["--kafka-properties", &joined]);
        daemon.wait("all documents", |daemon| daemon.finished() >= documents);
        assert_eq!(daemon.stop().code(), Some(0));
    }
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_whole_line_runs_over_tls_with_each_mechanism() {
    let secure = Secure::start();
    let password_file = PathBuf::from(&secure.variables["SLUICE_KAFKA_PASSWORD_FILE"]);
    let scram = secure.password_properties("SCRAM-SHA-512", &password_file);
    succeeded(&secure.sluiced(
        &["topics", "create", "sluice.documents:2", "sluice.scored:2", "sluice.dead-letters:1"],
        &scram,
    ));
    let refused = secure.sluiced(&["topics", "create", "another:1"], &secure.token_properties());
    assert_eq!(refused.status.code(), Some(64), "the admin client has no tokens, and says so");
    let plain = secure.password_properties("PLAIN", &password_file);
    for (documents, properties) in [(5, scram.clone()), (6, plain), (7, secure.token_properties())] {
        let before = read_all(&secure.kafka.bootstrap_servers, "sluice.scored").len();
        secure.ingest(documents, &properties);
        secure.serve(documents, &properties);
        let after = read_all(&secure.kafka.bootstrap_servers, "sluice.scored").len();
        assert_eq!(after - before, documents);
    }

    let out = secure.folder.path().join("run");
    let mut train = Command::new(binary("sluice-train"));
    train.args([
        "run",
        "--bootstrap-servers",
        secure.servers(),
        "--until-end",
        "--steps",
        "1",
        "--objective",
        "clm",
    ]);
    train.args(["--hidden-size", "16", "--layers", "1", "--heads", "2", "--batch-size", "1"]);
    train.args(["--sequence-length", "16", "--tokenizer"]).arg(golden("tiny-llama/tokenizer.json"));
    train.arg("--out").arg(&out);
    train.args(scram.iter().flat_map(|property| ["--property", property]));
    succeeded(&train.output().unwrap());
}

/// A broker that is busy, or a listener of another protocol, is not "no broker".
#[test]
fn who_takes_connections_and_answers_nothing_is_said_to() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let model = golden("tiny-llama");
    let mut command = Command::new(binary("sluiced"));
    command.args([
        "validate",
        "--model-path",
        model.to_str().unwrap(),
        "--kafka-bootstrap-servers",
        &address,
    ]);
    let output = command.env("ORT_DYLIB_PATH", onnxruntime()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert!(said.contains("accepts connections at") && said.contains("security.protocol"), "{said}");
}

#[test]
fn what_the_broker_refuses_is_said_without_a_secret() {
    let secure = Secure::start();
    secure.kafka.create_topic("sluice.documents", 1);
    let wrong = secure.folder.path().join("wrong");
    std::fs::write(&wrong, "hunter2").unwrap();
    let model = golden("tiny-llama");
    let validate = ["validate", "--model-path", model.to_str().unwrap()];

    let refused = secure.sluiced(&validate, &secure.password_properties("SCRAM-SHA-512", &wrong));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(69), "{said}");
    assert!(said.contains("uthentication failed") && !said.contains("hunter2"), "{said}");

    let mut untrusted = secure.password_properties("SCRAM-SHA-512", &wrong);
    untrusted.retain(|property| !property.starts_with("ssl.ca.location"));
    let refused = secure.sluiced(&validate, &untrusted);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(69), "{said}");
    assert!(said.contains("certificate verify failed"), "{said}");

    let missing = secure.password_properties("PLAIN", &secure.folder.path().join("nowhere"));
    let refused = secure.sluiced(&validate, &missing);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(64), "{said}");
    assert!(said.contains("nowhere") && said.contains("cannot be read"), "{said}");

    // A secret in the environment shows neither in the help nor in a complaint.
    let direct = ["sasl.password=hunter2".to_owned(), "sasl.pasword=hunter2".to_owned()];
    for words in [&["serve", "--help"][..], &validate] {
        let output = secure.sluiced(words, &direct);
        for text in [output.stdout, output.stderr] {
            assert!(!String::from_utf8_lossy(&text).contains("hunter2"));
        }
    }
}
