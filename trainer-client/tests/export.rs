//! The exported ONNX file by its structure; its numbers are checked end to end, where ONNX Runtime is at hand.

use std::collections::HashSet;
use std::path::Path;

use prost::Message;
use sluice_schemas::onnx::tensor_shape_proto::dimension::Value;
use sluice_schemas::onnx::{GraphProto, ModelProto, ValueInfoProto, type_proto};
use sluice_trainer::export::{INPUT, MODEL_FILE, OUTPUT, export_onnx};
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig};
use sluice_trainer::training::learner::Learner;

fn config(kv_heads: usize, tie_word_embeddings: bool) -> ModelConfig {
    ModelConfig {
        vocab_size: 30,
        hidden_size: 16,
        intermediate_size: 24,
        layers: 2,
        heads: 4,
        kv_heads,
        max_position_embeddings: 20,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings,
    }
}

fn exported(config: &ModelConfig, folder: &Path) -> GraphProto {
    let learner = BurnLearner::new(config.clone(), AdamWConfig::default(), 4).expect("valid");
    learner.save(folder).expect("a writable folder");
    std::fs::write(folder.join("tokenizer.json"), "{}").expect("a writable folder");
    let out = folder.join("made/onnx");
    export_onnx(folder, &out).expect("a whole checkpoint");
    assert_eq!(ModelConfig::read(&out).expect("its config.json"), *config);
    assert_eq!(std::fs::read_to_string(out.join("tokenizer.json")).expect("its tokenizer"), "{}");
    let bytes = std::fs::read(out.join(MODEL_FILE)).expect("its graph");
    let model = ModelProto::decode(bytes.as_slice()).expect("an ONNX model");
    assert_eq!(model.opset_import[0].version, Some(17));
    model.graph.expect("a graph")
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
    for (kv_heads, tied) in [(2, false), (4, true)] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let graph = exported(&config(kv_heads, tied), folder.path());
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
                assert!(known.contains(input), "{} uses {input} before it is made", node.name());
            }
            for output in &node.output {
                assert!(known.insert(output.clone()), "{output} is made twice");
            }
        }
        assert!(known.contains(OUTPUT));
        let head = graph.initializer.iter().find(|tensor| tensor.name() == "lm_head.weight");
        assert_eq!(head.map(|tensor| tensor.dims.clone()), (!tied).then(|| vec![16, 30]));
    }
}

#[test]
fn a_checkpoint_of_another_shape_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let learner = BurnLearner::new(config(2, false), AdamWConfig::default(), 4).expect("valid");
    learner.save(folder.path()).expect("a writable folder");
    std::fs::write(folder.path().join("config.json"), config(4, false).to_hugging_face()).expect("writable");
    let error = export_onnx(folder.path(), folder.path()).expect_err("keys of another shape");
    assert!(format!("{error:#}").contains("k_proj.weight has shape"), "{error:#}");
}
