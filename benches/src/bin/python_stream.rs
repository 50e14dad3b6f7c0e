//! Tokens a second from the scored topic into `PyTorch` tensors by the wheel `sluice-feed`, beside `MosaicML` Streaming and
//! `litData` reading the same tokens from local files: processes of their own, in turn, on one machine with the broker.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use serde_json::{Value, json};
use sluice_benches::stream::write_topic;
use sluice_benches::workload::Lengths;
use sluice_tests::{Kafka, root};
use sluice_text::output::{print_line, say};

const TOPIC: &str = "scored";
const PARTITIONS: i32 = 4;
const VOCABULARY: u32 = 32_000;
/// As in the benchmark of a training step.
const LENGTHS: Lengths = Lengths { median: 400.0, sigma: 1.0, longest: 2048 };

/// What is read, and with how many worker processes of a `DataLoader`.
const SYSTEMS: [(&str, usize); 5] =
    [("sluice", 0), ("streaming", 0), ("streaming", 1), ("litdata", 0), ("litdata", 1)];

/// Tokens a second into `PyTorch` tensors; prints JSON.
#[derive(Debug, Parser)]
struct Arguments {
    /// Python with `PyTorch`, the wheel, and the peers (benches/python/requirements-streaming.txt)
    #[arg(long)]
    python: PathBuf,
    /// Documents, of 560 tokens in the mean
    #[arg(long, default_value_t = 36_000)]
    documents: usize,
    /// How often each system reads all of them, in turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

fn main() -> anyhow::Result<()> {
    let Arguments { python, documents, rounds } = Arguments::parse();
    let folder = tempfile::tempdir()?;
    let kafka = Kafka::start(&folder.path().join("kafka"));
    kafka.create_topic(TOPIC, PARTITIONS);
    let texts = LENGTHS.documents(documents, VOCABULARY);
    let tokens: usize = texts.iter().map(Vec::len).sum();
    let bytes: Vec<u8> = texts.iter().flatten().flat_map(|token| token.to_le_bytes()).collect();
    std::fs::write(folder.path().join("tokens.u32"), bytes)?;
    let tokenizer = write_topic(&kafka.bootstrap_servers, TOPIC, &texts)?;
    drop(texts);

    let script = root().join("benches/python/stream.py");
    let call = |action: &str, system: &str, workers: usize| -> anyhow::Result<String> {
        let output = Command::new(&python)
            .arg(&script)
            .args([action, system])
            .arg(folder.path())
            .args(["--workers", &workers.to_string(), "--topic", TOPIC])
            .args(["--bootstrap-servers", &kafka.bootstrap_servers, "--tokenizer", &tokenizer.to_string()])
            .args(["--vocab-size", &VOCABULARY.to_string()])
            .output()
            .with_context(|| format!("cannot start {}", python.display()))?;
        if !output.status.success() {
            bail!("{action} {system}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    };
    for system in ["streaming", "litdata"] {
        say(format_args!("{system}: writing its files"));
        call("prepare", system, 0)?;
    }
    let mut rows: Vec<Value> = Vec::new();
    for round in 0..=rounds {
        for (system, workers) in SYSTEMS {
            let printed = call("read", system, workers)?;
            let read: Value = serde_json::from_str(printed.lines().last().context("it printed nothing")?)?;
            let count = read["tokens"].as_u64().context("it counts tokens")?;
            // A peer leaves out the last tokens, which fill no row.
            ensure!(count as f64 > 0.99 * tokens as f64, "{system} read {count} of {tokens} tokens");
            say(format_args!("{system}, {workers} workers: {read}"));
            // The first round warms what the kernel keeps of files.
            if round > 0 {
                rows.push(json!({ "system": system, "workers": workers, "read": read }));
            }
        }
    }
    let versions = Command::new(&python)
        .args(["-c", "import json, litdata, streaming, torch; print(json.dumps({'litdata': litdata.__version__, 'streaming': streaming.__version__, 'torch': torch.__version__}))"])
        .output()?;
    let versions: Value = serde_json::from_slice(&versions.stdout)?;
    let command: Vec<String> = std::env::args().skip(1).filter(|word| !word.contains('/')).collect();
    let command =
        format!("target/release/python_stream --python PYTHON {}", command.join(" ").replace("--python", ""));
    print_line(
        &json!({
            "command": command.trim(),
            "tokens": tokens,
            "documents": documents,
            "batch": [8, 2048],
            "versions": versions,
            "reads": rows,
        })
        .to_string(),
    )?;
    Ok(())
}
