//! How many tokens a second pass through the daemon when the model costs nothing: real Kafka, the real pipeline, and
//! a scorer that returns constants. Prints one JSON object on standard output.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Context as _;
use clap::Parser;
use sluice_daemon::batch::Batch;
use sluice_daemon::config::Config;
use sluice_daemon::health::Health;
use sluice_daemon::metrics::Metrics;
use sluice_daemon::pipeline;
use sluice_daemon::score::{ModelIdentity, Score, Scores};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{ContextPolicy, Precision, TokenIds, TokenizedDocument};
use sluice_tests::{Kafka, produce, root};

const VOCABULARY: u32 = 32_000;
const PARTITIONS: i32 = 8;

/// Measures the daemon's ceiling with a scorer that returns constants.
#[derive(Debug, Parser)]
struct Arguments {
    /// Documents to score.
    #[arg(long, default_value_t = 50_000)]
    documents: usize,
    /// Tokens of each document.
    #[arg(long, default_value_t = 1000)]
    tokens: usize,
    /// Times to repeat the measurement; each has a group of its own.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Further librdkafka settings of the daemon.
    #[arg(long = "property", value_name = "NAME=VALUE")]
    properties: Vec<String>,
}

/// Returns the same loss for every token.
struct NullScorer;

impl Score for NullScorer {
    fn score(&mut self, batch: &Batch) -> anyhow::Result<Scores> {
        Ok(Scores { losses: vec![1.0; batch.targets.len()], entropies: Vec::new() })
    }
}

#[allow(clippy::print_stdout)]
fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let kafka = Kafka::start(&root().join("target/bench-kafka"));
    let run = format!("null-{}", std::process::id());
    let documents_topic = format!("{run}.documents");
    kafka.create_topic(&documents_topic, PARTITIONS);
    load(&kafka, &documents_topic, &arguments);

    let mut seconds = Vec::new();
    let mut cpu_seconds = Vec::new();
    for repeat in 0..arguments.repeats {
        let mut config = Config::default();
        config.kafka.bootstrap_servers.clone_from(&kafka.bootstrap_servers);
        config.kafka.documents_topic.clone_from(&documents_topic);
        config.kafka.scored_topic = format!("{run}.scored-{repeat}");
        config.kafka.dead_letter_topic = format!("{run}.dead-letters-{repeat}");
        config.kafka.group_id = format!("{run}-{repeat}");
        config.kafka.properties = properties(&arguments.properties)?;
        kafka.create_topic(&config.kafka.scored_topic, PARTITIONS);
        kafka.create_topic(&config.kafka.dead_letter_topic, 1);
        let (wall, cpu) = measure(&config, arguments.documents)?;
        eprintln!("repeat {repeat}: {:.0} tokens/s", (arguments.documents * arguments.tokens) as f64 / wall);
        seconds.push(wall);
        cpu_seconds.push(cpu);
    }
    let tokens = (arguments.documents * arguments.tokens) as f64;
    let result = serde_json::json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "documents": arguments.documents,
        "tokens_per_document": arguments.tokens,
        "seconds": seconds,
        "daemon_cpu_seconds": cpu_seconds,
        "median_tokens_per_second": tokens / median(&seconds),
        "median_tokens_per_daemon_cpu_second": tokens / median(&cpu_seconds),
    });
    println!("{}", serde_json::to_string_pretty(&result)?);
    Ok(())
}

fn properties(pairs: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let split = |pair: &String| {
        let (name, value) =
            pair.split_once('=').with_context(|| format!("--property {pair} is not NAME=VALUE"))?;
        Ok((name.to_owned(), value.to_owned()))
    };
    pairs.iter().map(split).collect()
}

fn load(kafka: &Kafka, topic: &str, arguments: &Arguments) {
    let tokenizer = Fingerprint::of_bytes(b"null");
    let ids: Vec<u32> = (0..arguments.tokens as u32).map(|index| index * 7919 % VOCABULARY).collect();
    let tokens = TokenIds::new(&ids);
    // A part at a time, so that memory does not hold them all.
    for start in (0..arguments.documents).step_by(5000) {
        let records: Vec<_> = (start..arguments.documents.min(start + 5000))
            .map(|number| {
                let document = TokenizedDocument {
                    id: format!("document-{number}"),
                    tokens: tokens.clone(),
                    tokenizer,
                    source: String::new(),
                    attributes: BTreeMap::new(),
                };
                (document.id.clone(), document.encode())
            })
            .collect();
        let borrowed: Vec<_> =
            records.iter().map(|(id, payload)| (id.as_str(), Some(payload.clone()))).collect();
        produce(&kafka.bootstrap_servers, topic, &borrowed);
    }
}

/// Wall and CPU seconds from the first record read to the last one committed.
fn measure(config: &Config, documents: usize) -> anyhow::Result<(f64, f64)> {
    let metrics = Metrics::new()?;
    let health = Health::default();
    health.set_warm();
    let model = ModelIdentity {
        fingerprint: Fingerprint::of_bytes(b"null model"),
        tokenizer: Fingerprint::of_bytes(b"null"),
        vocabulary: VOCABULARY,
        precision: Precision::F32,
    };
    let policy = ContextPolicy { window: 2048, stride: 1024 };
    std::thread::scope(|scope| {
        let daemon =
            scope.spawn(|| pipeline::run(config, model, Box::new(NullScorer), policy, &metrics, &health));
        while metrics.documents_read.get() == 0 && !daemon.is_finished() {
            std::thread::yield_now();
        }
        let (started, cpu) = (Instant::now(), cpu_seconds()?);
        while (metrics.documents_scored.get() as usize) < documents && !daemon.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let measured = (started.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
        health.stop();
        daemon.join().map_err(|_| anyhow::anyhow!("the pipeline panicked"))??;
        Ok(measured)
    })
}

/// User and system time of this process so far.
fn cpu_seconds() -> anyhow::Result<f64> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat has no command name")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // Fields 14 and 15 of proc_pid_stat(5); the first two were cut off.
    Ok((ticks(11) + ticks(12)) / TICKS_PER_SECOND)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
