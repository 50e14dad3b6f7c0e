//! Input as people and their tools make it, through the real binary: what is read, and what is refused by name.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use prost::Message as _;
use serde_json::{Value, json};
use sluice_schemas::onnx::ModelProto;
use sluice_schemas::record::TokenizedDocument;
use sluice_tests::{Broker, binary, golden, onnxruntime, read_all};
use tempfile::TempDir;

fn sluiced(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("sluiced"));
    command.args(arguments).env("ORT_DYLIB_PATH", onnxruntime()).stdin(Stdio::null());
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The summary of `sluiced model score` with tiny-llama.
fn summary(file: &Path) -> Value {
    let model = golden("tiny-llama");
    let arguments = ["model", "score", "--summary", "--model-path", text(&model), text(file)];
    let output = sluiced(&arguments).output().unwrap();
    assert!(output.status.success(), "{}: {}", file.display(), stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn model_copy() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["model.onnx", "config.json", "tokenizer.json"] {
        std::fs::copy(golden("tiny-llama").join(file), folder.path().join(file)).unwrap();
    }
    folder
}

const LINES: &str =
    "{\"id\":\"a\",\"text\":\"In the year 2889\"}\n{\"id\":\"b\",\"text\":\"little\",\"score\":NaN}\n";

#[test]
fn json_lines_are_read_whatever_they_are_packed_in_and_called() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let plain = write("plain.jsonl", LINES.as_bytes());
    let expected = summary(&plain);
    assert_eq!(expected["documents"], 2);

    let zstd = zstd::encode_all(LINES.as_bytes(), 3).unwrap();
    // As pzstd begins its files.
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 9, 9, 9, 9][..], &zstd].concat();
    // As `zstd --long=31` makes it of a pipe, whose length it does not know.
    let mut long = zstd::Encoder::new(Vec::new(), 3).unwrap();
    long.window_log(31).unwrap();
    long.write_all(LINES.as_bytes()).unwrap();
    let halves = LINES.split_inclusive('\n').map(|line| {
        let mut member = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        member.write_all(line.as_bytes()).unwrap();
        member.finish().unwrap()
    });
    let members = halves.collect::<Vec<_>>().concat();
    for (name, bytes) in [
        ("upper.JSONL", LINES.as_bytes()),
        ("none", LINES.as_bytes()),
        ("marked.txt", format!("\u{feff}{LINES}").as_bytes()),
        ("x.jsonl.zstd", &zstd),
        ("x.jsonl.gzip", &members),
        ("pzstd.jsonl.zst", &skippable),
        ("long.jsonl.zst", &long.finish().unwrap()),
    ] {
        assert_eq!(summary(&write(name, bytes)), expected, "{name}");
    }
    let link = folder.path().join("blob");
    std::os::unix::fs::symlink(&plain, &link).unwrap();
    assert_eq!(summary(&link), expected);

    // A pipe by the name of its descriptor, as a shell's `<(...)`.
    let model = golden("tiny-llama");
    let mut child = sluiced(&["model", "score", "--summary", "--model-path", text(&model), "/dev/fd/0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&zstd).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), expected);
}

#[test]
fn a_byte_order_mark_is_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let (marked, plain) = (folder.path().join("marked.txt"), folder.path().join("plain.txt"));
    std::fs::write(&marked, "\u{feff}In the year 2889").unwrap();
    std::fs::write(&plain, "In the year 2889").unwrap();
    assert_eq!(summary(&marked), summary(&plain));
}

/// The lines on standard output, and what was said, of a command that must find some documents bad.
fn scored_with_bad(model: &Path, lines: &str, flags: &[&str]) -> (Vec<Value>, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.jsonl");
    std::fs::write(&file, lines).unwrap();
    let arguments = [&["model", "score", "--model-path", text(model), text(&file)][..], flags].concat();
    let output = sluiced(&arguments).output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(65), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    let lines = String::from_utf8(output.stdout).unwrap();
    (lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), said)
}

#[test]
fn a_token_that_the_model_does_not_know_spoils_its_own_document_alone() {
    let folder = model_copy();
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let added = json!({
        "id": 512, "content": "<think>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": false
    });
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let lines = "{\"id\":\"a\",\"text\":\"one\"}\n{\"id\":\"b\",\"text\":\"<think> two\"}\n{\"id\":\"c\",\"text\":\"three\"}\n";
    let (scored, said) = scored_with_bad(folder.path(), lines, &[]);
    assert_eq!(scored.iter().map(|line| &line["id"]).collect::<Vec<_>>(), ["a", "c"]);
    assert!(
        said.contains("b: the tokenizer gives the token id 512") && said.contains("1 documents"),
        "{said}"
    );
}

