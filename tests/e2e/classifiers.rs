//! Token classifiers: the probability of a class at each token beside transformers in float64
//! (`tests/golden/classifiers/make_classifiers.py`), on its way through the daemon and Kafka to a trainer, and what is refused.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use prost::Message as _;
use sluice_daemon::batch::Ladder;
use sluice_daemon::score::Scorer;
use sluice_daemon::score::documents::classify_documents;
use sluice_daemon::score::kind::ModelKind;
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_daemon::score::self_test::{sees_both_sides, self_test};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::graph::{Dim, GraphBuilder, int_attribute, tensor_info};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{ModelProto, NodeProto};
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Losses, Precision, ScoredDocument, ScoredRecord, TokenIds,
    TokenizedDocument,
};
use sluice_tests::{Daemon, Kafka, binary, golden, onnxruntime, produce, read_all};
use sluice_trainer::run::picture::TokenPicture;

const CLOSE: f64 = 1e-5;
const USAGE: i32 = 64;

fn folder(name: &str) -> PathBuf {
    golden("classifiers").join(name)
}

struct Document {
    tokens: Arc<[u32]>,
    probabilities: Vec<f64>,
}

struct Golden {
    policy: ContextPolicy,
    both_sides: bool,
    documents: Vec<Document>,
}

fn classified(name: &str) -> Golden {
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder("classifiers.json")).unwrap()).unwrap();
    let number = |key: &str| u32::try_from(json[key].as_u64().unwrap()).unwrap();
    let model = &json["models"][name];
    let documents = model["documents"].as_array().unwrap().iter().map(|document| Document {
        tokens: document["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect(),
        probabilities: document["probabilities"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p.as_f64().unwrap())
            .collect(),
    });
    Golden {
        policy: ContextPolicy { window: number("window"), stride: number("stride"), bos: Bos::None },
        both_sides: model["both_sides"].as_bool().unwrap(),
        documents: documents.collect(),
    }
}

fn options() -> SessionOptions {
    SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 }
}

#[test]
fn probabilities_are_those_of_transformers() {
    for (name, class) in
        [("tiny-bert", "toxic"), ("tiny-bert", "1"), ("tiny-llama", ""), ("tiny-bert-single", "")]
    {
        let golden = classified(name);
        let lengths: Vec<usize> = golden.documents.iter().map(|document| document.tokens.len()).collect();
        assert!([1, 2, 64, 65, 150].iter().all(|len| lengths.contains(len)), "{lengths:?}");
        for fuse in [false, true] {
            let mut model = Model::load(&folder(name), Device::Cpu, false).unwrap();
            model.choose_class(class, false).unwrap();
            if fuse {
                model.fuse_attention(&onnxruntime()).unwrap();
            }
            assert_eq!(model.identity.vocabulary, 512, "its classes are not its vocabulary");
            let mut scorer = Scorer::new(&model, &options(), false).unwrap();
            let ladder = Ladder::new(golden.policy.window as usize, 16);
            let mut class = model.class.clone().unwrap();
            class.both_sides = sees_both_sides(&mut scorer, 512, model.kind.class_targets(), ladder).unwrap();
            assert_eq!((class.name.as_str(), class.both_sides), ("toxic", golden.both_sides), "{name}");
            self_test(&mut scorer, (512, Precision::F32), Some(&class), ladder, 1024).unwrap();

            let tokens: Vec<_> =
                golden.documents.iter().map(|document| Arc::clone(&document.tokens)).collect();
            for tokens_max in [64, 1024] {
                let asked = (golden.policy, Some(&class));
                let scores = classify_documents(&mut scorer, &tokens, asked, tokens_max, ladder).unwrap();
                let mut worst: f64 = 0.0;
                for (document, scores) in golden.documents.iter().zip(&scores) {
                    let ours = scores.probabilities();
                    assert_eq!(ours.len(), document.probabilities.len());
                    for (&ours, wanted) in ours.iter().zip(&document.probabilities) {
                        assert!((0.0..=1.0).contains(&ours), "{name}: {ours}");
                        worst = worst.max((f64::from(ours) - wanted).abs());
                    }
                }
                eprintln!("{name}, fused {fuse}, batches of {tokens_max}: worst difference {worst:.1e}");
                assert!(worst < CLOSE, "{name}: {worst}");
            }
        }
    }
}

