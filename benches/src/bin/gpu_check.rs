//! Does a device give the losses that the CPU gives, what of the model runs where, and how fast is it: in a bare session, and
//! through the daemon's own threads and settings? Called by `ops/gpu-check`.
//!
//! Prints one JSON object. Exit code 1 where losses differ by more than they may, or attention has no operator of its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use clap::Parser;
use serde_json::{Value, json};
use sluice_benches::process::median;
use sluice_benches::through_daemon::{self, Run, Setup, publish};
use sluice_benches::workload::{Cost, Lengths};
use sluice_daemon::batch::{Batch, Ladder, plan, windows};
use sluice_daemon::config::{Config, Delivery};
use sluice_daemon::reference::Reference;
use sluice_daemon::score::documents::score_documents;
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_daemon::score::warm_up::warm_up;
use sluice_daemon::score::{Score as _, Scorer, is_out_of_memory};
use sluice_schemas::record::{Bos, ContextPolicy, Precision};
use sluice_tests::Broker;
use sluice_text::output::{print_line, say};

/// Partitions of the topics that the daemon reads and writes.
const PARTITIONS: usize = 8;
/// After which a daemon that has not scored everything is stopped.
const DAEMON_TIME_MAX: Duration = Duration::from_mins(5);

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
    /// Only runs a short batch and a full one, and says what ran where.
    #[arg(long)]
    placement_only: bool,
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
    /// Further sizes of a batch to measure in the bare session, which tell what the daemon should take on the device.
    #[arg(long, value_delimiter = ',')]
    sweep: Vec<usize>,
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

impl Arguments {
    /// The daemon's settings, with batches of so many tokens.
    fn config(&self, tokens_max: usize) -> Config {
        let mut config = Config::default();
        config.model.path.clone_from(&self.model);
        config.model.onnxruntime.clone_from(&self.library);
        config.model.device.clone_from(&self.device);
        config.model.device_memory_bytes = self.device_memory_bytes;
        config.batch.tokens_max = tokens_max;
        config.score.window_tokens = self.window;
        config
    }

    fn policy(&self) -> ContextPolicy {
        ContextPolicy { window: self.window, stride: self.window / 2, bos: Bos::None }
    }