#[test]
fn losses_that_are_not_finite_are_no_scores() {
    // NaN in the embedding of the token 80, which is "p".
    let folder = model_copy();
    let path = folder.path().join("model.onnx");
    let mut model = ModelProto::decode(std::fs::read(&path).unwrap().as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let embedding = graph.initializer.iter_mut().find(|tensor| tensor.dims.first() == Some(&512)).unwrap();
    let width = embedding.dims[1] as usize * 4;
    let mut raw = embedding.raw_data.take().unwrap().to_vec();
    raw[80 * width..81 * width].copy_from_slice(&f32::NAN.to_le_bytes().repeat(width / 4));
    embedding.raw_data = Some(raw.into());
    std::fs::write(&path, model.encode_to_vec()).unwrap();

    let lines = "{\"id\":\"a\",\"text\":\"In the year 2889\"}\n{\"id\":\"b\",\"text\":\"xpx\"}\n";
    for flags in [&[][..], &["--score-bos", "document"]] {
        let (scored, said) = scored_with_bad(folder.path(), lines, flags);
        assert_eq!(scored.len(), 1, "{said}");
        assert!(said.contains("b: the loss at position") && said.contains("NaN"), "{said}");
    }
    let (total, _) = scored_with_bad(folder.path(), lines, &["--summary"]);
    assert_eq!(total[0]["documents"], 1);
    assert_eq!(total[0]["tokens"].as_u64(), total[0]["predicted_tokens"].as_u64().map(|tokens| tokens + 1));
}

#[test]
fn a_config_as_python_writes_it_is_read() {
    let folder = model_copy();
    let path = folder.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let opened = config.trim_start().strip_prefix('{').unwrap();
    std::fs::write(&path, format!("\u{feff}{{\"time_step_limit\": [0.0, Infinity], \"x\": NaN, {opened}"))
        .unwrap();
    let inspect = || sluiced(&["model", "inspect", "--json", text(folder.path())]).output().unwrap();
    let output = inspect();
    assert!(output.status.success(), "{}", stderr(&output));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&found["vocabulary"], &found["context"]), (&512.into(), &64.into()));
    // A number that is asked for is refused by its name, and not taken for one that is not set.
    for (config, words) in [
        (
            r#"{"vocab_size": 512, "max_position_embeddings": Infinity}"#,
            "`max_position_embeddings`: invalid type: string \"Infinity\"",
        ),
        (r#"{"vocab_size": -1, "max_position_embeddings": 64}"#, "`vocab_size`: invalid value: integer `-1`"),
        ("[]", "it holds no JSON object"),
        ("null", "it holds no JSON object"),
    ] {
        std::fs::write(&path, config).unwrap();
        let output = inspect();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(65), "{config}: {said}");
        assert!(said.contains(&format!("config.json: {words}")), "{config}: {said}");
    }
}

#[test]
fn a_document_that_fits_no_record_costs_little_memory() {
    let broker = Broker::start(&["documents:1"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("giant.jsonl");
    let mut lines = File::create(&file).unwrap();
    // A text of more tokens than fit, one that is too long by itself, and a line of which nobody knows what it holds.
    for words in [1_900_000, 20_000_000, 60_000_000] {
        writeln!(lines, "{{\"id\":\"giant-{words}\",\"text\":\"{}\"}}", "z ".repeat(words)).unwrap();
    }
    writeln!(lines, "{{\"id\":\"after\",\"text\":\"little\"}}").unwrap();
    let tokenizer = golden("tiny-llama").join("tokenizer.json");
    // The address space, of which libraries and threads take a good part without using it; the text alone took 18 GB.
    let limited = "ulimit -v 3000000; exec \"$0\" \"$@\"";
    let output = Command::new("bash")
        .args(["-c", limited, text(&binary("sluiced")), "ingest", "--topic", "documents"])
        .args([
            "--bootstrap-servers",
            &broker.bootstrap_servers,
            "--tokenizer",
            text(&tokenizer),
            text(&file),
        ])
        .output()
        .unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(65), "{said}");
    for words in
        ["larger than --record-bytes-max", "giant.jsonl:2: the text has more", "giant.jsonl:3: the line has"]
    {
        assert!(said.contains(words), "{words} in {said}");
    }
    let records = read_all(&broker.bootstrap_servers, "documents");
    let ids: Vec<String> = records
        .into_iter()
        .map(|record| TokenizedDocument::decode(record.payload.unwrap()).unwrap().id)
        .collect();
    assert_eq!(ids, ["after"]);
}

#[test]
fn a_tokenizer_is_trained_on_what_is_good() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("x.jsonl"), folder.path().join("t.json"));
    let train = |lines: &str| {
        std::fs::write(&file, lines).unwrap();
        let train = ["tokenizer", "train", "--vocab-size", "300", "--out", text(&out), text(&file)];
        sluiced(&train).output().unwrap()
    };
    let output = train("oops\n");
    assert!(output.status.code() == Some(65) && !out.exists(), "{}", stderr(&output));
    let output =
        train("{\"text\":\"the one the one\"}\n{\"text\":\"half \\ud800\"}\n{\"text\":\"the two\"}\n");
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(65), "{said}");
    assert!(said.contains("x.jsonl:2") && said.contains("1 documents were bad"), "{said}");
    let tokenizer: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert!(
        tokenizer["model"]["vocab"].get("the").is_some() || tokenizer["model"]["vocab"].get("Ġthe").is_some()
    );
}

