//! Scoring speed, side by side on the same model and the same documents:
//!
//! - `bare`: `Session::run` on ideal batches, in a loop that does nothing else;
//! - `daemon`: `sluiced serve` from Kafka to Kafka, exactly once;
//! - `onnxruntime`: a Python loop with confluent-kafka, onnxruntime, whole logits and numpy;
//! - `transformers`: Hugging Face transformers and `PyTorch`, batched and sorted by length;
//! - `transformers-onednn`: the same with oneDNN's products.
//!
//! `scoring round` runs each of them once and adds the round to a file, so that rounds interleave with whatever else the
//! machine does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::{Args, Parser};
use serde_json::{Value, json};
use sluice_benches::process::{cpu_seconds, peak_bytes, thread_cpu_seconds};
use sluice_benches::through_daemon::publish;
use sluice_benches::workload::Lengths;
use sluice_daemon::batch::{Ladder, plan, windows};
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_daemon::score::{Score as _, Scorer};
use sluice_schemas::record::{Bos, ContextPolicy, ScoredDocument};
use sluice_tests::{Daemon, Kafka, onnxruntime, read_all, root};
use sluice_text::output::{print_line, say};

const PARTITIONS: i32 = 4;
/// Each look at the daemon's metrics costs it a little of what is measured, and one look more or less is this much time.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Parser)]
#[command(about = "Scoring speed, side by side")]
enum Cli {
    /// Run every system once and add the round to a file.
    Round(RoundArguments),
    /// Only `Session::run`, in this process; prints its measurement.
    #[command(hide = true)]
    Bare(Workload),
}

#[derive(Clone, Debug, Args)]
struct Workload {
    /// The model folder, as `sluiced` serves it.
    #[arg(long)]
    model: PathBuf,
    /// Documents.
    #[arg(long, default_value_t = 40)]
    documents: usize,
    /// Median length of a document in tokens; lengths are lognormal.
    #[arg(long, default_value_t = 200.0)]
    median: f64,
    /// Standard deviation of the logarithm of a length.
    #[arg(long, default_value_t = 0.9)]
    sigma: f64,
    /// Longest document in tokens, and the model's window.
    #[arg(long, default_value_t = 1024)]
    longest: usize,
    /// Padded tokens of a batch.
    #[arg(long, default_value_t = 2048)]
    tokens_max: usize,
}

#[derive(Debug, Args)]
struct RoundArguments {
    #[command(flatten)]
    workload: Workload,
    /// The same model with its weights as model.safetensors.
    #[arg(long)]
    checkpoint: PathBuf,
    /// Python with torch and transformers, as `ops/setup-torch-python` prints it.
    #[arg(long)]
    python: PathBuf,
    /// Run these alone, separated by commas; for a stream too long for the slow ones.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "bare,daemon,onnxruntime,transformers,transformers-onednn"
    )]
    systems: Vec<String>,
    /// JSON of all rounds; made if it is not there.
    #[arg(long)]
    into: PathBuf,
}

impl Workload {
    fn policy(&self) -> ContextPolicy {
        ContextPolicy { window: self.longest as u32, stride: self.longest as u32 / 2, bos: Bos::None }
    }

    fn documents(&self, vocabulary: u32) -> Vec<Vec<u32>> {
        let lengths = Lengths { median: self.median, sigma: self.sigma, longest: self.longest };
        lengths.documents(self.documents, vocabulary)
    }

