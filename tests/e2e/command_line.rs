//! What a user meets when something is wrong, and ingestion through the real binary.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::TokenizedDocument;
use sluice_tests::{Broker, binary, golden, onnxruntime, read_all};

fn sluiced(arguments: &[&str]) -> Output {
    Command::new(binary("sluiced"))
        .args(arguments)
        .env("ORT_DYLIB_PATH", onnxruntime())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Runs a command that must fail with `code`, in words that contain every one of `words`.
fn fails(arguments: &[&str], code: i32, words: &[&str]) {
    let output = sluiced(arguments);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert!(!message.contains("panicked"), "{message}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn wrong_settings_exit_64_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sluiced.toml");
    std::fs::write(&file, "[kafka]\nbootstrap_servers = \"b:1\"\n\n[batch]\ntoken_max = 5\n").unwrap();
    let file = text(&file);
    fails(&["serve", "--config", file], 64, &["sluiced.toml", "line 5", "token_max", "tokens_max"]);
    fails(&["serve", "--config", "/does/not/exist.toml"], 64, &["/does/not/exist.toml"]);
    fails(&["serve"], 64, &["kafka.bootstrap_servers is not set", "model.path is not set"]);
    fails(&["serve", "--model-device", "tpu"], 64, &["`tpu` is no device", "cuda:N"]);
    fails(&["serve", "--kafka-properties", "enable.auto.commit=true"], 64, &["enable.auto.commit"]);
    fails(&["serve", "--no-such-flag"], 64, &["--no-such-flag"]);
    fails(&["serve", "--log-level", "shout"], 64, &["log.level: `shout`"]);
    let given = ["serve", "--kafka-bootstrap-servers", "127.0.0.1:9", "--model-path", "/no/model"];
    let with = |flags: &[&str], words: &[&str]| fails(&[&given[..], flags].concat(), 64, words);
    with(&["--batch-length-steps", "1000000000000"], &["batch.length_steps is 1000000000000"]);
    with(&["--model-threads", "100000"], &["model.threads is 100000; it may be at most 1024"]);
    with(
        &["--kafka-properties", "socket.timeout.ms=soon"],
        &["does not take the value", "`socket.timeout.ms`"],
    );
    // What shows only once a client is made, and would end `serve` later; what the daemon sets itself.
    for command in ["serve", "validate"] {
        let with = |property: &str, words: &[&str]| {
            let property = ["--kafka-properties", property];
            fails(&[&[command], &given[1..], &property].concat(), 64, words);
        };
        with("linger.ms=400000", &["do not go together", "`message.timeout.ms`", "`linger.ms`"]);
        with("session.timeout.ms=400000", &["do not go together", "`max.poll.interval.ms`"]);
        with("group.protocol=consumer", &["`group.protocol` cannot be set", "`classic`"]);
        with("partition.assignment.strategy=range", &["cannot be set", "`cooperative-sticky`"]);
        with("delivery.timeout.ms=1000", &["cannot be set", "transaction.timeout.ms"]);
    }
    with(&["--kafka-properties", "sasl.passwrd=hunter2"], &["librdkafka knows no property `sasl.passwrd`"]);
    let secret = sluiced(&[&given[..], &["--kafka-properties", "sasl.passwrd=hunter2"]].concat());
    assert!(!String::from_utf8_lossy(&secret.stderr).contains("hunter2"), "a secret is never printed");
}

#[test]
fn validate_says_what_is_missing() {
    let broker = Broker::start(&["sluice.documents:1"]);
    let model = golden("tiny-llama");
    let model = text(&model);
    let servers = broker.bootstrap_servers.as_str();
    let validate = |servers: &str, model: &str, code, words: &[&str]| {
        let delivery = ["--kafka-delivery", "at-least-once"];
        let arguments = ["validate", "--kafka-bootstrap-servers", servers, "--model-path", model];
        fails(&[&arguments[..], &delivery[..]].concat(), code, words);
    };
    validate(servers, "/no/such/model", 66, &["/no/such/model", "model.onnx"]);
    validate(servers, model, 69, &["`sluice.scored` does not exist", "sluiced topics create"]);
    validate("127.0.0.1:9", model, 69, &["no broker answers at 127.0.0.1:9"]);
    let library = ["--model-onnxruntime", "/no/such/libonnxruntime.so"];
    let arguments = ["validate", "--kafka-bootstrap-servers", servers, "--model-path", model];
    fails(
        &[&arguments[..], &library[..]].concat(),
        66,
        &["/no/such/libonnxruntime.so", "ops/setup-onnxruntime"],
    );

    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(golden("tiny-llama").join(file), folder.path().join(file)).unwrap();
    }
    let bytes = std::fs::read(golden("tiny-llama").join("model.onnx")).unwrap();
    std::fs::write(folder.path().join("model.onnx"), &bytes[..bytes.len() / 2]).unwrap();
    validate(servers, text(folder.path()), 65, &["model.onnx is not an ONNX file, or is cut short"]);
}

