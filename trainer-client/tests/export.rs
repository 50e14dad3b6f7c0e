//! The exported ONNX file by its structure; its numbers are checked end to end, where ONNX Runtime is at hand.

use std::collections::HashSet;
use std::path::Path;

use prost::Message;
use sluice_schemas::onnx::tensor_shape_proto::dimension::Value;
use sluice_schemas::onnx::{GraphProto, ModelProto, ValueInfoProto, type_proto};
use sluice_trainer::export::{DATA_FILE, INLINE_BYTES_MAX, INPUT, MODEL_FILE, OUTPUT, export_onnx, publish};
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig, Variant};
use sluice_trainer::run::tensors::Stored;
use sluice_trainer::training::learner::Learner;

fn config(kv_heads: usize, tie_word_embeddings: bool) -> ModelConfig {
    ModelConfig {
        vocab_size: 30,
        hidden_size: 64,
        intermediate_size: 24,
        layers: 2,
        heads: 4,
        kv_heads,
        max_position_embeddings: 20,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings,
        variant: Variant::default(),
    }
}

fn exported(config: &ModelConfig, folder: &Path) -> GraphProto {
    let learner = BurnLearner::new(config.clone(), AdamWConfig::default(), 4).expect("valid");
    learner.save(folder).expect("a writable folder");
    std::fs::write(folder.join("tokenizer.json"), "{}").expect("a writable folder");
    let out = folder.join("made/onnx");
    export_onnx(folder, &out, Stored::F32, INLINE_BYTES_MAX).expect("a whole checkpoint");
    assert_eq!(ModelConfig::read(&out).expect("its config.json"), *config);
    assert_eq!(std::fs::read_to_string(out.join("tokenizer.json")).expect("its tokenizer"), "{}");
    let bytes = std::fs::read(out.join(MODEL_FILE)).expect("its graph");
    let model = ModelProto::decode(bytes.as_slice()).expect("an ONNX model");
    let is_fused = config.head_dim() == 16;
    assert_eq!(model.opset_import[0].version, Some(if is_fused { 17 } else { 23 }));
    let graph = model.graph.expect("a graph");
    let attention = if is_fused { "GroupQueryAttention" } else { "Attention" };
    assert_eq!(graph.node.iter().filter(|node| node.op_type() == attention).count(), config.layers);
    assert!(graph.node.iter().all(|node| node.op_type() != "Softmax"), "attention is one operator");
    graph
}

fn dims(info: &ValueInfoProto) -> Vec<String> {
    let Some(type_proto::Value::TensorType(tensor)) =
        info.r#type.as_ref().and_then(|kind| kind.value.as_ref())
    else {
        panic!("{info:?} is not a tensor");
    };
    let dims = &tensor.shape.as_ref().expect("a shape").dim;
    let text = |value: &Option<Value>| match value {
        Some(Value::DimValue(size)) => size.to_string(),
        Some(Value::DimParam(name)) => name.clone(),
        None => String::new(),
    };
    dims.iter().map(|dim| text(&dim.value)).collect()
}

#[test]
fn every_value_is_made_once_and_before_it_is_used() {
    for (kv_heads, tied, head_dim) in [(2, false, None), (4, true, None), (2, false, Some(8))] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let variant = Variant { head_dim, ..Variant::default() };
        let graph = exported(&ModelConfig { variant, ..config(kv_heads, tied) }, folder.path());
        assert_eq!(graph.input.iter().map(ValueInfoProto::name).collect::<Vec<_>>(), [INPUT]);
        assert_eq!(dims(&graph.input[0]), ["batch", "sequence"]);
        assert_eq!(graph.output.iter().map(ValueInfoProto::name).collect::<Vec<_>>(), [OUTPUT]);
        assert_eq!(dims(&graph.output[0]), ["batch", "sequence", "30"]);

        let mut known = HashSet::from([INPUT.to_owned()]);
        for tensor in &graph.initializer {
            assert!(known.insert(tensor.name().to_owned()), "{} is made twice", tensor.name());
            let count: i64 = tensor.dims.iter().product();
            let width = tensor.raw_data().len() as i64 / count;
            assert!(width == 4 || width == 8, "{} has {width} bytes a value", tensor.name());
        }
        let mut names = HashSet::new();
        for node in &graph.node {
            assert!(names.insert(node.name().to_owned()), "two nodes are called {}", node.name());
            for input in &node.input {
                assert!(
                    input.is_empty() || known.contains(input),
                    "{} uses {input} before it is made",
                    node.name()
                );
            }
            for output in &node.output {
                assert!(known.insert(output.clone()), "{output} is made twice");
            }
        }
        assert!(known.contains(OUTPUT));
        let head = graph.initializer.iter().find(|tensor| tensor.name() == "lm_head.weight");
        assert_eq!(head.map(|tensor| tensor.dims.clone()), (!tied).then(|| vec![64, 30]));
    }
}

