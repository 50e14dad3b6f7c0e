//! Does a device give the losses that the CPU gives, and how fast is it? Called by `ops/gpu-check`.
//!
//! Prints one JSON object. Exit code 1 where losses differ by more than they may.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use clap::Parser;
use serde_json::{Value, json};
use sluice_benches::process::median;
use sluice_benches::workload::{Lengths, matrix_elements};
use sluice_daemon::batch::{Batch, plan, windows};
use sluice_daemon::config::{Config, Sizes};
use sluice_daemon::score::documents::score_documents;
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_daemon::score::warm_up::warm_up;
use sluice_daemon::score::{Score as _, Scorer};
use sluice_schemas::record::{Bos, ContextPolicy, Precision};
use sluice_text::output::{print_line, say};

/// Compares a device with the CPU, and measures it.
#[derive(Debug, Parser)]
struct Arguments {
    /// Model folder.
    #[arg(long)]
    model: PathBuf,
    /// Device to check, as `model.device`.
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Path of libonnxruntime.so, of a build that has the device's provider.
    #[arg(long, env = "ORT_DYLIB_PATH")]
    library: PathBuf,
    /// Documents that both score.
    #[arg(long, default_value_t = 12)]
    compared: usize,
    /// Documents of one measurement.
    #[arg(long, default_value_t = 2000)]
    documents: usize,
    /// Where the measured documents are written, as a JSON list of lists of token ids.
    #[arg(long)]
    documents_into: Option<PathBuf>,
    /// Times to measure.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Padded tokens of a batch; 0 for as many as the daemon takes on the device.
    #[arg(long, default_value_t = 0)]
    tokens_max: usize,
    /// The model's window.
    #[arg(long, default_value_t = 2048)]
    window: u32,
    /// Most bytes of device memory; 0 for no limit.
    #[arg(long, default_value_t = 0)]
    device_memory_bytes: usize,
    /// What the device can do at most in 16 bits, in tera floating-point operations a second, as its data sheet says.
    /// Without it, and for a model in 32 bits, no share of it is given.
    #[arg(long)]
    peak_tflops: Option<f64>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let device: Device = arguments.device.parse().map_err(|error: String| anyhow!(error))?;
    let policy = ContextPolicy { window: arguments.window, stride: arguments.window / 2, bos: Bos::None };
    let open = |device: Device| -> anyhow::Result<(Model, Scorer)> {
        let mut model = Model::load(&arguments.model, device, false)?;
        model.fuse_attention(&arguments.library)?;
        let options = SessionOptions {
            library: arguments.library.clone(),
            device,
            threads: 0,
            device_memory_bytes: arguments.device_memory_bytes,
        };
        let scorer = Scorer::new(&model, &options, false)?;
        Ok((model, scorer))
    };
    let (model, mut scorer) = open(device)?;
    let mut config = Config::default();
    config.model.device.clone_from(&arguments.device);
    config.batch.tokens_max = arguments.tokens_max;
    let sizes = config.sizes();
    let started = Instant::now();
    let ladder = sizes.ladder(policy).split_at(model.length_limit);
    let shapes = warm_up(&mut scorer, ladder, sizes.tokens_max)?;
    let warm_up_seconds = started.elapsed().as_secs_f64();

    let vocabulary = model.identity.vocabulary;
    let lengths = Lengths { median: 400.0, sigma: 1.0, longest: arguments.window as usize };
    let compared = shared(&lengths.documents(arguments.compared, vocabulary));
    let ours = score_documents(&mut scorer, &compared, policy, sizes.tokens_max, ladder)?;
    let (_, mut cpu) = open(Device::Cpu)?;
    let theirs = score_documents(&mut cpu, &compared, policy, 4096.max(arguments.window as usize), ladder)?;
    drop(cpu);
    let differences: Vec<f64> = ours
        .iter()
        .zip(&theirs)
        .flat_map(|(ours, theirs)| ours.predicted().zip(theirs.predicted()))
        .map(|(ours, theirs)| f64::from(ours - theirs).abs())
        .collect();
    let worst = differences.iter().copied().fold(0.0, f64::max);
    let rms = (differences.iter().map(|d| d * d).sum::<f64>() / differences.len() as f64).sqrt();
    // What engines have been seen to differ by, in 32 bits and in 16.
    let allowed_rms = if model.identity.precision == Precision::F32 { 0.002 } else { 0.03 };

