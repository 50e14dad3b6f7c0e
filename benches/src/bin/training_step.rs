//! A training step, side by side: plain and selective, with mimalloc and with glibc's allocator, and `PyTorch`'s versions of
//! the selective one. Every engine starts from the same weights and takes the same steps, so their losses must agree.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, ensure};
use clap::{Args, Parser, ValueEnum as _};
use serde_json::{Value, json};
use sluice_benches::process::median;
use sluice_benches::step::{LEARNING_RATE, Setup, head_alone};
use sluice_benches::{device_check, stream};
use sluice_feed::batch::NO_TARGET;
use sluice_tests::root;
use sluice_text::output::{print_line, say};
use sluice_trainer::model::config::CONFIG_FILE;
use sluice_trainer::model::{DeviceName, ModelConfig, Precision};
use sluice_trainer::run::files::write_whole;
use sluice_trainer::run::tensors::write_tensors;
use sluice_trainer::training::learner::WEIGHTS_FILE;

// As in sluice-train.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How far losses of two engines may be apart after as many steps, in nats, in 32 bits and in 16.
const AGREEMENT_NATS: [f64; 2] = [2e-3, 3e-2];

#[derive(Debug, Parser)]
#[command(about = "A training step, side by side")]
enum Cli {
    /// Measure every engine, a step each in turn, and print JSON.
    Compare(Compare),
    /// Train a tiny run on a device and on the CPU, and compare their losses; exit code 1 where they differ.
    Check {
        /// Device to check.
        #[arg(long)]
        device: DeviceName,
        /// Precision of its products.
        #[arg(long, value_enum, default_value_t = Precision::F32)]
        precision: Precision,
    },
    /// Only our own steps, as standard input says.
    #[command(hide = true)]
    Worker {
        #[command(flatten)]
        setup: Setup,
    },
    /// Fails where a device cannot be used.
    #[command(hide = true)]
    ProbeDevice { device: DeviceName },
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
    /// Our own versions of the step, of which slm must be one: `plain`, or `slm`, `kept` (--backward kept) and `chosen` (the same,
    /// chosen before the forward pass), with the percentage that is kept behind a hyphen, 60 without; each row a micro-batch with
    /// `once:` before it, and one that competes with the others with `twice:`.
    #[arg(long, value_delimiter = ',', default_value = "plain,slm")]
    ours: Vec<String>,
    /// Our own versions of which the memory of a step is measured too.
    #[arg(long, value_delimiter = ',')]
    tapes: Vec<String>,
    /// `PyTorch`'s versions of the step.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "torch-mask,torch-gather,torch-compiled-mask,torch-compiled-gather,torch-onednn-gather"
    )]
    versions: Vec<String>,
    /// `benches/python/training_step.py`, where it lies elsewhere.
    #[arg(long)]
    script: Option<PathBuf>,
    #[command(flatten)]
    setup: Setup,
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

fn main() -> anyhow::Result<()> {
    match Cli::parse() {
        Cli::Worker { setup } => sluice_benches::step::worker(&setup)?,
        Cli::ProbeDevice { device } => device.probe(),
        Cli::Compare(arguments) => {
            print_line(&serde_json::to_string_pretty(&compare(&arguments)?)?)?;
        }
        Cli::Check { device, precision } => {
            let found = device_check::check(device, precision)?;
            print_line(&serde_json::to_string_pretty(&found)?)?;
            ensure!(found["agrees"] == true, "{device} does not train as the CPU does");
        }
    }
    Ok(())
}

fn compare(arguments: &Compare) -> anyhow::Result<Value> {
    let folder = tempfile::tempdir()?;
    let setup = &arguments.setup;
    ensure!(
        arguments.python.is_none() || setup.document.is_none(),
        "PyTorch's versions know no documents within a sequence: leave out --python or --document"
    );
    let mut cases = Vec::new();
    for &vocabulary in &arguments.vocabularies {
        if arguments.python.is_some() {
            write_case(folder.path(), setup, vocabulary)?;
        }
        cases.push(case(arguments, folder.path(), vocabulary)?);
    }
    let python = arguments.python.as_ref().map(|path| path.display().to_string());
    let command = std::env::args().map(|word| {
        // Where it lies says nothing elsewhere.
        if Some(&word) == python.as_ref() { "$(ops/setup-torch-python)".to_owned() } else { word }
    });
    Ok(json!({
        "command": command.collect::<Vec<_>>().join(" "),
        "cores": std::thread::available_parallelism()?.get(),
        "device": setup.device.to_string(),
        "precision": setup.precision,
        "rows": setup.rows,
        "len": setup.len,
        "document": setup.document,
        "peer": peer(arguments, folder.path())?,
        "size": setup.size.to_possible_value().map(|size| size.get_name().to_owned()),
        "cases": cases,
    }))
}

