//! What the attention graft is worth: one model twice in one process, as it was exported and with its attention fused, batch by
//! batch in turn. CPU time of a token, at several lengths, and how far losses differ.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Parser;
use serde_json::json;
use sluice_benches::process::{cpu_seconds, median};
use sluice_benches::workload::Lengths;
use sluice_daemon::batch::{Batch, Ladder, windows};
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_daemon::score::{Score as _, Scorer};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_tests::onnxruntime;
use sluice_text::output::{print_line, say};

#[derive(Debug, Parser)]
#[command(about = "Fused attention beside the same model as it was exported")]
struct Arguments {
    /// Model folder whose graph spells its attention out, as `benches/python/spelled_out.py` makes one.
    #[arg(long)]
    model: PathBuf,
    /// What the results call it.
    #[arg(long)]
    name: String,
    /// Lengths of rows in tokens.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,2048,4096")]
    lengths: Vec<usize>,
    /// Tokens of a batch.
    #[arg(long, default_value_t = 4096)]
    tokens: usize,
    /// Batches of each kind and length.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.rounds == 0
        || arguments.lengths.iter().any(|&length| length < 2 || length > arguments.tokens)
    {
        bail!("--rounds must be at least 1, and --lengths between 2 and --tokens");
    }
    let library = onnxruntime();
    let options =
        SessionOptions { library: library.clone(), device: Device::Cpu, threads: 0, device_memory_bytes: 0 };
    let unfused = Model::load(&arguments.model, Device::Cpu, false)?;
    let vocabulary = unfused.identity.vocabulary;
    let mut fused = Model::load(&arguments.model, Device::Cpu, false)?;
    fused.fuse_attention(&library)?;
    let report = fused.attention.clone().context("attention was not looked at")?;
    let layers: usize = report.fused.values().sum();
    if layers == 0 {
        bail!("no layer's attention was fused, so there is nothing to compare: {report:?}");
    }
    let mut scorers = [Scorer::new(&unfused, &options, false)?, Scorer::new(&fused, &options, false)?];
    drop((unfused, fused));

    let load_before = load_average()?;
    let mut cases = Vec::new();
    for &length in &arguments.lengths {
        let batch = batch(vocabulary, length, arguments.tokens / length);
        let tokens = batch.padded_tokens() as f64;
        let (mut seconds, mut losses) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        // The first round is a warm-up.
        for round in 0..=arguments.rounds {
            for (which, scorer) in scorers.iter_mut().enumerate() {
                let before = cpu_seconds(std::process::id())?;
                losses[which] = scorer.score(&batch)?.losses;
                if round > 0 {
                    seconds[which].push(cpu_seconds(std::process::id())? - before);
                }
            }
        }
        let [unfused, fused] = seconds.each_ref().map(|seconds| median(seconds));
        if losses.iter().flatten().any(|loss| !loss.is_finite()) {
            bail!("the model gives losses that are not finite at {length} tokens");
        }
        let pairs = losses[0].iter().zip(&losses[1]);
        let apart = pairs.map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
        say(format_args!("{} x {length}: {:.3} of the unfused graph", batch.rows(), fused / unfused));
        cases.push(json!({
            "rows": batch.rows(),
            "length": length,
            "unfused_cpu_seconds": seconds[0],
            "fused_cpu_seconds": seconds[1],
            "unfused_cpu_microseconds_a_token": unfused / tokens * 1e6,
            "fused_cpu_microseconds_a_token": fused / tokens * 1e6,
            "ratio": fused / unfused,
            "losses_differ_by_nats": apart,
        }));
    }
    let result = json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "model": arguments.name,
        "layers_fused": layers,
        "operator": report.fused.keys().collect::<Vec<_>>(),
        "cores": std::thread::available_parallelism()?.get(),
        "rounds": arguments.rounds,
        "load_average_before": load_before,
        "load_average_after": load_average()?,
        "cases": cases,
    });
    print_line(&serde_json::to_string_pretty(&result)?)?;
    Ok(())
}

/// Rows of one length without padding.
fn batch(vocabulary: u32, length: usize, rows: usize) -> Batch {
    let policy = ContextPolicy { window: length as u32, stride: length as u32 / 2, bos: Bos::None };
    let lengths = Lengths { median: length as f64, sigma: 0.0, longest: length };
    let documents = lengths.documents(rows, vocabulary);
    let all = (0..).zip(&documents).flat_map(|(id, tokens)| windows(id, &tokens.as_slice().into(), policy));
    Batch::new(all.collect(), Ladder::new(length, 1))
}

/// Processes that ran or waited, on average over the last minute.
fn load_average() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    text.split_whitespace().next().context("no load average")?.parse().context("no load average")
}
