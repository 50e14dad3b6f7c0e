//! How many tokens a second pass through the daemon when the model costs nothing: real Kafka, the real pipeline, and
//! a scorer that returns constants. With `--scorer-tokens-per-second` the scorer is slow instead, and the figure of
//! interest is the memory that a long queue takes. Prints one JSON object on standard output.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use sluice_daemon::batch::Batch;
use sluice_daemon::config::Config;
use sluice_daemon::health::Health;
use sluice_daemon::metrics::Metrics;
use sluice_daemon::pipeline;
use sluice_daemon::score::model_thread::ModelThread;
use sluice_daemon::score::{ModelIdentity, Score, Scores};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{Bos, ContextPolicy, Precision, TokenIds, TokenizedDocument};
use sluice_tests::{Kafka, produce, root};
use sluice_text::output::{print_line, say};

const VOCABULARY: u32 = 32_000;
const PARTITIONS: i32 = 8;
/// What `limits.in_flight_tokens` promises in the daemon's settings.
const BYTES_PER_TOKEN: usize = 48;
const CLIENT_BYTES: usize = 128 << 20;

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
    /// Makes the scorer this slow; 0 for as fast as it can.
    #[arg(long, default_value_t = 0)]
    scorer_tokens_per_second: u64,
    /// Makes the scorer take this long for each batch, as a GPU may, whatever is in it; 0 for no time.
    #[arg(long, default_value_t = 0.0)]
    batch_milliseconds: f64,
    /// Most tokens of a batch, and sixteen times as many that are read ahead; 0 for the daemon's own.
    #[arg(long, default_value_t = 0)]
    tokens_max: usize,
    /// Stops each repeat after this many seconds, scored or not; 0 for never.
    #[arg(long, default_value_t = 0)]
    seconds_max: u64,
    /// Further librdkafka settings of the daemon.
    #[arg(long = "property", value_name = "NAME=VALUE")]
    properties: Vec<String>,
}

/// Returns the same loss for every token.
#[derive(Clone, Copy)]
struct NullScorer {
    tokens_per_second: u64,
    batch_seconds: f64,
}