#[test]
fn the_fingerprint_says_which_class() {
    let fingerprint = |class: Option<&str>| {
        let mut model = Model::load(&folder("tiny-bert"), Device::Cpu, false).unwrap();
        if let Some(class) = class {
            model.choose_class(class, false).unwrap();
        }
        model.identity.fingerprint
    };
    let all = [None, Some("O"), Some("toxic"), Some("code")].map(fingerprint);
    assert!((0..4).all(|one| (0..one).all(|other| all[one] != all[other])), "{all:?}");
    assert_eq!(fingerprint(Some("1")), all[2]);
}

/// The classifier as an exporter leaves it that drops the mask: its padding counts as text.
fn without_its_mask(folder: &Path) {
    let bytes = std::fs::read(folder.join("model.onnx")).unwrap();
    let mut model = ModelProto::decode(bytes.as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    graph.input.retain(|input| input.name() != "attention_mask");
    let node = |op_type: &str, input: &str, output: &str| NodeProto {
        op_type: Some(op_type.to_owned()),
        input: if op_type == "Equal" { vec![input.to_owned(); 2] } else { vec![input.to_owned()] },
        output: vec![output.to_owned()],
        ..NodeProto::default()
    };
    let mut cast = node("Cast", "test/same", "attention_mask");
    cast.attribute.push(int_attribute("to", 7));
    graph.node.splice(0..0, [node("Equal", "input_ids", "test/same"), cast]);
    std::fs::write(folder.join("model.onnx"), model.encode_to_vec()).unwrap();
}

fn copy(name: &str) -> tempfile::TempDir {
    let copied = tempfile::tempdir().unwrap();
    for file in ["model.onnx", "config.json", "tokenizer.json"] {
        std::fs::copy(folder(name).join(file), copied.path().join(file)).unwrap();
    }
    copied
}

#[test]
fn a_classifier_that_sees_its_padding_is_refused() {
    let copied = copy("tiny-bert");
    without_its_mask(copied.path());
    let mut model = Model::load(copied.path(), Device::Cpu, false).unwrap();
    model.choose_class("toxic", false).unwrap();
    let mut scorer = Scorer::new(&model, &options(), false).unwrap();
    let error =
        self_test(&mut scorer, (512, Precision::F32), model.class.as_ref(), Ladder::new(64, 16), 1024);
    assert!(error.unwrap_err().to_string().contains("sees its padding"));
}

#[test]
fn a_classifier_of_whole_texts_is_refused() {
    // The head sees the first token's hidden state alone, as of a sequence classifier, and nothing says what it is.
    let copied = copy("tiny-bert");
    let bytes = std::fs::read(copied.path().join("model.onnx")).unwrap();
    let mut model = ModelProto::decode(bytes.as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let is_product = |node: &NodeProto| matches!(node.op_type(), "MatMul" | "Gemm");
    let head = graph.node.iter().rposition(is_product).unwrap();
    let hidden = std::mem::replace(&mut graph.node[head].input[0], "test/first".to_owned());
    let mut builder = GraphBuilder::new("test/");
    let first = builder.int(0);
    builder.node_to("Gather", &[&hidden, &first], vec![int_attribute("axis", 1)], "test/first");
    let (nodes, constants) = builder.finish();
    graph.node.splice(head..head, nodes);
    graph.initializer.extend(constants);
    graph.output = vec![tensor_info("logits", DataType::Float, &[Dim::Named("batch"), Dim::Fixed(3)])];
    std::fs::write(copied.path().join("model.onnx"), model.encode_to_vec()).unwrap();
    for architectures in [None, Some(serde_json::json!(["BertForSequenceClassification"]))] {
        let path = copied.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["architectures"] = architectures.into();
        std::fs::write(&path, config.to_string()).unwrap();
        let error = format!("{:#}", Model::load(copied.path(), Device::Cpu, false).unwrap_err());
        assert!(error.contains("[batch, 3]") && error.contains("a whole text"), "{error}");
    }
}

#[test]
fn a_language_model_needs_no_keys_of_classifiers() {
    let copied = tempfile::tempdir().unwrap();
    for file in ["model.onnx", "config.json", "tokenizer.json"] {
        std::fs::copy(golden("tiny-llama").join(file), copied.path().join(file)).unwrap();
    }
    let path = copied.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["id2label"] = serde_json::json!(["a list", 2]);
    config["architectures"] = serde_json::json!("LlamaForCausalLM");
    std::fs::write(&path, config.to_string()).unwrap();
    assert_eq!(Model::load(copied.path(), Device::Cpu, false).unwrap().kind, ModelKind::CausalLm);
}

fn sluiced(arguments: &[&str], variable: Option<(&str, &str)>) -> Output {
    let mut command = Command::new(binary("sluiced"));
    command.args(arguments).env("ORT_DYLIB_PATH", onnxruntime()).envs(variable).output().unwrap()
}

#[test]
fn a_wrong_class_exits_64_and_lists_the_right_ones() {
    let (bert, causal) = (folder("tiny-bert"), golden("tiny-llama"));
    let with = |model: &Path, flags: &[&str], variable: Option<(&str, &str)>, words: &[&str]| {
        let given =
            ["validate", "--kafka-bootstrap-servers", "127.0.0.1:9", "--model-path", model.to_str().unwrap()];
        let output = sluiced(&[&given[..], flags].concat(), variable);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(USAGE), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?} are not in: {said}");
    };
    let choices = "O (0), toxic (1), code (2)";
    with(&bert, &[], None, &["3 classes", "--model-class", choices]);
    with(&bert, &["--model-class", "nasty"], None, &["`nasty`", choices]);
    with(&bert, &[], Some(("SLUICED_MODEL_CLASS", "3")), &["`3`", choices]);
    with(&bert, &["--model-class", "code", "--score-entropies", "true"], None, &["score.entropies"]);
    with(&causal, &["--model-class", "toxic"], None, &["causal language model", "no classes"]);

    // Two models' files in one folder: labels that the graph has not.
    let copied = copy("tiny-bert");
    std::fs::copy(folder("tiny-llama/config.json"), copied.path().join("config.json")).unwrap();
    let error = Model::load(copied.path(), Device::Cpu, false).unwrap_err();
    assert!(format!("{error:#}").contains("names 2 classes"), "{error:#}");
}

#[test]
fn a_model_is_inspected_and_scores_text_without_kafka() {
    let bert = folder("tiny-bert");
    let inspect = |flags: &[&str]| {
        let given = ["model", "inspect", "--json", bert.to_str().unwrap()];
        let output = sluiced(&[&given[..], flags].concat(), None);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let found = inspect(&[]);
    assert_eq!(
        found["kind"],
        serde_json::json!(["token classifier", "class 0: O", "class 1: toxic", "class 2: code"])
    );
    assert!(found["inputs"].to_string().contains("token_type_ids"));
    assert!(found["fingerprint"].as_str().unwrap().contains("--model-class"), "{}", found["fingerprint"]);
    let chosen = inspect(&["--model-class", "toxic"]);
    assert_eq!(chosen["kind"][2], "class 1: toxic, whose probability is recorded");
    let mut model = Model::load(&bert, Device::Cpu, false).unwrap();
    model.choose_class("toxic", false).unwrap();
    assert_eq!(chosen["fingerprint"], model.identity.fingerprint.to_string(), "that of its records");

    let text = tempfile::NamedTempFile::with_suffix(".txt").unwrap();
    std::fs::write(text.path(), "Two words").unwrap();
    let flags = ["--model-path", bert.to_str().unwrap(), "--model-class", "toxic", "--format", "text"];
    let output = sluiced(&[&["model", "score"], &flags[..], &[text.path().to_str().unwrap()]].concat(), None);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let line: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(line["class"], "toxic");
    assert_eq!(line["attribute"].as_array().unwrap().len(), line["tokens"].as_array().unwrap().len());
    assert!(line.get("losses").is_none());
}

fn train(servers: &str, out: &Path, flags: &[&str]) -> Output {
    let shape = "--hidden-size 32 --layers 1 --heads 2 --batch-size 2 --steps 1000 --until-end --seed 3";
    Command::new(binary("sluice-train"))
        .args(["run", "--bootstrap-servers", servers, "--out", out.to_str().unwrap(), "--tokenizer"])
        .arg(folder("tiny-bert/tokenizer.json"))
        .args(shape.split(' '))
        .args(flags)
        .output()
        .unwrap()
}

fn scored_document(id: &str, tokens: &[u32], tokenizer: Fingerprint) -> ScoredDocument {
    let losses: Vec<f32> = (0..tokens.len()).map(|at| if at == 0 { f32::NAN } else { 1.0 }).collect();
    ScoredDocument {
        document: document(id, tokens, tokenizer),
        reference_losses: Losses::new(&losses, LossFormat::F32).unwrap(),
        reference_entropies: None,
        reference_model: Fingerprint::of_bytes(b"a language model"),
        context: ContextPolicy { window: 64, stride: 32, bos: Bos::None },
        precision: Precision::F32,
    }
}

fn document(id: &str, tokens: &[u32], tokenizer: Fingerprint) -> TokenizedDocument {
    TokenizedDocument {
        id: id.to_owned(),
        tokens: TokenIds::new(tokens),
        tokenizer,
        source: String::new(),
        attributes: BTreeMap::new(),
    }
}

fn picture(run: &Path) -> TokenPicture {
    serde_json::from_slice(&std::fs::read(run.join("tokens.json")).unwrap()).unwrap()
}

/// The picture of a run with a threshold marks the tokens whose attribute lies on its side, by what its last step kept.
fn check_picture(run: &Path, side: &str, attributes: &BTreeMap<String, Vec<f32>>) {
    let picture = picture(run);
    let threshold = picture.threshold.expect("the last step kept something");
    let mut kept = 0;
    for document in &picture.documents {
        let values = &attributes[&document.id];
        // A score is negative where the lowest are kept. A document's first token is not predicted.
        let score = |at: usize| if side == "below" { -values[at] } else { values[at] };
        for (at, token) in document.tokens.iter().enumerate() {
            assert_eq!(token.kept, at > 0 && score(at) >= threshold, "{side}: {} {at}", document.id);
            kept += usize::from(token.kept);
        }
    }
    assert!(kept > 0, "{side}: {} documents", picture.documents.len());
}

/// Every step of a run kept `share` of its tokens, rounded as `floor(share * tokens + 0.5)`.
fn check_share(run: &Path, share: f64) {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let metrics = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let steps: Vec<_> = metrics.filter(|metric| metric["type"] == "step").collect();
    let number = |step: &serde_json::Value, key: &str| step[key].as_u64().unwrap();
    let all: u64 = steps.iter().map(|step| number(step, "scored")).sum();
    assert!(all > 200, "{all} tokens");
    for step in steps {
        let wanted = (share * number(&step, "scored") as f64 + 0.5).floor() as u64;
        assert_eq!(number(&step, "kept"), wanted, "{step}");
    }
}

#[test]
fn a_class_travels_from_the_daemon_to_a_trainer() {
    let golden = classified("tiny-bert");
    let tokenizer = Fingerprint::of_bytes(&std::fs::read(folder("tiny-bert/tokenizer.json")).unwrap());
    let data = tempfile::tempdir().unwrap();
    let kafka = Kafka::start(&data.path().join("kafka"));
    for topic in ["sluice.documents", "sluice.scored", "sluice.dead-letters", "losses"] {
        kafka.create_topic(topic, 1);
    }
    let servers = kafka.bootstrap_servers.as_str();
    let documents: BTreeMap<String, &Document> = (0..)
        .zip(&golden.documents)
        .map(|(number, document)| (format!("golden-{number}"), document))
        .collect();
    let encoded = |id: &str, of: &Document| document(id, &of.tokens, tokenizer).encode();
    let records: Vec<_> =
        documents.iter().map(|(id, document)| (id.as_str(), Some(encoded(id, document)))).collect();
    produce(servers, "sluice.documents", &records);
    let flags = ["--score-stride-tokens", "32", "--model-class", "toxic"];
    let daemon = Daemon::start(servers, &folder("tiny-bert"), &flags);
    daemon.wait("all documents", |daemon| daemon.finished() >= documents.len());
    assert_eq!(daemon.get("/ready").0, 200);
    assert!(daemon.stop().success());

    let published = read_all(servers, "sluice.scored");
    assert_eq!(published.len(), documents.len(), "a document of a single token has a value too");
    let mut predicted: Vec<f32> = Vec::new();
    let mut attributes = BTreeMap::new();
    for record in published {
        let payload = record.payload.unwrap();
        let error = ScoredDocument::decode(payload.clone()).unwrap_err();
        assert_eq!(error.code(), "other_model_kind");
        let ScoredRecord::Attributes(read) = ScoredRecord::decode(payload).unwrap() else { panic!("losses") };
        assert_eq!((read.attribute.class_name(), read.attribute.class_index()), ("toxic", 1));
        for (ours, wanted) in read.attribute.iter().zip(&documents[&read.document.id].probabilities) {
            assert!((f64::from(ours) - wanted).abs() < CLOSE, "{}: {ours} {wanted}", read.document.id);
        }
        predicted.extend(read.attribute.iter().skip(1));
        attributes.insert(read.document.id, read.attribute.to_vec());
    }

    // Every token at or below the threshold is learnt from, and no other: as many as the records say.
    let runs = tempfile::tempdir().unwrap();
    let (below, above) = (runs.path().join("below"), runs.path().join("above"));
    let long = ["--sequence-length", "160", "--score", "attribute", "--threshold", "0.03"];
    for (out, side) in [(&below, "below"), (&above, "above")] {
        let output = train(servers, out, &[&long[..], &["--attribute-keep", side]].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let is_kept = |value: &&f32| if side == "below" { **value <= 0.03 } else { **value >= 0.03 };
        let wanted = predicted.iter().filter(is_kept).count();
        assert!(wanted > 50, "{wanted} of {}", predicted.len());
        assert!(
            said.contains(&format!("{} tokens seen, {wanted} learnt from", predicted.len())),
            "{wanted} of {} tokens: {said}",
            predicted.len()
        );
        check_picture(out, side, &attributes);
    }
    for (name, rule) in [("share", ["--score", "attribute"]), ("control", ["--objective", "random"])] {
        let out = runs.path().join(name);
        let output = train(servers, &out, &[&["--keep", "0.5"], &rule[..]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        check_share(&out, 0.5);
        assert!(picture(&out).documents.iter().flat_map(|document| &document.tokens).any(|token| token.kept));
    }

    // A topic that lacks what a score looks at is refused by what it lacks, either way.
    let scored = scored_document("losses-0", &golden.documents[4].tokens, tokenizer);
    produce(servers, "losses", &[("losses-0", Some(scored.encode()))]);
    for (name, flags, words) in [
        ("excess", vec!["--score", "excess"], ["\"toxic\"", "no reference losses"]),
        ("entropy", vec!["--score", "reference-entropy"], ["\"toxic\"", "no reference losses"]),
        ("lacks", vec!["--topic", "losses", "--score", "attribute"], ["no attribute", "token classifier"]),
        ("side", vec!["--attribute-keep", "below"], ["--attribute-keep", "--score attribute"]),
    ] {
        let output = train(servers, &runs.path().join(name), &flags);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(USAGE), "{name}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{name}: {words:?} are not in: {said}");
    }
    let output = train(servers, &runs.path().join("old"), &["--topic", "losses"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