#[test]
fn a_vocabulary_that_cannot_be_is_refused_before_anything_is_read() {
    for size in ["0", "256", "99999999999", "18446744073709551616"] {
        let train =
            ["tokenizer", "train", "--vocab-size", size, "--out", "/nowhere/t.json", "/nowhere/x.txt"];
        let output = sluiced(&train).output().unwrap();
        assert_eq!(output.status.code(), Some(64), "{size}: {}", stderr(&output));
    }
}

/// Every command that prints, but `dead-letters replay`, which needs a real broker (`dead_letters.rs`).
fn printing<'a>(model: &'a str, file: &'a str, servers: &'a str) -> Vec<Vec<&'a str>> {
    vec![
        vec!["--help"],
        vec!["--version"],
        vec!["model", "inspect", model],
        vec!["model", "inspect", "--json", model],
        vec!["model", "score", "--model-path", model, file],
        vec!["model", "score", "--summary", "--model-path", model, file],
        vec![
            "validate",
            "--model-path",
            model,
            "--kafka-bootstrap-servers",
            servers,
            "--kafka-delivery",
            "at-least-once",
        ],
    ]
}

#[test]
fn a_closed_pipe_is_no_failure_and_a_full_disk_is_one() {
    let broker = Broker::with_sluice_topics();
    let folder = tempfile::tempdir().unwrap();
    let (model, file) = (golden("tiny-llama"), folder.path().join("x.jsonl"));
    std::fs::write(&file, LINES).unwrap();
    for arguments in printing(text(&model), text(&file), &broker.bootstrap_servers) {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = sluiced(&arguments).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{arguments:?} into a closed pipe: {said}");
        assert!(!said.contains("panicked") && !said.contains("sluiced:"), "{arguments:?}: {said}");

        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = sluiced(&arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?} onto a full disk: {said}");
        assert!(said.contains("cannot write to standard output: No space left"), "{arguments:?}: {said}");

        // Where nobody hears what is said, the exit code still tells.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let status = sluiced(&arguments).stdout(Stdio::null()).stderr(writer).status().unwrap();
        assert_eq!(status.code(), Some(0), "{arguments:?} with standard error closed");
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = sluiced(&["model", "inspect", "/nowhere"]).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(66));
}

#[test]
fn variables_that_a_platform_sets_keep_nothing_from_starting() {
    let folder = tempfile::tempdir().unwrap();
    let (model, file) = (golden("tiny-llama"), folder.path().join("x.jsonl"));
    std::fs::write(&file, LINES).unwrap();
    let score = |variables: &[(&str, &str)]| {
        let mut command = sluiced(&["model", "score", "--model-path", text(&model), text(&file)]);
        command.envs(variables.iter().copied()).output().unwrap()
    };
    let output = score(&[
        ("SLUICED_SERVICE_HOST", "10.0.0.1"),
        ("SLUICED_PORT", "tcp://10.0.0.1:9464"),
        ("SLUICED_PORT_9464_TCP", "tcp://10.0.0.1:9464"),
        ("SLUICED_VERSION", "0.1"),
    ]);
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("SLUICED_VERSION") && !said.contains("SLUICED_PORT"), "{said}");
    let output = score(&[("SLUICED_MODEL_DEVISE", "cuda:0")]);
    assert_eq!(output.status.code(), Some(64));
    assert!(stderr(&output).contains("SLUICED_MODEL_DEVICE is meant"), "{}", stderr(&output));
}
