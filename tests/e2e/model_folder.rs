//! Model folders: what is refused by name, data beyond 2 GB, and the commands that look into a folder.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use prost::Message as _;
use serde_json::Value;
use sluice_daemon::batch::Ladder;
use sluice_daemon::score::Scorer;
use sluice_daemon::score::documents::score_documents;
use sluice_daemon::score::graft::{HeadOptions, graft};
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_schemas::onnx::tensor_proto::DataLocation;
use sluice_schemas::onnx::{ModelProto, NodeProto, StringStringEntryProto, TensorProto};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_tests::{Leak, binary, golden, onnxruntime, write_leaking_model};

fn read(folder: &Path) -> ModelProto {
    ModelProto::decode(std::fs::read(folder.join("model.onnx")).unwrap().as_slice()).unwrap()
}

/// The error of grafting tiny-llama after `spoil` has changed its last node.
fn refusal(spoil: fn(&mut NodeProto)) -> String {
    let mut model = read(&golden("tiny-llama"));
    spoil(model.graph.as_mut().unwrap().node.last_mut().unwrap());
    graft(&mut model, HeadOptions::losses(Device::Cpu)).unwrap_err().to_string()
}

#[test]
fn a_head_that_cannot_be_moved_is_refused_by_the_name_of_its_node() {
    let error = refusal(|node| node.op_type = Some("LayerNormalization".to_owned()));
    assert!(error.contains("`/MatMul` (LayerNormalization)"), "{error}");
    let error = refusal(|node| node.input.reverse());
    assert!(error.contains("`/MatMul` (MatMul), whose first input alone should change"), "{error}");
}

#[test]
fn an_input_that_is_unknown_is_refused_by_its_name() {
    let mut model = read(&golden("tiny-llama-mask"));
    let graph = model.graph.as_mut().unwrap();
    for node in &mut graph.node {
        for input in node.input.iter_mut().filter(|input| *input == "position_ids") {
            "pixel_values".clone_into(input);
        }
    }
    let input = graph.input.iter_mut().find(|input| input.name() == "position_ids").unwrap();
    input.name = Some("pixel_values".to_owned());
    let error = graft(&mut model, HeadOptions::losses(Device::Cpu)).unwrap_err().to_string();
    assert!(error.contains("input `pixel_values`, which Sluice does not know"), "{error}");
}

#[test]
fn a_head_for_the_last_position_alone_fails_at_once() {
    // As onnxruntime-genai's `prune_lm_head` makes it: logits of one position, which no loss can come from.
    let mut model = read(&golden("tiny-llama"));
    let graph = model.graph.as_mut().unwrap();
    let head = graph.node.last_mut().unwrap();
    let hidden = std::mem::replace(&mut head.input[0], "last".to_owned());
    let mut builder = sluice_schemas::graph::GraphBuilder::new("prune/");
    let last = builder.ints(&[-1]);
    let axis = sluice_schemas::graph::int_attribute("axis", 1);
    builder.node_to("Gather", &[&hidden, &last], vec![axis], "last");
    let (nodes, constants) = builder.finish();
    let end = graph.node.len() - 1;
    graph.node.splice(end..end, nodes);
    graph.initializer.extend(constants);
    let folder = copy_of("tiny-llama");
    std::fs::write(folder.path().join("model.onnx"), model.encode_to_vec()).unwrap();
    let error = losses(folder.path(), &[&[1, 2, 3, 4]]).unwrap_err();
    assert!(format!("{error:#}").contains("hidden states of 1 positions for 8 tokens"), "{error:#}");
}