    fn open(&self, device: Device) -> anyhow::Result<(Model, Scorer)> {
        let mut model = Model::load(&self.model, device, false)?;
        model.fuse_attention(&self.library)?;
        let options = SessionOptions {
            library: self.library.clone(),
            device,
            threads: 0,
            device_memory_bytes: self.device_memory_bytes,
        };
        let scorer = Scorer::new(&model, &options, false)?;
        Ok((model, scorer))
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let device: Device = arguments.device.parse().map_err(|error: String| anyhow!(error))?;
    let (model, mut scorer) = arguments.open(device)?;
    let placement = scorer.placement()?;
    placement.check(device)?;
    let attention = attention(&model)?;
    if arguments.placement_only {
        let sizes = arguments.config(arguments.tokens_max).sizes();
        let full = Batch::new(full_window(&arguments, sizes.tokens_max), sizes.ladder(arguments.policy()));
        scorer.score(&full)?;
        let rows = placement.rows().map(|(kind, nodes, _)| {
            json!({"provider": kind.provider, "operator": kind.operator, "element": kind.element, "nodes": nodes})
        });
        print_line(&json!({"nodes": rows.collect::<Vec<_>>(), "attention": attention}).to_string())?;
        return Ok(());
    }

    let lengths = Lengths { median: 400.0, sigma: 1.0, longest: arguments.window as usize };
    let vocabulary = model.identity.vocabulary;
    let documents = lengths.documents(arguments.documents, vocabulary);
    if let Some(path) = &arguments.documents_into {
        std::fs::write(path, serde_json::to_vec(&documents)?)?;
    }
    let work = Work::new(&arguments, &model, &documents)?;
    let differences = differences(&arguments, &model, &mut scorer, &lengths)?;
    let worst = differences.iter().copied().fold(0.0, f64::max);
    let rms = (differences.iter().map(|d| d * d).sum::<f64>() / differences.len() as f64).sqrt();
    // What engines have been seen to differ by, in 32 bits and in 16.
    let allowed_rms = if model.identity.precision == Precision::F32 { 0.002 } else { 0.03 };

    let bare = work.bare(&model, &mut scorer, arguments.tokens_max)?;
    let sweep = arguments
        .sweep
        .iter()
        .map(|&tokens_max| match work.bare(&model, &mut scorer, tokens_max) {
            Err(error) if is_out_of_memory(&error) => {
                Ok(json!({"tokens_max": tokens_max, "failed": format!("{error:#}")}))
            }
            other => other,
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    drop(scorer);
    let daemon = work.daemon()?;
    let to_bare = |value: &Value| {
        Some(value["median_tokens_per_second"].as_f64()? / bare["median_tokens_per_second"].as_f64()?)
    };
    let result = json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "model": arguments.model.file_name().map(|name| name.to_string_lossy()),
        "precision": format!("{:?}", model.identity.precision).to_lowercase(),
        "device": arguments.device,
        "attention": attention,
        "compared_tokens": differences.len(),
        "worst_difference_nats": worst,
        "rms_difference_nats": rms,
        "allowed_rms_nats": allowed_rms,
        "agrees": rms <= allowed_rms,
        "documents": arguments.documents,
        "tokens": work.tokens,
        "vocabulary": vocabulary,
        "weights_in_products": work.cost.body + work.cost.head,
        "daemon_to_bare": to_bare(&daemon),
        "bare": bare,
        "daemon": daemon,
        "sweep": sweep,
    });
    print_line(&serde_json::to_string_pretty(&result)?)?;
    if rms > allowed_rms {
        bail!("losses differ by {rms:.1e} nats RMS from the CPU's, and may by {allowed_rms:.0e}");
    }
    Ok(())
}

/// Operators of the model's attention and how many there are of each. Refuses a model of which a layer spells it out.
fn attention(model: &Model) -> anyhow::Result<Value> {
    let report = model.attention.as_ref().ok_or_else(|| anyhow!("nobody has looked at the attention"))?;
    if let Some(left) = report.left.first() {
        bail!(
            "attention of layer {} has no operator of its own (at node `{}`: {}), so its speed says nothing of what the device can \
             do; export the model with onnxruntime-genai's builder",
            left.layers.first().copied().unwrap_or_default(),
            left.node,
            left.why
        );
    }
    let fused = report.fused.iter().map(|(operator, count)| ((*operator).to_owned(), *count));
    let mut counts = report.exported.clone();
    for (operator, count) in fused {
        *counts.entry(operator).or_default() += count;
    }
    Ok(json!(counts))
}

/// Rows that fill a batch.
fn full_window(arguments: &Arguments, tokens_max: usize) -> Vec<sluice_daemon::batch::Window> {
    let len = arguments.window as usize;
    let tokens: Arc<[u32]> = vec![0; len].into();
    let rows = (tokens_max / len).max(1);
    (0..rows as u64).flat_map(|id| windows(id, &tokens, arguments.policy())).collect()
}

/// Absolute differences of a token's loss on the device and on the CPU, in nats.
fn differences(
    arguments: &Arguments,
    model: &Model,
    scorer: &mut Scorer,
    lengths: &Lengths,
) -> anyhow::Result<Vec<f64>> {
    let compared = shared(&lengths.documents(arguments.compared, model.identity.vocabulary));
    let sizes = arguments.config(arguments.tokens_max).sizes();
    let ladder = sizes.ladder(arguments.policy()).split_at(model.length_limit);
    let ours = score_documents(scorer, &compared, arguments.policy(), sizes.tokens_max, ladder)?;
    let (_, mut cpu) = arguments.open(Device::Cpu)?;
    let tokens_max = 4096.max(arguments.window as usize);
    let theirs = score_documents(&mut cpu, &compared, arguments.policy(), tokens_max, ladder)?;
    let pairs = ours.iter().zip(&theirs).flat_map(|(ours, theirs)| ours.losses.iter().zip(&theirs.losses));
    let mut differences = Vec::new();
    // The first token of a document has no loss, which is a NaN on the CPU.
    for (ours, theirs) in pairs.filter(|(_, theirs)| !theirs.is_nan()) {
        if !ours.is_finite() {
            bail!("the device gives a loss of {ours} where the CPU gives {theirs}");
        }
        differences.push(f64::from(ours - theirs).abs());
    }
    Ok(differences)
}

fn shared(documents: &[Vec<u32>]) -> Vec<Arc<[u32]>> {
    documents.iter().map(|tokens| tokens.as_slice().into()).collect()
}

/// What is measured.
struct Work<'a> {
    arguments: &'a Arguments,
    documents: &'a [Vec<u32>],
    cost: Cost,
    tokens: usize,
    /// Floating-point operations of products with weights, and of those with attention's own.
    flops: [f64; 2],
    /// Operations a second at the most; a peak of 16-bit arithmetic says nothing of a model in 32 bits.
    peak: Option<f64>,
}

impl<'a> Work<'a> {
    fn new(arguments: &'a Arguments, model: &Model, documents: &'a [Vec<u32>]) -> anyhow::Result<Self> {
        let cost = Cost::read(&arguments.model)?;
        let tokens = documents.iter().map(Vec::len).sum();
        // Every document fits a window, and its first token is not predicted. Padding is no use and not counted.
        let weights = cost.of_weights(tokens, tokens - documents.len());
        let attention: f64 = documents.iter().map(|document| cost.of_attention(document.len())).sum();
        let peak = arguments.peak_tflops.filter(|_| model.identity.precision != Precision::F32);
        let peak = peak.map(|tera| tera * 1e12);
        Ok(Self { arguments, documents, cost, tokens, flops: [weights, weights + attention], peak })
    }

