//! Operators and opsets that the golden exports do not have: a head of four bits, and the opsets of newer exporters.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use sluice_daemon::batch::Ladder;
use sluice_daemon::score::Scorer;
use sluice_daemon::score::documents::score_documents;
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_schemas::graph::{int_attribute, raw_tensor};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{ModelProto, NodeProto, OperatorSetIdProto, TensorProto};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_tests::{golden, onnxruntime};

/// Weights that share a scale.
const BLOCK: usize = 32;

fn read(name: &str) -> ModelProto {
    ModelProto::decode(std::fs::read(golden(name).join("model.onnx")).unwrap().as_slice()).unwrap()
}

/// What the head is, and the losses of a document, of `model` with the other files of the golden `name`.
fn scored(name: &str, model: &ModelProto) -> (String, Vec<f32>) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::copy(golden("tiny-llama/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    std::fs::write(folder.path().join("model.onnx"), model.encode_to_vec()).unwrap();
    let model = Model::load(folder.path(), Device::Cpu, false).unwrap();
    (model.report.head.clone(), losses(&model))
}

fn losses(model: &Model) -> Vec<f32> {
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(model, &options, false).unwrap();
    let document: Arc<[u32]> = (0..60).map(|place| place * 37 % 120).collect();
    let context = ContextPolicy { window: 64, stride: 32, bos: Bos::None };
    let scores = score_documents(&mut scorer, &[document], context, 256, Ladder::new(64, 16)).unwrap();
    scores[0].predicted().collect()
}

#[test]
fn newer_opsets_give_the_same_losses() {
    let name = "exports/torch-dynamo-llama";
    let mut model = read(name);
    let (_, expected) = scored(name, &model);
    assert_eq!(expected.len(), 59);
    for (opset, ir) in [(22, 10), (23, 11), (24, 12), (25, 13)] {
        let standard = model.opset_import.iter_mut().find(|import| import.domain().is_empty()).unwrap();
        assert!(standard.version() < opset);
        standard.version = Some(opset);
        model.ir_version = Some(ir);
        assert_eq!(scored(name, &model).1, expected, "opset {opset}");
    }
}

/// What onnxruntime's `quantize_dynamic` puts before each product: the scale is that of everything in the batch.
#[test]
fn a_model_that_quantizes_over_its_batch_is_refused_by_its_node() {
    for operator in ["DynamicQuantizeLinear", "DynamicQuantizeMatMul"] {
        let mut model = read("tiny-llama");
        let graph = model.graph.as_mut().unwrap();
        let node = graph.node.iter_mut().find(|node| node.op_type() == "MatMul").unwrap();
        node.op_type = Some(operator.to_owned());
        node.name = Some("/layers.0/quantize".to_owned());
        let folder = tempfile::tempdir().unwrap();
        for file in ["config.json", "tokenizer.json"] {
            std::fs::copy(golden("tiny-llama").join(file), folder.path().join(file)).unwrap();
        }
        std::fs::write(folder.path().join("model.onnx"), model.encode_to_vec()).unwrap();
        let error = format!("{:#}", Model::load(folder.path(), Device::Cpu, false).unwrap_err());
        assert!(error.contains("`/layers.0/quantize`") && error.contains(operator), "{error}");
    }
}

/// Four bits for each weight of a matrix of `width` columns: the packed values, their scales, and the matrix that they stand
/// for. `MatMulNBits` has the columns one after the other, each in blocks of two values a byte.
fn quantized(weights: &[f32], width: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
    let height = weights.len() / width;
    let (mut packed, mut scales, mut meant) = (Vec::new(), Vec::new(), vec![0.0; weights.len()]);
    for column in 0..width {
        for block in (0..height).step_by(BLOCK) {
            let rows = || (block..block + BLOCK).map(|row| row * width + column);
            let most = rows().map(|place| weights[place].abs()).fold(f32::MIN_POSITIVE, f32::max);
            let scale = most / 7.0;
            let values: Vec<u8> =
                rows().map(|place| ((weights[place] / scale).round() + 8.0) as u8).collect();
            for (place, &value) in rows().zip(&values) {
                meant[place] = (f32::from(value) - 8.0) * scale;
            }
            packed.extend(values.chunks(2).map(|pair| pair[0] | pair[1] << 4));
            scales.push(scale);
        }
    }
    (packed, scales, meant)
}

/// What `quantized` gives, as `DequantizeLinear` has it along the first axis: row by row, the values in two's complement.
fn row_by_row(packed: &[u8], scales: &[f32], width: usize) -> (Vec<u8>, Vec<f32>) {
    fn transposed<T: Copy>(columns: &[T], width: usize) -> Vec<T> {
        let height = columns.len() / width;
        (0..columns.len()).map(|at| columns[at % width * height + at / width]).collect()
    }
    let values: Vec<u8> = packed.iter().flat_map(|pair| [pair & 15, pair >> 4]).collect();
    let values = transposed(&values, width);
    (values.chunks(2).map(|pair| pair[0] ^ 8 | (pair[1] ^ 8) << 4).collect(), transposed(scales, width))
}

fn values_of(tensor: &TensorProto) -> Vec<f32> {
    let words = tensor.raw_data().chunks_exact(4);
    words.map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
}

fn floats(dims: &[i64], values: &[f32], name: &str) -> TensorProto {
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut tensor = raw_tensor(DataType::Float, dims, Bytes::from(raw));
    tensor.name = Some(name.to_owned());
    tensor
}

#[test]
fn a_head_of_four_bits_is_moved_as_one_of_floats() {
    let name = "tiny-llama";
    let mut model = read(name);
    let graph = model.graph.as_mut().unwrap();
    let weight = graph.node.last().unwrap().input[1].clone();
    let at = graph.initializer.iter().position(|tensor| tensor.name() == weight).unwrap();
    let dims = graph.initializer[at].dims.clone();
    let (height, width) = (dims[0] as usize, dims[1] as usize);
    assert!(height.is_multiple_of(BLOCK), "{dims:?}");
    let (packed, scales, meant) = quantized(&values_of(&graph.initializer[at]), width);
    graph.initializer[at] = floats(&dims, &meant, &weight);
    let (head, expected) = scored(name, &model);
    assert!(head.contains("(MatMul)"), "{head}");

    let blocks = (height / BLOCK) as i64;
    let graph = model.graph.as_mut().unwrap();
    graph.initializer.remove(at);
    let mut values = raw_tensor(DataType::Uint8, &[dims[1], blocks, BLOCK as i64 / 2], Bytes::from(packed));
    values.name = Some("packed".to_owned());
    graph.initializer.push(values);
    graph.initializer.push(floats(&[dims[1] * blocks], &scales, "scales"));
    let node = graph.node.last_mut().unwrap();
    node.op_type = Some("MatMulNBits".to_owned());
    node.domain = Some("com.microsoft".to_owned());
    node.input.truncate(1);
    node.input.extend(["packed".to_owned(), "scales".to_owned()]);
    let sizes = [("K", dims[0]), ("N", dims[1]), ("bits", 4), ("block_size", BLOCK as i64)];
    node.attribute = sizes.into_iter().map(|(key, value)| int_attribute(key, value)).collect();
    let microsoft = OperatorSetIdProto { domain: Some("com.microsoft".to_owned()), version: Some(1) };
    model.opset_import.push(microsoft);
    let (head, found) = scored(name, &model);
    assert!(head.contains("(MatMulNBits)"), "{head}");
    assert_eq!(found.len(), expected.len());
    let worst = found.iter().zip(&expected).map(|(found, expected)| (found - expected).abs());
    let worst = worst.fold(0.0, f32::max);
    assert!(worst < 2e-5, "{worst} nats apart");
}

/// ONNX Runtime fuses such weights with their products and, unless it is told otherwise, rounds what they are multiplied with to 8
/// bits: 0.05 nats in `tiny-llama`.
#[test]
fn weights_that_the_graph_widens_from_four_bits_are_multiplied_in_float32() {
    let name = "exports/torch-dynamo-llama";
    let mut model = read(name);
    let standard = model.opset_import.iter_mut().find(|import| import.domain().is_empty()).unwrap();
    // The first with numbers of four bits.
    standard.version = Some(21);
    let mut of_floats = model.clone();
    let nodes = &model.graph.as_ref().unwrap().node;
    let products: Vec<NodeProto> = nodes.iter().filter(|node| node.op_type() == "MatMul").cloned().collect();
    let mut widened = 0;
    for product in products {
        let weight = product.input[1].as_str();
        let graph = model.graph.as_mut().unwrap();
        let Some(at) = graph.initializer.iter().position(|tensor| tensor.name() == weight) else { continue };
        let dims = graph.initializer[at].dims.clone();
        let (height, width) = (dims[0] as usize, dims[1] as usize);
        if !height.is_multiple_of(BLOCK) {
            continue;
        }
        let (packed, scales, meant) = quantized(&values_of(&graph.initializer[at]), width);
        let initializers = &mut of_floats.graph.as_mut().unwrap().initializer;
        let slot = initializers.iter_mut().find(|tensor| tensor.name() == weight).unwrap();
        *slot = floats(&dims, &meant, weight);

        let (values, scales) = row_by_row(&packed, &scales, width);
        let (values_name, scales_name) = (format!("{weight}_int4"), format!("{weight}_scales"));
        let mut values = raw_tensor(DataType::Int4, &dims, Bytes::from(values));
        values.name = Some(values_name.clone());
        graph.initializer[at] = values;
        graph.initializer.push(floats(&[dims[0] / BLOCK as i64, dims[1]], &scales, &scales_name));
        let widen = NodeProto {
            op_type: Some("DequantizeLinear".to_owned()),
            name: Some(format!("{weight}_widened")),
            input: vec![values_name, scales_name],
            output: vec![weight.to_owned()],
            attribute: vec![int_attribute("axis", 0), int_attribute("block_size", BLOCK as i64)],
            ..Default::default()
        };
        graph.node.insert(0, widen);
        widened += 1;
    }
    assert_eq!(widened, 7, "four of attention, two of the rest, and the head");
    let (_, expected) = scored(name, &of_floats);
    let (_, found) = scored(name, &model);
    assert_eq!(found.len(), expected.len());
    let worst = found.iter().zip(&expected).map(|(found, expected)| (found - expected).abs());
    let worst = worst.fold(0.0, f32::max);
    assert!(worst < 2e-5, "{worst} nats apart");
}