#[test]
fn a_context_of_one_token_is_refused_and_not_scored_wrongly() {
    let broker = Broker::with_sluice_topics();
    let folder = tempfile::tempdir().unwrap();
    for file in ["model.onnx", "tokenizer.json"] {
        std::fs::copy(golden("tiny-llama").join(file), folder.path().join(file)).unwrap();
    }
    let validate = |config: &str, words: &[&str], code| {
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let servers = broker.bootstrap_servers.as_str();
        let arguments =
            ["validate", "--kafka-bootstrap-servers", servers, "--model-path", text(folder.path())];
        fails(&arguments, code, words);
    };
    validate("{\"max_position_embeddings\":1}", &["a window of 1 tokens predicts nothing"], 64);
    validate("{\"max_position_embeddings\":0}", &["a window of 0 tokens predicts nothing"], 64);
    validate("{\"vocab_size\":0,\"max_position_embeddings\":64}", &["the vocabulary is empty"], 66);
    std::fs::write(folder.path().join("tokenizer.json"), "{garbage").unwrap();
    validate("{\"max_position_embeddings\":64}", &["tokenizer.json is no tokenizer"], 65);
}

#[test]
fn validate_passes_what_serve_would_take() {
    let broker = Broker::with_sluice_topics();
    let model = golden("tiny-llama-mask");
    let servers = broker.bootstrap_servers.as_str();
    let arguments = ["validate", "--kafka-bootstrap-servers", servers, "--model-path", text(&model)];
    fails(&arguments, 64, &["mock cluster", "at-least-once"]);
    let output = sluiced(&[&arguments[..], &["--kafka-delivery", "at-least-once"]].concat());
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for word in ["configuration: ok", "inputs: input_ids, position_ids", "topic sluice.scored: ok, 4"] {
        assert!(stdout.contains(word), "`{word}` is not in: {stdout}");
    }
}

#[test]
fn nothing_is_written_into_the_users_home() {
    let broker = Broker::with_sluice_topics();
    let (home, model) = (tempfile::tempdir().unwrap(), golden("tiny-llama"));
    let output = Command::new(binary("sluiced"))
        .args([
            "validate",
            "--kafka-bootstrap-servers",
            &broker.bootstrap_servers,
            "--model-path",
            text(&model),
        ])
        .args(["--kafka-delivery", "at-least-once"])
        .env("ORT_DYLIB_PATH", onnxruntime())
        .env("HOME", home.path())
        .env_remove("XDG_CACHE_HOME")
        .env_remove("ORT_DISABLE_TELEMETRY")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "ONNX Runtime's telemetry is off");
}

#[test]
fn no_gpu_is_an_error_and_not_a_silent_cpu() {
    let broker = Broker::with_sluice_topics();
    let model = golden("tiny-llama");
    let servers = ["--kafka-bootstrap-servers", &broker.bootstrap_servers];
    let arguments =
        [&["validate", "--model-path", text(&model), "--model-device", "cuda:0"][..], &servers[..]].concat();
    fails(&arguments, 66, &["cannot use cuda:0", "--cuda"]);
}

fn documents(broker: &Broker, topic: &str) -> Vec<TokenizedDocument> {
    let mut documents: Vec<_> = read_all(&broker.bootstrap_servers, topic)
        .into_iter()
        .map(|record| TokenizedDocument::decode(record.payload.unwrap()).unwrap())
        .collect();
    documents.sort_by(|a, b| a.id.cmp(&b.id));
    documents
}

const LINES: &str = "{\"id\":\"a\",\"text\":\"the first\",\"source\":\"web\"}\n{\"text\":\"the second\"}\n";