    fn flags(&self) -> Vec<String> {
        [
            ("--documents", self.documents.to_string()),
            ("--median", self.median.to_string()),
            ("--sigma", self.sigma.to_string()),
            ("--longest", self.longest.to_string()),
            ("--tokens-max", self.tokens_max.to_string()),
            ("--model", self.model.display().to_string()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect()
    }
}

fn main() -> anyhow::Result<()> {
    match Cli::parse() {
        Cli::Bare(workload) => {
            print_line(&bare(&workload)?.to_string())?;
        }
        Cli::Round(arguments) => round(&arguments)?,
    }
    Ok(())
}

/// The model on batches of all documents sorted by length: nothing can feed it faster.
fn bare(workload: &Workload) -> anyhow::Result<Value> {
    let model = Model::load(&workload.model, Device::Cpu, false)?;
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 0, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(&model, &options, false)?;
    let documents = workload.documents(model.identity.vocabulary);
    let shared: Vec<Arc<[u32]>> = documents.iter().map(|tokens| tokens.as_slice().into()).collect();
    let all = (0..).zip(&shared).flat_map(|(id, tokens)| windows(id, tokens, workload.policy())).collect();
    let batches = plan(all, workload.tokens_max, Ladder::new(workload.longest, 16));
    // The largest batch, so that memory is had.
    scorer.score(&batches[0])?;
    let (started, cpu) = (Instant::now(), cpu_seconds(std::process::id())?);
    let (mut sum, mut count, mut tokens, mut padded) = (0.0, 0, 0, 0);
    for batch in &batches {
        let losses = scorer.score(batch)?.losses;
        sum += losses.iter().copied().map(f64::from).sum::<f64>();
        count += losses.len();
        tokens += batch.real_tokens();
        padded += batch.padded_tokens();
    }
    Ok(json!({
        "seconds": started.elapsed().as_secs_f64(),
        "cpu_seconds": cpu_seconds(std::process::id())? - cpu,
        "tokens": tokens,
        "padded_tokens": padded,
        "mean_loss": sum / count as f64,
    }))
}

fn round(arguments: &RoundArguments) -> anyhow::Result<()> {
    let workload = &arguments.workload;
    let model = Model::load(&workload.model, Device::Cpu, false)?;
    let documents = workload.documents(model.identity.vocabulary);
    let mut results = match std::fs::read(&arguments.into) {
        Ok(bytes) => serde_json::from_slice(&bytes).context("the results file is not one of ours")?,
        Err(_) => json!({
            "command": std::env::args().collect::<Vec<_>>().join(" "),
            "documents": documents.len(),
            "tokens": documents.iter().map(Vec::len).sum::<usize>(),
            "cores": std::thread::available_parallelism()?.get(),
            "rounds": [],
        }),
    };
    let scratch = root().join("target/bench-scoring");
    std::fs::create_dir_all(&scratch)?;
    let kafka = Kafka::start(&root().join("target/bench-kafka"));
    let run = format!("scoring-{}", std::process::id());
    let topic = format!("{run}.documents");
    kafka.create_topic(&topic, PARTITIONS);
    publish(&kafka.bootstrap_servers, &topic, model.identity.tokenizer, documents.iter().cloned());
    let file = scratch.join("documents.json");
    std::fs::write(&file, serde_json::to_vec(&documents)?)?;

    let this = std::env::current_exe()?;
    let mut measured = serde_json::Map::new();
    let scripts = root().join("benches/python");
    for system in &arguments.systems {
        let value = match system.as_str() {
            "bare" => child(Command::new(&this).arg("bare").args(workload.flags()))?,
            "daemon" => daemon(&kafka, &run, &topic, workload, documents.len())?,
            "onnxruntime" => {
                let out = format!("{run}.python");
                kafka.create_topic(&out, PARTITIONS);
                let mut command = Command::new(&arguments.python);
                command.arg(scripts.join("onnxruntime_loop.py")).arg("--model").arg(&workload.model);
                command.args(["--bootstrap-servers", &kafka.bootstrap_servers, "--topic", &topic]);
                child(command.args(["--out", &out, "--count", &documents.len().to_string()]))?
            }
            "transformers" | "transformers-onednn" => {
                let mut command = Command::new(&arguments.python);
                command
                    .arg(scripts.join("transformers_loop.py"))
                    .arg("--checkpoint")
                    .arg(&arguments.checkpoint);
                command
                    .arg("--documents")
                    .arg(&file)
                    .args(["--tokens-max", &workload.tokens_max.to_string()]);
                if system == "transformers-onednn" {
                    command.arg("--onednn");
                }
                // Spinning threads would count waiting as work.
                child(command.env("OMP_WAIT_POLICY", "passive"))?
            }
            unknown => bail!(
                "--systems: `{unknown}` is none of bare, daemon, onnxruntime, transformers and transformers-onednn"
            ),
        };
        say(format_args!("{system}: {value}"));
        measured.insert(system.clone(), value);
    }

    results["rounds"].as_array_mut().context("the results file has no rounds")?.push(measured.into());
    std::fs::write(&arguments.into, serde_json::to_string_pretty(&results)? + "\n")?;
    Ok(())
}

/// Runs a measurement in a process of its own and reads what it prints.
fn child(command: &mut Command) -> anyhow::Result<Value> {
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        bail!("{command:?} failed");
    }
    let text = String::from_utf8(output.stdout)?;
    serde_json::from_str(text.trim().lines().last().unwrap_or_default()).context("no measurement was printed")
}

/// The real daemon, from the first record read to the last one committed.
fn daemon(
    kafka: &Kafka,
    run: &str,
    topic: &str,
    workload: &Workload,
    documents: usize,
) -> anyhow::Result<Value> {
    let (scored, dead) = (format!("{run}.scored"), format!("{run}.dead-letters"));
    kafka.create_topic(&scored, PARTITIONS);
    kafka.create_topic(&dead, 1);
    let (window, tokens_max) = (workload.longest.to_string(), workload.tokens_max.to_string());
    let flags = [
        ("--kafka-documents-topic", topic),
        ("--kafka-scored-topic", &scored),
        ("--kafka-dead-letter-topic", &dead),
        ("--kafka-group-id", run),
        ("--score-window-tokens", &window),
        ("--batch-tokens-max", &tokens_max),
    ];
    let flags: Vec<&str> = flags.iter().flat_map(|&(flag, value)| [flag, value]).collect();
    let daemon = Daemon::start_with(&kafka.bootstrap_servers, &workload.model, &flags);
    while daemon.metric("sluiced_documents_read_total") == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let broker = || kafka.process_ids().iter().map(|&id| cpu_seconds(id)).sum::<anyhow::Result<f64>>();
    let broker_cpu = broker()?;
    let (started, cpu, threads) =
        (Instant::now(), cpu_seconds(daemon.id())?, thread_cpu_seconds(daemon.id())?);
    while daemon.finished() < documents {
        std::thread::sleep(LOOK);
    }
    let seconds = started.elapsed().as_secs_f64();
    let spent = |(name, seconds): (String, f64)| {
        let spent = seconds - threads.get(&name).copied().unwrap_or(0.0);
        (name, spent)
    };
    let threads: BTreeMap<String, f64> =
        thread_cpu_seconds(daemon.id())?.into_iter().map(spent).filter(|&(_, spent)| spent > 0.0).collect();
    let mut measured = json!({
        "seconds": seconds,
        "cpu_seconds": cpu_seconds(daemon.id())? - cpu,
        "cpu_seconds_of_threads": threads,
        "cpu_seconds_of_the_broker": broker()? - broker_cpu,
        "tokens": daemon.metric("sluiced_tokens_scored_total"),
        "padded_tokens": daemon.metric("sluiced_padded_tokens_total"),
        "peak_bytes": peak_bytes(daemon.id())?,
    });
    daemon.stop();
    measured["mean_loss"] = json!(mean_loss(kafka, &scored)?);
    Ok(measured)
}

/// Mean of all losses in the scored topic, so that every system shows what it computed.
fn mean_loss(kafka: &Kafka, topic: &str) -> anyhow::Result<f64> {
    let (mut sum, mut count) = (0.0, 0_u32);
    for record in read_all(&kafka.bootstrap_servers, topic) {
        let scored = ScoredDocument::decode(record.payload.unwrap_or_default())?;
        for loss in scored.reference_losses.iter().skip(1) {
            sum += f64::from(loss);
            count += 1;
        }
    }
    Ok(sum / f64::from(count))
}