fn copy_of(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["model.onnx", "config.json", "tokenizer.json"] {
        std::fs::copy(golden(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn losses(folder: &Path, documents: &[&[u32]]) -> anyhow::Result<Vec<Vec<f32>>> {
    let model = Model::load(folder, Device::Cpu, false)?;
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(&model, &options, false)?;
    let documents: Vec<Arc<[u32]>> = documents.iter().map(|&tokens| tokens.into()).collect();
    let policy = ContextPolicy { window: 64, stride: 32, bos: Bos::None };
    let scores = score_documents(&mut scorer, &documents, policy, 1024, Ladder::new(64, 16))?;
    Ok(scores.iter().map(|scores| scores.predicted().collect()).collect())
}

#[test]
fn external_data_beyond_two_gigabytes_is_read() {
    const BEYOND: u64 = (1 << 31) + 4096;
    let folder = copy_of("tiny-llama");
    let mut model = read(folder.path());
    let graph = model.graph.as_mut().unwrap();
    let tensor = graph.initializer.iter_mut().max_by_key(|tensor| tensor.raw_data().len()).unwrap();
    let raw = tensor.raw_data.take().unwrap();
    // A hole of 2 GB takes no disk.
    let mut file = std::fs::File::create(folder.path().join("weights.bin")).unwrap();
    file.seek(SeekFrom::Start(BEYOND)).unwrap();
    file.write_all(&raw).unwrap();
    tensor.data_location = Some(DataLocation::External.into());
    tensor.external_data = [
        ("location", "weights.bin".to_owned()),
        ("offset", BEYOND.to_string()),
        ("length", raw.len().to_string()),
    ]
    .into_iter()
    .map(|(key, value)| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) })
    .collect();
    std::fs::write(folder.path().join("model.onnx"), model.encode_to_vec()).unwrap();

    let document: &[u32] = &[5, 17, 300, 2, 9];
    assert_eq!(
        losses(folder.path(), &[document]).unwrap(),
        losses(&golden("tiny-llama"), &[document]).unwrap(),
        "the same weights, wherever they lie"
    );
}

fn sluiced(arguments: &[&str]) -> Output {
    Command::new(binary("sluiced")).args(arguments).env("ORT_DYLIB_PATH", onnxruntime()).output().unwrap()
}

/// Moves the values of `tensor` to `file` in `folder`.
fn move_out(tensor: &mut TensorProto, folder: &Path, file: &str) {
    let raw = tensor.raw_data.take().unwrap();
    std::fs::create_dir_all(folder.join(file).parent().unwrap()).unwrap();
    std::fs::write(folder.join(file), &raw).unwrap();
    tensor.data_location = Some(DataLocation::External.into());
    let location = StringStringEntryProto { key: Some("location".to_owned()), value: Some(file.to_owned()) };
    tensor.external_data = vec![location];
}

#[test]
fn external_data_in_several_folders_is_read() {
    let folder = copy_of("tiny-llama");
    let mut model = read(folder.path());
    let large = model.graph.as_mut().unwrap().initializer.iter_mut().filter(|t| t.raw_data().len() > 4096);
    for (index, tensor) in large.enumerate() {
        move_out(
            tensor,
            folder.path(),
            ["data/weights.bin", "./more/of/../of/it/weights.bin", "here.bin"][index % 3],
        );
        if index == 2 {
            break;
        }
    }
    std::fs::write(folder.path().join("model.onnx"), model.encode_to_vec()).unwrap();
    // And one of the files behind a link, as in a hub's cache.
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::rename(folder.path().join("here.bin"), elsewhere.path().join("blob")).unwrap();
    std::os::unix::fs::symlink(elsewhere.path().join("blob"), folder.path().join("here.bin")).unwrap();
    let document: &[u32] = &[5, 17, 300, 2, 9];
    assert_eq!(
        losses(folder.path(), &[document]).unwrap(),
        losses(&golden("tiny-llama"), &[document]).unwrap()
    );
}

#[test]
fn what_is_wrong_with_a_folder_has_its_exit_code() {
    let inspect = |path: &Path| {
        let output = sluiced(&["model", "inspect", path.to_str().unwrap()]);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(inspect(Path::new("/nowhere")).0, 66);
    let folder = copy_of("tiny-llama");
    let file = folder.path().join("model.onnx");
    let (code, error) = inspect(&file);
    assert_eq!(code, 66);
    assert!(
        error.contains(&format!(
            "is a file; `model.path` must name the folder that it lies in, {}",
            folder.path().display()
        )),
        "{error}"
    );
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let (code, error) = inspect(folder.path());
    assert_eq!(code, 65);
    assert!(error.contains("is not an ONNX file, or is cut short"), "{error}");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(inspect(folder.path()).0, 66);
    let (code, error) = inspect(Path::new("/dev/null"));
    assert!(code == 66 && error.contains("/dev/null is no folder"), "{code}: {error}");
}

/// As a clone of a hub's repository is without Git LFS.
#[test]
fn a_pointer_of_git_lfs_is_named_whichever_file_it_stands_for() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n";
    for name in ["model.onnx", "config.json", "tokenizer.json"] {
        let folder = copy_of("tiny-llama");
        std::fs::write(folder.path().join(name), pointer).unwrap();
        let output = sluiced(&["model", "inspect", folder.path().to_str().unwrap()]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(65), "{name}: {error}");
        assert!(error.contains(&format!("{name} is a pointer of Git LFS")), "{name}: {error}");
    }
}

/// Such a model's losses look good, and a trainer would choose by them.
#[test]
fn a_model_that_sees_what_it_should_not_is_refused_by_what_it_sees() {
    let words = [
        (Leak::Next, "the model sees what follows a token"),
        (Leak::Company, "the model mixes the rows of a batch"),
        (Leak::Padding, "the model sees its padding"),
    ];
    for (leak, words) in words {
        let folder = tempfile::tempdir().unwrap();
        write_leaking_model(folder.path(), leak);
        let path = folder.path().to_str().unwrap();
        let text = folder.path().join("text.txt");
        std::fs::write(&text, "In the year 2889").unwrap();
        for command in [
            // No broker is asked before the model is known to be good.
            ["validate", "--model-path", path, "--kafka-bootstrap-servers", "127.0.0.1:9"],
            ["model", "score", "--model-path", path, text.to_str().unwrap()],
        ] {
            let output = sluiced(&command);
            let error = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(65), "{leak:?}: {error}");
            assert!(error.contains(words), "{leak:?}: {error}");
            assert!(!String::from_utf8(output.stdout).unwrap().contains("losses"), "{leak:?}");
        }
    }
}

#[test]
fn inspect_says_what_was_found_and_done() {
    let folder = golden("tiny-llama-mask");
    let output = sluiced(&["model", "inspect", "--json", folder.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["after_the_head"], serde_json::json!(["Mul"]));
    assert_eq!((&found["vocabulary"], &found["context"]), (&512.into(), &64.into()));
    // Its mask of padding went with the attention that read it.
    let fed =
        |found: &Value| found["inputs"].as_array().unwrap().iter().any(|of| of["input"] == "attention_mask");
    assert_eq!(found["attention"], serde_json::json!(["GroupQueryAttention x 2, fused as it was loaded"]));
    assert!(!fed(&found) && found["placement"].is_null(), "{found}");
    let without =
        sluiced(&["model", "inspect", "--json", "--onnxruntime", "/nowhere", folder.to_str().unwrap()]);
    assert!(without.status.success(), "{}", String::from_utf8_lossy(&without.stderr));
    let found: Value = serde_json::from_slice(&without.stdout).unwrap();
    assert!(fed(&found) && found["attention"].is_null(), "{found}");
    let warning = String::from_utf8(without.stderr).unwrap();
    assert!(warning.contains("cannot load ONNX Runtime from /nowhere"), "{warning}");

    let run = sluiced(&["model", "inspect", "--json", "--device", "cpu", folder.to_str().unwrap()]);
    let found: Value = serde_json::from_slice(&run.stdout).unwrap();
    let ran = |operator: &str| {
        let rows = found["placement"].as_array().unwrap().iter();
        rows.filter(|row| row["operator"] == operator).map(|row| row["nodes"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!((ran("GroupQueryAttention"), ran("Softmax")), (2, 0), "{found}");

    let text = sluiced(&["model", "inspect", folder.to_str().unwrap()]).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.lines().any(|line| line.starts_with("head ") && line.contains("MatMul")), "{text}");
}

#[test]
fn score_prints_the_losses_of_text() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.jsonl");
    std::fs::write(
        &file,
        "{\"id\":\"a\",\"text\":\"In the year 2889\"}\n{\"id\":\"b\",\"text\":\"little\"}\n",
    )
    .unwrap();
    let model = golden("tiny-llama");
    let run = |flags: &[&str]| {
        let fixed = ["model", "score", "--model-path", model.to_str().unwrap(), file.to_str().unwrap()];
        let output = sluiced(&[&fixed, flags].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let lines = run(&[]);
    assert_eq!((&lines[0]["id"], &lines[1]["id"]), (&"a".into(), &"b".into()));
    let tokens: Vec<u32> = serde_json::from_value(lines[0]["tokens"].clone()).unwrap();
    let ours: Vec<Option<f32>> = serde_json::from_value(lines[0]["losses"].clone()).unwrap();
    assert_eq!(ours[0], None, "null where there is no prediction");
    let direct = losses(&model, &[&tokens]).unwrap();
    for (ours, direct) in ours[1..].iter().zip(&direct[0]) {
        assert!((ours.unwrap() - direct).abs() < 1e-5);
    }
    // With a BOS token before it, every token has a prediction.
    let with_bos = run(&["--score-bos", "document"]);
    assert!(with_bos[0]["losses"].as_array().unwrap().iter().all(Value::is_number));
    let total = &run(&["--summary", "--score-bos", "document"])[0];
    assert_eq!(total["documents"], 2);
    assert_eq!(total["tokens"], total["predicted_tokens"]);
}
