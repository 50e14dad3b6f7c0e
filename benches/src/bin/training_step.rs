//! A training step, side by side: plain and selective, with mimalloc and with glibc's allocator, and `PyTorch`'s versions of
//! the selective one. Every engine starts from the same weights and takes the same steps, so their losses must agree.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, ensure};
use clap::{Args, Parser};
use serde_json::{Value, json};
use sluice_benches::process::median;
use sluice_benches::step::{LEARNING_RATE, LEN, ROWS, batch, head_alone, learner, model};
use sluice_tests::root;
use sluice_trainer::batch::NO_TARGET;
use sluice_trainer::learner::Learner as _;

// As in sluice-train.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How far losses of two engines may be apart after as many steps, in nats.
const AGREEMENT_NATS: f64 = 2e-3;

#[derive(Debug, Parser)]
#[command(about = "A training step, side by side")]
enum Cli {
    /// Measure every engine, a step each in turn, and print JSON.
    Compare(Compare),
    /// Only our own steps, as standard input says.
    #[command(hide = true)]
    Worker,
}

#[derive(Debug, Args)]
struct Compare {
    /// A Python with `PyTorch` (`ops/setup-torch-python`); without one, our own steps alone.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Steps of each engine that count.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Steps of each engine before those.
    #[arg(long, default_value_t = 2)]
    warmup_rounds: usize,
    /// Vocabularies.
    #[arg(long, value_delimiter = ',', default_value = "8192,32768")]
    vocabularies: Vec<usize>,
    /// `PyTorch`'s versions of the step.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "torch-mask,torch-gather,torch-compiled-mask,torch-compiled-gather"
    )]
    versions: Vec<String>,
}

/// A process that takes a step when told to.
struct Worker {
    name: &'static str,
    process: Child,
    tell: ChildStdin,
    hear: BufReader<ChildStdout>,
}

impl Worker {
    fn start(name: &'static str, command: &mut Command) -> anyhow::Result<Self> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let tell = process.stdin.take().context("no standard input")?;
        let hear = BufReader::new(process.stdout.take().context("no standard output")?);
        Ok(Self { name, process, tell, hear })
    }

    fn ask(&mut self, vocabulary: usize, variant: &str) -> anyhow::Result<Value> {
        writeln!(self.tell, "{vocabulary} {variant}")?;
        let mut line = String::new();
        self.hear.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("{} ended at {vocabulary} {variant}", self.name))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[allow(clippy::print_stdout)]
fn main() -> anyhow::Result<()> {
    match Cli::parse() {
        Cli::Worker => sluice_benches::step::worker()?,
        Cli::Compare(arguments) => println!("{}", serde_json::to_string_pretty(&compare(&arguments)?)?),
    }
    Ok(())
}

fn compare(arguments: &Compare) -> anyhow::Result<Value> {
    let folder = tempfile::tempdir()?;
    let mut cases = Vec::new();
    for &vocabulary in &arguments.vocabularies {
        write_case(folder.path(), vocabulary)?;
        cases.push(case(arguments, folder.path(), vocabulary)?);
    }
    Ok(json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "cores": std::thread::available_parallelism()?.get(),
        "rows": ROWS,
        "len": LEN,
        "cases": cases,
    }))
}

/// Weights and batch for the engines that are not ours.
fn write_case(folder: &Path, vocabulary: usize) -> anyhow::Result<()> {
    for (name, config) in [("model", model(vocabulary)), ("head", head_alone(vocabulary))] {
        let folder = folder.join(format!("{name}-{vocabulary}"));
        std::fs::create_dir_all(&folder)?;
        learner(config)?.save(&folder)?;
    }
    let batch = batch(vocabulary);
    let targets: Vec<i64> =
        batch.targets.iter().map(|&id| if id == NO_TARGET { -1 } else { i64::from(id) }).collect();
    // JSON has no NaN, and where there is no target the value is not looked at.
    let reference: Vec<f32> = batch.reference.iter().map(|&x| if x.is_nan() { 0.0 } else { x }).collect();
    let value = json!({
        "rows": ROWS, "len": LEN, "learning_rate": LEARNING_RATE,
        "tokens": batch.tokens, "targets": targets, "reference": reference,
    });
    std::fs::write(folder.join(format!("batch-{vocabulary}.json")), value.to_string())?;
    Ok(())
}

fn case(arguments: &Compare, folder: &Path, vocabulary: usize) -> anyhow::Result<Value> {
    let this = std::env::current_exe()?;
    let python = |python: &Path| {
        let mut command = Command::new(python);
        command.arg(root().join("benches/python/training_step.py")).arg(folder);
        // Spinning threads would count waiting as work.
        command.env("OMP_WAIT_POLICY", "passive");
        command
    };
    let mut workers = vec![
        Worker::start("sluice", Command::new(&this).arg("worker").env("MIMALLOC_PURGE_DELAY", "-1"))?,
        Worker::start("sluice-glibc", &mut Command::new(this.with_file_name("training_step_glibc")))?,
    ];
    let mut variants = vec![(0, "plain"), (0, "slm"), (1, "slm")];
    if let Some(path) = &arguments.python {
        workers.push(Worker::start("torch", &mut python(path))?);
        variants.extend(arguments.versions.iter().map(|version| (2, version.as_str())));
    }
    let mut measured: Vec<Vec<Value>> = vec![vec![]; variants.len()];
    for round in 0..arguments.warmup_rounds + arguments.rounds {
        for (&(worker, variant), steps) in variants.iter().zip(&mut measured) {
            let step = workers[worker].ask(vocabulary, variant)?;
            eprintln!("{vocabulary} {round} {} {variant}: {step}", workers[worker].name);
            steps.push(step);
        }
    }
    let losses =
        |steps: &[Value]| -> Vec<f64> { steps.iter().filter_map(|step| step["loss"].as_f64()).collect() };
    let expected = losses(&measured[1]);
    let mut engines = Vec::new();
    for (&(worker, variant), steps) in variants.iter().zip(&measured) {
        let name = format!("{}/{variant}", workers[worker].name);
        if variant != "plain" {
            let off = expected.iter().zip(losses(steps)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            ensure!(
                off <= AGREEMENT_NATS,
                "losses of {name} are {off:e} nats off ours: the steps are not the same"
            );
        }
        let counted = &steps[arguments.warmup_rounds..];
        let all = |key: &str| -> Vec<f64> { counted.iter().filter_map(|step| step[key].as_f64()).collect() };
        engines.push(json!({
            "engine": name,
            "seconds": all("seconds"),
            "cpu_seconds": all("cpu_seconds"),
            "selecting_seconds": all("selecting_seconds"),
            "loss": losses(steps),
            "median_seconds": median(&all("seconds")),
            "median_cpu_seconds": median(&all("cpu_seconds")),
        }));
    }
    drop(workers);
    let mut memory = json!({});
    memory["sluice"] =
        Worker::start("sluice", Command::new(&this).arg("worker").env("MIMALLOC_PURGE_DELAY", "-1"))?
            .ask(vocabulary, "memory")?;
    if let Some(path) = &arguments.python {
        memory["torch"] = Worker::start("torch", &mut python(path))?.ask(vocabulary, "memory")?;
    }
    eprintln!("{vocabulary} memory of the loss: {memory}");
    Ok(
        json!({"vocabulary": vocabulary, "parameters": model(vocabulary).parameters(), "engines": engines, "loss_memory": memory}),
    )
}