#[test]
fn ingestion_gives_the_same_records_from_files_and_standard_input_again_and_again() {
    let broker = Broker::start(&["one:1", "two:1", "three:1"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lines.jsonl");
    std::fs::write(&file, LINES).unwrap();
    let tokenizer = golden("tiny-llama").join("tokenizer.json");
    let ingest = |topic: &str, file: &str| {
        let flags = ["ingest", "--bootstrap-servers", &broker.bootstrap_servers, "--topic", topic];
        let mut child = Command::new(binary("sluiced"))
            .args(flags)
            .args(["--tokenizer", text(&tokenizer), "--source", "default", file])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(LINES.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    };
    ingest("one", text(&file));
    ingest("two", text(&file));
    let first = documents(&broker, "one");
    assert_eq!(first, documents(&broker, "two"), "ids are stable over re-runs");
    // Sorted by id, and the path of a temporary file comes before a letter.
    assert_eq!((first[1].id.as_str(), first[1].source.as_str()), ("a", "web"));
    assert_eq!((first[0].id.clone(), first[0].source.as_str()), (format!("{}:2", file.display()), "default"));
    let fingerprint = Fingerprint::of_bytes(&std::fs::read(&tokenizer).unwrap());
    assert!(first.iter().all(|document| document.tokenizer == fingerprint));

    ingest("three", "-");
    let piped = documents(&broker, "three");
    assert_eq!(piped[1].id, "stdin:2");
    assert_eq!(piped[1].tokens, first[0].tokens);
}

#[test]
fn documents_begin_and_end_with_the_tokens_that_were_asked_for() {
    let broker = Broker::start(&["plain:1", "bounded:1"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lines.jsonl");
    std::fs::write(&file, LINES).unwrap();
    let tokenizer = golden("tiny-llama").join("tokenizer.json");
    let base = ["ingest", "--bootstrap-servers", &broker.bootstrap_servers, "--tokenizer", text(&tokenizer)];
    let ingest = |flags: &[&str]| {
        let ended = Command::new(binary("sluiced")).args(base).args(flags).arg(&file).status().unwrap();
        assert!(ended.success());
    };
    ingest(&["--topic", "plain"]);
    ingest(&["--topic", "bounded", "--begin-with", "the", "--end-with", "<|endoftext|>"]);
    let (plain, bounded) = (documents(&broker, "plain"), documents(&broker, "bounded"));
    let known = sluice_text::TextTokenizer::read(&tokenizer).unwrap();
    let begin = known.token_id("the").unwrap();
    assert_eq!(known.token_id("<|endoftext|>"), Some(0));
    assert_eq!((plain.len(), bounded.len()), (2, 2));
    for (plain, bounded) in plain.iter().zip(&bounded) {
        let expected = [&[begin], &*plain.tokens.to_vec(), &[0]].concat();
        assert_eq!((&plain.id, bounded.tokens.to_vec()), (&bounded.id, expected));
    }
    for flag in ["--begin-with", "--end-with"] {
        let asked = ["--topic", "plain", flag, "<nobody>", text(&file)];
        fails(&[&base[..], &asked].concat(), 64, &["knows no token \"<nobody>\"", flag]);
    }
}

#[test]
fn bad_lines_are_counted_and_the_good_ones_go_in() {
    let broker = Broker::start(&["documents:1"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lines.jsonl");
    std::fs::write(&file, format!("{LINES}oops\n{{\"text\":\"the last\"}}\n")).unwrap();
    let tokenizer = golden("tiny-llama").join("tokenizer.json");
    let base =
        ["ingest", "--bootstrap-servers", &broker.bootstrap_servers, "--topic", "documents", "--tokenizer"];
    let with = |tokenizer: &str, file: &str, code, words: &[&str]| {
        fails(&[&base[..], &[tokenizer, file]].concat(), code, words);
    };
    with(text(&tokenizer), text(&file), 65, &["lines.jsonl:3", "1 lines or files hold no document"]);
    assert_eq!(documents(&broker, "documents").len(), 3);
    let large = folder.path().join("large.jsonl");
    let words = "the sea ".repeat(500_000);
    std::fs::write(&large, format!("{{\"text\":\"{words}\"}}\n{{\"text\":\"after\"}}\n")).unwrap();
    with(text(&tokenizer), text(&large), 65, &["larger than --record-bytes-max"]);
    assert_eq!(documents(&broker, "documents").len(), 4, "what follows a document that is too large goes in");
    with(text(&tokenizer), text(folder.path()), 66, &["is a folder"]);
    with("/no/tokenizer.json", text(&file), 66, &["/no/tokenizer.json"]);
    with(text(&file), text(&file), 65, &["lines.jsonl is no tokenizer.json"]);
    with(text(&tokenizer), "/no/lines.jsonl", 66, &["/no/lines.jsonl does not exist"]);
}