    /// Speed, and the shares of the device's peak (arXiv 2204.02311, appendix B).
    fn speed(&self, seconds: &[f64]) -> Value {
        let middle = median(seconds);
        let [share, with_attention] = self.flops.map(|flops| self.peak.map(|peak| flops / middle / peak));
        json!({
            "seconds": seconds,
            "median_tokens_per_second": self.tokens as f64 / middle,
            "tflops": self.flops[0] / middle / 1e12,
            "share_of_peak": share,
            "share_of_peak_with_attention": with_attention,
        })
    }

    /// `Session::run` on batches that were put together beforehand.
    fn bare(&self, model: &Model, scorer: &mut Scorer, tokens_max: usize) -> anyhow::Result<Value> {
        let sizes = self.arguments.config(tokens_max).sizes();
        let policy = self.arguments.policy();
        let ladder: Ladder = sizes.ladder(policy).split_at(model.length_limit);
        let started = Instant::now();
        let shapes = warm_up(scorer, ladder, sizes.tokens_max)?;
        let warm_up_seconds = started.elapsed().as_secs_f64();
        let shared = shared(self.documents);
        let all = (0..).zip(&shared).flat_map(|(id, tokens)| windows(id, tokens, policy)).collect();
        let batches = plan(all, sizes.tokens_max, ladder);
        let padded: usize = batches.iter().map(Batch::padded_tokens).sum();
        let mut seconds = Vec::new();
        for repeat in 0..self.arguments.repeats {
            let started = Instant::now();
            for batch in &batches {
                scorer.score(batch)?;
            }
            seconds.push(started.elapsed().as_secs_f64());
            let speed = self.tokens as f64 / seconds[repeat];
            say(format_args!("bare, batches of {}, repeat {repeat}: {speed:.0} tokens/s", sizes.tokens_max));
        }
        let mut result = self.speed(&seconds);
        result["tokens_max"] = sizes.tokens_max.into();
        result["padded_per_real_token"] = (padded as f64 / self.tokens as f64).into();
        result["shapes_warmed"] = shapes.into();
        result["warm_up_seconds"] = warm_up_seconds.into();
        Ok(result)
    }

    /// The daemon's threads and settings, from a topic to a topic. The broker is librdkafka's own, which needs no Java and keeps
    /// no transactions.
    fn daemon(&self) -> anyhow::Result<Value> {
        let mut config = self.arguments.config(self.arguments.tokens_max);
        config.kafka.delivery = Delivery::AtLeastOnce;
        let mut reference = Reference::open(&config)?;
        let started = Instant::now();
        reference.warm_up(&config)?;
        let warm_up_seconds = started.elapsed().as_secs_f64();
        let mut runs: Vec<Run> = Vec::new();
        for repeat in 0..self.arguments.repeats {
            // A broker for each, so that none reads what another has scored.
            let topics = ["sluice.documents", "sluice.scored", "sluice.dead-letters"];
            let topics = topics.map(|topic| format!("{topic}:{PARTITIONS}"));
            let broker = Broker::start(&topics.each_ref().map(String::as_str));
            config.kafka.bootstrap_servers.clone_from(&broker.bootstrap_servers);
            let (servers, topic) = (&broker.bootstrap_servers, &config.kafka.documents_topic);
            publish(servers, topic, reference.model.identity.tokenizer, self.documents.iter().cloned());
            let run = through_daemon::run(&Setup {
                config: &config,
                model: reference.model.identity,
                scorer: &reference.scorer,
                policy: reference.policy,
                ladder: reference.ladder,
                documents: self.documents.len(),
                time_max: DAEMON_TIME_MAX,
                broker: None,
            })?;
            if (run.tokens as usize) < self.tokens {
                bail!("the daemon scored {} of {} tokens; its log is above", run.tokens, self.tokens);
            }
            say(format_args!("daemon, repeat {repeat}: {:.0} tokens/s", run.tokens / run.seconds));
            runs.push(run);
        }
        let column = |value: fn(&Run) -> f64| runs.iter().map(value).collect::<Vec<_>>();
        let mut result = self.speed(&column(|run| run.seconds));
        result["tokens_max"] = config.sizes().tokens_max.into();
        result["warm_up_seconds"] = warm_up_seconds.into();
        result["busy_share"] = column(|run| run.busy_seconds / run.seconds).into();
        result["starved_share"] = column(|run| run.starved_seconds / run.seconds).into();
        result["cpu_seconds"] = column(|run| run.cpu_seconds).into();
        Ok(result)
    }
}
