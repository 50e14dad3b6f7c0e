//! Peak memory of the loss head against that of whole logits, at vocabularies of 32k, 128k and 256k.
//!
//! A model of an embedding and a tied head alone, so that the head is all there is. Each measurement runs in a process of
//! its own, whose peak resident memory beyond what it had once the model was open is printed: what a batch costs over the
//! weights.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::Parser;
use ort::value::TensorRef;
use prost::Message as _;
use serde_json::json;
use sluice_benches::process::{forget_peak, peak_bytes, resident_bytes};
use sluice_daemon::batch::{Batch, Ladder, windows};
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions, open_session};
use sluice_daemon::score::{Score as _, Scorer};
use sluice_schemas::graph::{Dim, GraphBuilder, ints_attribute, raw_tensor, tensor_info};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{GraphProto, ModelProto, OperatorSetIdProto};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_tests::{golden, onnxruntime};
use sluice_text::output::{print_line, say};

const WIDTH: usize = 64;
const LENGTH: usize = 1024;

#[derive(Debug, Parser)]
#[command(about = "Peak memory of the loss head")]
enum Cli {
    /// Measure every vocabulary with both heads, and print JSON.
    All {
        /// Vocabulary and tokens of a batch, as VOCABULARY:TOKENS; may be repeated.
        #[arg(long = "case", default_values = ["32768:16384", "131072:16384", "262144:8192"])]
        cases: Vec<String>,
    },
    /// One measurement, in this process.
    #[command(hide = true)]
    One {
        vocabulary: usize,
        tokens: usize,
        #[arg(action = clap::ArgAction::Set)]
        grafted: bool,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse() {
        Cli::One { vocabulary, tokens, grafted } => {
            print_line(&one(vocabulary, tokens, grafted)?.to_string())?;
        }
        Cli::All { cases } => {
            let mut rows = Vec::new();
            for case in &cases {
                let (vocabulary, tokens) = case.split_once(':').context("a case is VOCABULARY:TOKENS")?;
                let measure = |grafted: &str| -> anyhow::Result<u64> {
                    let this = std::env::current_exe()?;
                    let output = Command::new(this).args(["one", vocabulary, tokens, grafted]).output()?;
                    if !output.status.success() {
                        bail!("{case}: {}", String::from_utf8_lossy(&output.stderr));
                    }
                    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
                };
                let (ours, whole) = (measure("true")?, measure("false")?);
                say(format_args!("{case}: {ours} bytes, whole logits {whole}"));
                rows.push(json!({
                    "vocabulary": vocabulary.parse::<u64>()?,
                    "tokens": tokens.parse::<u64>()?,
                    "loss_head_bytes": ours,
                    "whole_logits_bytes": whole,
                    "share": ours as f64 / whole as f64,
                }));
            }
            let command = std::env::args().collect::<Vec<_>>().join(" ");
            print_line(&serde_json::to_string_pretty(&json!({"command": command, "cases": rows}))?)?;
        }
    }
    Ok(())
}

/// An embedding and the head tied to it.
fn model(vocabulary: usize) -> ModelProto {
    let mut graph = GraphBuilder::new("");
    let mut random = fastrand::Rng::with_seed(1);
    let raw: Vec<u8> =
        (0..vocabulary * WIDTH).flat_map(|_| (random.f32() * 0.2 - 0.1).to_le_bytes()).collect();
    let embedding =
        graph.constant(raw_tensor(DataType::Float, &[vocabulary as i64, WIDTH as i64], raw.into()));
    let hidden = graph.node("Gather", &[&embedding, "input_ids"], vec![]);
    let head = graph.node("Transpose", &[&embedding], vec![ints_attribute("perm", &[1, 0])]);
    graph.node_to("MatMul", &[&hidden, &head], vec![], "logits");
    let (node, initializer) = graph.finish();
    let (batch, sequence) = (Dim::Named("batch"), Dim::Named("sequence"));
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(17) }],
        graph: Some(GraphProto {
            name: Some("head".to_owned()),
            node,
            initializer,
            input: vec![tensor_info("input_ids", DataType::Int64, &[batch, sequence])],
            output: vec![tensor_info(
                "logits",
                DataType::Float,
                &[batch, sequence, Dim::Fixed(vocabulary as i64)],
            )],
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Bytes that one batch of `tokens` costs over the weights.
fn one(vocabulary: usize, tokens: usize, grafted: bool) -> anyhow::Result<u64> {
    let folder = tempfile::tempdir()?;
    write_folder(folder.path(), vocabulary)?;
    let mut model = Model::load(folder.path(), Device::Cpu, false)?;
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 0, device_memory_bytes: 0 };
    let ids: Vec<u32> = (0..tokens).map(|index| (index * 7919 % vocabulary) as u32).collect();
    let policy = ContextPolicy { window: LENGTH as u32, stride: LENGTH as u32 / 2, bos: Bos::None };
    let me = std::process::id();
    let before;
    if grafted {
        let mut scorer = Scorer::new(&model, &options, false)?;
        let rows = ids.chunks(LENGTH).flat_map(|row| windows(0, &row.into(), policy)).collect();
        let batch = Batch::new(rows, Ladder::new(LENGTH, 16));
        forget_peak()?;
        before = resident_bytes(me)?;
        let losses = scorer.score(&batch)?.losses;
        if losses.len() != tokens - tokens / LENGTH {
            bail!("{} losses for {tokens} tokens", losses.len());
        }
    } else {
        model.onnx = ModelProto::decode(std::fs::read(folder.path().join("model.onnx"))?.as_slice())?;
        let mut session = open_session(&model, &options)?;
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        let shape = [tokens / LENGTH, LENGTH];
        forget_peak()?;
        before = resident_bytes(me)?;
        let outputs =
            session.run(vec![("input_ids", TensorRef::from_array_view((shape, ids.as_slice()))?)])?;
        let (_, logits) = outputs["logits"].try_extract_tensor::<f32>()?;
        if logits.len() != tokens * vocabulary {
            bail!("{} logits for {tokens} tokens", logits.len());
        }
    }
    Ok(peak_bytes(me)?.saturating_sub(before))
}

fn write_folder(folder: &Path, vocabulary: usize) -> anyhow::Result<()> {
    std::fs::write(folder.join("model.onnx"), model(vocabulary).encode_to_vec())?;
    std::fs::write(folder.join("config.json"), format!("{{\"max_position_embeddings\": {LENGTH}}}"))?;
    std::fs::copy(golden("tiny-llama/tokenizer.json"), folder.join("tokenizer.json"))?;
    Ok(())
}