#[test]
fn a_checkpoint_of_another_shape_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let learner = BurnLearner::new(config(2, false), AdamWConfig::default(), 4).expect("valid");
    learner.save(folder.path()).expect("a writable folder");
    std::fs::write(folder.path().join("config.json"), config(4, false).to_hugging_face()).expect("writable");
    let error = export_onnx(folder.path(), folder.path(), Stored::F32, INLINE_BYTES_MAX)
        .expect_err("keys of another shape");
    assert!(format!("{error:#}").contains("k_proj.weight has shape"), "{error:#}");
}

#[test]
fn large_weights_go_into_a_file_of_their_own_and_come_back() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    exported(&config(2, false), folder.path());
    let out = folder.path().join("made/onnx");
    export_onnx(folder.path(), &out, Stored::Bf16, 0).expect("a whole checkpoint");
    let data = std::fs::read(out.join(DATA_FILE)).expect("its weights");
    let model = std::fs::read(out.join(MODEL_FILE)).expect("its graph");
    let graph = ModelProto::decode(model.as_slice()).expect("an ONNX model").graph.expect("a graph");
    let (weights, _) =
        sluice_trainer::run::tensors::read_tensors(&folder.path().join("model.safetensors")).expect("whole");
    let mut external = 0;
    for tensor in graph.initializer.iter().filter(|tensor| !tensor.external_data.is_empty()) {
        let entry = |key: &str| {
            let entry = tensor.external_data.iter().find(|entry| entry.key() == key).expect(key);
            entry.value().to_owned()
        };
        let number = |key: &str| entry(key).parse::<usize>().expect("a number");
        assert_eq!((entry("location").as_str(), tensor.raw_data()), (DATA_FILE, &[][..]));
        let (offset, length) = (number("offset"), number("length"));
        assert!(offset.is_multiple_of(4096) && offset + length <= data.len(), "{}", tensor.name());
        let weight = weights.iter().find(|weight| weight.name == tensor.name()).expect("a weight");
        let [rows, columns] = weight.shape[..] else { panic!("{:?}", weight.shape) };
        let is_transposed = tensor.dims == [columns as i64, rows as i64];
        for (index, bytes) in data[offset..offset + length].chunks_exact(2).enumerate() {
            let at = if is_transposed { index % rows * columns + index / rows } else { index };
            let bits = u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16;
            let (stored, value) = (f32::from_bits(bits), weight.values[at]);
            assert!((stored - value).abs() <= value.abs() / 256.0, "{}: {stored} for {value}", tensor.name());
        }
        external += 1;
    }
    assert_eq!(external, 8, "the four matrices of 4 KiB in 16 bits and more, in two layers");

    // A graph that is exported again leaves no weights of the earlier one behind.
    export_onnx(folder.path(), &out, Stored::F32, INLINE_BYTES_MAX).expect("a whole checkpoint");
    assert!(!out.join(DATA_FILE).exists());
}

#[test]
fn a_published_folder_is_read_as_the_checkpoint_is() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    exported(&config(2, false), folder.path());
    let (out, again) = (folder.path().join("published"), folder.path().join("again"));
    publish(folder.path(), &out, Stored::Bf16, 20_000).expect("a whole checkpoint");
    let files = |suffix: &str| {
        let names =
            std::fs::read_dir(&out).expect("a folder").map(|entry| entry.expect("a file").file_name());
        names.filter(|name| name.to_string_lossy().ends_with(suffix)).count()
    };
    assert!(files(".safetensors") > 1 && files("tokenizer.json") == 1);
    let text = std::fs::read_to_string(out.join("config.json")).expect("its config.json");
    assert!(text.contains("\"dtype\": \"bfloat16\""), "{text}");
    // What is rounded already stays as it is.
    publish(&out, &again, Stored::Bf16, usize::MAX).expect("a whole folder");
    let config = ModelConfig::read(&out).expect("its config.json");
    let read =
        |folder: &Path| sluice_trainer::model::checkpoint::read_weights(folder, &config).expect("whole");
    assert_eq!(read(&out), read(&again));
}