/// Weights and batch for the engines that are not ours.
fn write_case(folder: &Path, setup: &Setup, vocabulary: usize) -> anyhow::Result<()> {
    let on_cpu = Setup { device: DeviceName::Cpu, ..*setup };
    let write = |name: &str, config: ModelConfig| -> anyhow::Result<()> {
        let folder = folder.join(format!("{name}-{vocabulary}"));
        std::fs::create_dir_all(&folder)?;
        write_whole(&folder.join(CONFIG_FILE), config.to_hugging_face().as_bytes())?;
        let weights = on_cpu.learner(config)?.weights();
        write_tensors(&folder.join(WEIGHTS_FILE), &weights, ("format", "pt"))
    };
    write("model", setup.model(vocabulary))?;
    write("head", head_alone(setup, vocabulary))?;
    let batch = setup.batch(vocabulary);
    let targets: Vec<i64> =
        batch.targets.iter().map(|&id| if id == NO_TARGET { -1 } else { i64::from(id) }).collect();
    // JSON has no NaN, and where there is no target the value is not looked at.
    let reference: Vec<f32> = batch.reference.iter().map(|&x| if x.is_nan() { 0.0 } else { x }).collect();
    let value = json!({
        "rows": setup.rows, "len": setup.len, "learning_rate": LEARNING_RATE,
        "device": setup.device.to_string(), "precision": setup.precision,
        "tokens": batch.tokens, "targets": targets, "reference": reference,
    });
    std::fs::write(folder.join(format!("batch-{vocabulary}.json")), value.to_string())?;
    Ok(())
}

/// `PyTorch`'s versions of the step, for the weights and batches in `folder`.
fn script(arguments: &Compare, python: &Path, folder: &Path) -> Command {
    let script = arguments.script.clone().unwrap_or_else(|| root().join("benches/python/training_step.py"));
    let mut command = Command::new(python);
    // Spinning threads would count waiting as work.
    command.arg(&script).arg(folder).env("OMP_WAIT_POLICY", "passive");
    command
}

/// What `PyTorch` is, and multiplies with.
fn peer(arguments: &Compare, folder: &Path) -> anyhow::Result<Value> {
    match &arguments.python {
        Some(python) => Worker::start("torch", &mut script(arguments, python, folder))?.ask(0, "peer"),
        None => Ok(Value::Null),
    }
}

fn case(arguments: &Compare, folder: &Path, vocabulary: usize) -> anyhow::Result<Value> {
    let this = std::env::current_exe()?;
    let setup = &arguments.setup;
    let on_cpu = setup.device == DeviceName::Cpu;
    let python = |python: &Path| script(arguments, python, folder);
    let ours = || -> anyhow::Result<Worker> {
        let mut command = Command::new(&this);
        command.arg("worker").args(setup.flags()).env("MIMALLOC_PURGE_DELAY", "-1");
        Worker::start("sluice", &mut command)
    };
    let mut workers = vec![ours()?];
    let mut variants: Vec<(usize, &str)> = arguments.ours.iter().map(|name| (0, name.as_str())).collect();
    let of_slm = arguments.ours.iter().position(|name| name == "slm").context("--ours lacks slm")?;
    let with_glibc = this.with_file_name("training_step_glibc");
    if on_cpu && with_glibc.exists() {
        let mut command = Command::new(with_glibc);
        variants.push((workers.len(), "slm"));
        workers.push(Worker::start("sluice-glibc", command.args(setup.flags()))?);
    }
    if let Some(path) = &arguments.python {
        let versions = arguments.versions.iter();
        variants.extend(versions.map(|version| (workers.len(), version.as_str())));
        workers.push(Worker::start("torch", &mut python(path))?);
    }
    let mut measured: Vec<Vec<Value>> = vec![vec![]; variants.len()];
    for round in 0..arguments.warmup_rounds + arguments.rounds {
        for (&(worker, variant), steps) in variants.iter().zip(&mut measured) {
            let step = workers[worker].ask(vocabulary, variant)?;
            say(format_args!("{vocabulary} {round} {} {variant}: {step}", workers[worker].name));
            steps.push(step);
        }
    }
    let losses =
        |steps: &[Value]| -> Vec<f64> { steps.iter().filter_map(|step| step["loss"].as_f64()).collect() };
    let expected = losses(&measured[of_slm]);
    let agreement = AGREEMENT_NATS[usize::from(setup.precision != Precision::F32)];
    let mut engines = Vec::new();
    for (&(worker, variant), steps) in variants.iter().zip(&measured) {
        let name = format!("{}/{variant}", workers[worker].name);
        let taken = losses(steps);
        ensure!(
            taken.len() == steps.len() && taken.iter().all(|loss| loss.is_finite()),
            "a loss of {name} is no number"
        );
        // The others take other steps.
        if variant == "slm" || variant.starts_with("torch") {
            let off = expected.iter().zip(&taken).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            ensure!(
                off <= agreement,
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
            "loss": taken,
            "median_seconds": median(&all("seconds")),
            "median_cpu_seconds": median(&all("cpu_seconds")),
        }));
    }
    drop(workers);
    let mut result = json!({
        "vocabulary": vocabulary,
        "parameters": setup.model(vocabulary).parameters(),
        "engines": engines,
        "stream": stream::batches(setup, vocabulary)?,
    });
    let mut tapes = serde_json::Map::new();
    for variant in &arguments.tapes {
        let told = ours()?.ask(vocabulary, &format!("tape {variant}"))?;
        say(format_args!("{vocabulary} memory of a step, {variant}: {told}"));
        tapes.insert(variant.clone(), told);
    }
    if !tapes.is_empty() {
        result["step_memory"] = tapes.into();
    }
    // Of a device's memory the system knows nothing.
    if on_cpu {
        let mut memory = json!({ "sluice": ours()?.ask(vocabulary, "memory")? });
        if let Some(path) = &arguments.python {
            memory["torch"] = Worker::start("torch", &mut python(path))?.ask(vocabulary, "memory")?;
        }
        result["loss_memory"] = memory;
    }
    say(format_args!(
        "{vocabulary} stream: {}, memory of the loss: {}",
        result["stream"], result["loss_memory"]
    ));
    Ok(result)
}
