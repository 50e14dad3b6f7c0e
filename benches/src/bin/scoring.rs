//! Scoring speed, side by side on the same model and the same documents:
//!
//! - `session`: `Session::run` on ideal batches, in a loop that does nothing else, of the model as it was exported and a session
//!   as a user opens it: default options, whole logits;
//! - `bare`: the same of the graph that the daemon makes of the model, with its options;
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
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, TensorRef};
use serde_json::{Value, json};
use sluice_benches::process::{cpu_seconds, peak_bytes, thread_cpu_seconds};
use sluice_benches::through_daemon::publish;
use sluice_benches::workload::Lengths;
use sluice_daemon::batch::{Batch, Ladder, plan, windows};
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
    /// Only `Session::run` of the daemon's graph, in this process; prints its measurement.
    #[command(hide = true)]
    Bare(Workload),
    /// Only `Session::run` of the model as it was exported, in this process; prints its measurement.
    #[command(hide = true)]
    Session(Workload),
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
        default_value = "session,bare,daemon,onnxruntime,transformers,transformers-onednn"
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
        Cli::Session(workload) => {
            print_line(&session(&workload)?.to_string())?;
        }
        Cli::Round(arguments) => round(&arguments)?,
    }
    Ok(())
}

/// The daemon's graph on batches of all documents sorted by length: nothing can feed it faster.
fn bare(workload: &Workload) -> anyhow::Result<Value> {
    let mut model = Model::load(&workload.model, Device::Cpu, false)?;
    model.fuse_attention(&onnxruntime())?;
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 0, device_memory_bytes: 0 };
    let mut scorer = Scorer::new(&model, &options, false)?;
    on_ideal_batches(workload, model.identity.vocabulary, |batch| {
        let losses = scorer.score(batch)?.losses;
        Ok(move || losses.iter().copied().map(f64::from).sum())
    })
}

/// The model as it was exported on the same batches, in a session as a user opens it. What makes losses of its logits is not timed.
fn session(workload: &Workload) -> anyhow::Result<Value> {
    let vocabulary = Model::load(&workload.model, Device::Cpu, false)?.identity.vocabulary;
    let environment = ort::init_from(onnxruntime())?.build()?;
    let mut session = Session::builder(&environment)?.commit_from_file(workload.model.join("model.onnx"))?;
    let names: Vec<String> = session.inputs().iter().map(|input| input.name().to_owned()).collect();
    on_ideal_batches(workload, vocabulary, |batch| {
        let shape = [batch.padded_rows, batch.padded_len];
        let mut feed: Vec<(&str, SessionInputValue<'_>)> = Vec::new();
        for name in &names {
            let values = match name.as_str() {
                "input_ids" => &batch.tokens,
                "attention_mask" => &batch.attention_mask,
                "position_ids" => &batch.position_ids,
                other => {
                    bail!("the model asks for `{other}`; this system feeds token ids, a mask and positions")
                }
            };
            feed.push((name, TensorRef::from_array_view((shape, values.as_slice()))?.into()));
        }
        let mut outputs = session.run(feed)?;
        let logits = outputs.remove("logits").context("the model gives no logits")?;
        let (rows, targets) = (batch.target_rows.clone(), batch.targets.clone());
        Ok(move || sum_of_losses(&logits, &rows, &targets))
    })
}

/// The sum of the losses of these targets, each at its row of the logits `[.., vocabulary]`.
fn sum_of_losses(logits: &DynValue, rows: &[i64], targets: &[i64]) -> f64 {
    let (shape, values) = logits.try_extract_tensor::<f32>().expect("the logits are float32");
    let width = shape.last().map_or(0, |&width| width as usize);
    let loss = |(&row, &target): (&i64, &i64)| {
        let own = &values[row as usize * width..][..width];
        let most = own.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = own.iter().map(|&logit| f64::from(logit - most).exp()).sum();
        sum.ln() + f64::from(most - own[target as usize])
    };
    rows.iter().zip(targets).map(loss).sum()
}

/// Times `run` on batches of all documents sorted by length. What it returns sums up the losses of a batch, beside the clock.
fn on_ideal_batches<S: FnOnce() -> f64>(
    workload: &Workload,
    vocabulary: u32,
    mut run: impl FnMut(&Batch) -> anyhow::Result<S>,
) -> anyhow::Result<Value> {
    let documents = workload.documents(vocabulary);
    let shared: Vec<Arc<[u32]>> = documents.iter().map(|tokens| tokens.as_slice().into()).collect();
    let all = (0..).zip(&shared).flat_map(|(id, tokens)| windows(id, tokens, workload.policy())).collect();
    let batches = plan(all, workload.tokens_max, Ladder::new(workload.longest, 16));
    // The largest batch, so that memory is had.
    run(&batches[0])?();
    let (mut seconds, mut cpu) = (0.0, 0.0);
    let (mut sum, mut count, mut tokens, mut padded) = (0.0, 0, 0, 0);
    for batch in &batches {
        let (started, cpu_before) = (Instant::now(), cpu_seconds(std::process::id())?);
        let losses = run(batch)?;
        seconds += started.elapsed().as_secs_f64();
        cpu += cpu_seconds(std::process::id())? - cpu_before;
        sum += losses();
        count += batch.targets.len();
        tokens += batch.real_tokens();
        padded += batch.padded_tokens();
    }
    Ok(json!({
        "seconds": seconds,
        "cpu_seconds": cpu,
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
            "session" | "bare" => child(Command::new(&this).arg(system).args(workload.flags()))?,
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
                "--systems: `{unknown}` is none of session, bare, daemon, onnxruntime, transformers and transformers-onednn"
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