    let documents = lengths.documents(arguments.documents, vocabulary);
    if let Some(path) = &arguments.documents_into {
        std::fs::write(path, serde_json::to_vec(&documents)?)?;
    }
    let batches = plan_all(&documents, policy, sizes);
    let measured = measure(&mut scorer, &batches, &model, (&arguments, sizes.tokens_max))?;
    let result = json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "model": arguments.model.file_name().map(|name| name.to_string_lossy()),
        "precision": format!("{:?}", model.identity.precision).to_lowercase(),
        "device": arguments.device,
        "compared_tokens": differences.len(),
        "worst_difference_nats": worst,
        "rms_difference_nats": rms,
        "allowed_rms_nats": allowed_rms,
        "agrees": rms <= allowed_rms,
        "shapes_warmed": shapes,
        "warm_up_seconds": warm_up_seconds,
        "measured": measured,
    });
    print_line(&serde_json::to_string_pretty(&result)?)?;
    if rms > allowed_rms {
        bail!("losses differ by {rms:.1e} nats RMS from the CPU's, and may by {allowed_rms:.0e}");
    }
    Ok(())
}

fn shared(documents: &[Vec<u32>]) -> Vec<Arc<[u32]>> {
    documents.iter().map(|tokens| tokens.as_slice().into()).collect()
}

fn plan_all(documents: &[Vec<u32>], policy: ContextPolicy, sizes: Sizes) -> Vec<Batch> {
    let shared = shared(documents);
    let all = (0..).zip(&shared).flat_map(|(id, tokens)| windows(id, tokens, policy)).collect();
    plan(all, sizes.tokens_max, sizes.ladder(policy))
}

fn measure(
    scorer: &mut Scorer,
    batches: &[Batch],
    model: &Model,
    (arguments, tokens_max): (&Arguments, usize),
) -> anyhow::Result<Value> {
    let tokens: usize = batches.iter().map(Batch::real_tokens).sum();
    let padded: usize = batches.iter().map(Batch::padded_tokens).sum();
    let targets: usize = batches.iter().map(|batch| batch.targets.len()).sum();
    let mut seconds = Vec::new();
    for repeat in 0..arguments.repeats {
        let started = Instant::now();
        for batch in batches {
            scorer.score(batch)?;
        }
        seconds.push(started.elapsed().as_secs_f64());
        say(format_args!("repeat {repeat}: {:.0} tokens/s", tokens as f64 / seconds[repeat]));
    }
    let elements = matrix_elements(&arguments.model).context("cannot count the model's weights")?;
    // Two operations for each weight of a product and token; attention's own products are left out, so the share is
    // never flattered. The body sees padding, which is no use and not counted.
    let flops = 2.0 * (tokens as f64 * elements.body as f64 + targets as f64 * elements.head as f64);
    let middle = median(&seconds);
    // A peak is one of 16-bit arithmetic; a share of it says nothing of a model in 32 bits.
    let peak = arguments.peak_tflops.filter(|_| model.identity.precision != Precision::F32);
    Ok(json!({
        "documents": arguments.documents,
        "tokens": tokens,
        "padded_per_real_token": padded as f64 / tokens as f64,
        "tokens_max": tokens_max,
        "seconds": seconds,
        "median_tokens_per_second": tokens as f64 / middle,
        "vocabulary": model.identity.vocabulary,
        "weights_in_products": elements.body + elements.head,
        "tflops": flops / middle / 1e12,
        "share_of_peak": peak.map(|peak| flops / middle / 1e12 / peak),
    }))
}