impl Score for NullScorer {
    fn score(&mut self, batch: &Batch) -> anyhow::Result<Scores> {
        let mut seconds = self.batch_seconds;
        if self.tokens_per_second > 0 {
            seconds += batch.real_tokens() as f64 / self.tokens_per_second as f64;
        }
        if seconds > 0.0 {
            std::thread::sleep(Duration::from_secs_f64(seconds));
        }
        Ok(Scores { losses: vec![1.0; batch.targets.len()], entropies: Vec::new() })
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let kafka = Kafka::start(&root().join("target/bench-kafka"));
    let run = format!("null-{}", std::process::id());
    let documents_topic = format!("{run}.documents");
    kafka.create_topic(&documents_topic, PARTITIONS);
    load(&kafka, &documents_topic, &arguments);

    let mut measured = Vec::new();
    for repeat in 0..arguments.repeats {
        let mut config = Config::default();
        config.kafka.bootstrap_servers.clone_from(&kafka.bootstrap_servers);
        config.kafka.documents_topic.clone_from(&documents_topic);
        config.kafka.scored_topic = format!("{run}.scored-{repeat}");
        config.kafka.dead_letter_topic = format!("{run}.dead-letters-{repeat}");
        config.kafka.group_id = format!("{run}-{repeat}");
        config.batch.tokens_max = arguments.tokens_max;
        config.kafka.properties = properties(&arguments.properties)?;
        kafka.create_topic(&config.kafka.scored_topic, PARTITIONS);
        kafka.create_topic(&config.kafka.dead_letter_topic, 1);
        let one = measure(&config, &arguments, kafka.process_ids()[0])?;
        say(format_args!("repeat {repeat}: {one:?}"));
        measured.push(one);
    }
    let column = |value: fn(&Measured) -> f64| measured.iter().map(value).collect::<Vec<_>>();
    let sizes = Config::default().sizes();
    let result = serde_json::json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "cores": std::thread::available_parallelism()?.get(),
        "documents": arguments.documents,
        "tokens_per_document": arguments.tokens,
        "seconds": column(|one| one.seconds),
        "tokens": column(|one| one.tokens),
        "daemon_cpu_seconds": column(|one| one.daemon_cpu_seconds),
        "broker_cpu_seconds": column(|one| one.broker_cpu_seconds),
        "median_tokens_per_second": median(column(|one| one.tokens / one.seconds)),
        "median_tokens_per_daemon_cpu_second": median(column(|one| one.tokens / one.daemon_cpu_seconds)),
        "median_tokens_per_broker_cpu_second": median(column(|one| one.tokens / one.broker_cpu_seconds)),
        "busy_share": column(|one| one.busy_seconds / one.seconds),
        "starved_share": column(|one| one.starved_seconds / one.seconds),
        "peak_memory_bytes": column(|one| one.peak_memory_bytes),
        "memory_bound_bytes": sizes.in_flight_tokens * BYTES_PER_TOKEN + CLIENT_BYTES,
    });
    print_line(&serde_json::to_string_pretty(&result)?)?;
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
    // Drawn at random, so that compression does not make the records smaller than those of real text.
    let mut random = fastrand::Rng::with_seed(1);
    // A part at a time, so that memory does not hold them all.
    for start in (0..arguments.documents).step_by(5000) {
        let records: Vec<_> = (start..arguments.documents.min(start + 5000))
            .map(|number| {
                let document = TokenizedDocument {
                    id: format!("document-{number}"),
                    tokens: TokenIds::new(
                        &(0..arguments.tokens).map(|_| random.u32(..VOCABULARY)).collect::<Vec<_>>(),
                    ),
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

/// What one repeat took, from the first record read to the last one committed.
#[derive(Debug)]
struct Measured {
    tokens: f64,
    seconds: f64,
    daemon_cpu_seconds: f64,
    broker_cpu_seconds: f64,
    /// Time in which the model ran.
    busy_seconds: f64,
    /// Time in which it had nothing to run, though documents were there.
    starved_seconds: f64,
    /// Resident memory of this process at its highest, less what it was before.
    peak_memory_bytes: f64,
}

fn measure(config: &Config, arguments: &Arguments, broker: u32) -> anyhow::Result<Measured> {
    let metrics = Metrics::new()?;
    let health = Health::default();
    let model = ModelIdentity {
        fingerprint: Fingerprint::of_bytes(b"null model"),
        tokenizer: Fingerprint::of_bytes(b"null"),
        vocabulary: VOCABULARY,
        precision: Precision::F32,
    };
    let policy = ContextPolicy { window: 2048, stride: 1024, bos: Bos::None };
    let ladder = config.sizes().ladder(policy);
    let scorer = NullScorer {
        tokens_per_second: arguments.scorer_tokens_per_second,
        batch_seconds: arguments.batch_milliseconds / 1000.0,
    };
    let scorer = ModelThread::start(move || Ok(scorer))?;
    // The highest mark of resident memory begins anew (proc_pid_clear_refs(5)).
    std::fs::write("/proc/self/clear_refs", "5")?;
    let memory = status_bytes("VmRSS")?;
    std::thread::scope(|scope| {
        let daemon = scope
            .spawn(|| pipeline::run(config, (model, None), &scorer, (policy, ladder), &metrics, &health));
        while metrics.documents_read.get() == 0 && !daemon.is_finished() {
            std::thread::yield_now();
        }
        let (started, own, others) =
            (Instant::now(), cpu_seconds("self")?, cpu_seconds(&broker.to_string())?);
        let (busy, starved) = (metrics.batch_seconds.get_sample_sum(), metrics.model_starved_seconds.get());
        let in_time =
            || arguments.seconds_max == 0 || started.elapsed() < Duration::from_secs(arguments.seconds_max);
        while (metrics.documents_scored.get() as usize) < arguments.documents
            && !daemon.is_finished()
            && in_time()
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        let measured = Measured {
            tokens: metrics.tokens_scored.get() as f64,
            seconds: started.elapsed().as_secs_f64(),
            daemon_cpu_seconds: cpu_seconds("self")? - own,
            broker_cpu_seconds: cpu_seconds(&broker.to_string())? - others,
            busy_seconds: metrics.batch_seconds.get_sample_sum() - busy,
            starved_seconds: metrics.model_starved_seconds.get() - starved,
            peak_memory_bytes: status_bytes("VmHWM")? - memory,
        };
        health.stop();
        daemon.join().map_err(|_| anyhow::anyhow!("the pipeline panicked"))??;
        Ok(measured)
    })
}

/// A line of this process's status that is a size, such as `VmRSS`.
fn status_bytes(name: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.with_context(|| format!("/proc/self/status has no {name}"))? * 1024.0)
}

/// User and system time of a process so far.
fn cpu_seconds(process: &str) -> anyhow::Result<f64> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) =
        stat.rsplit_once(')').with_context(|| format!("/proc/{process}/stat has no command name"))?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // Fields 14 and 15 of proc_pid_stat(5); the first two were cut off.
    Ok((ticks(11) + ticks(12)) / TICKS_PER_SECOND)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
