//! How many tokens a second pass through the daemon when the model costs nothing: real Kafka, the real pipeline, and
//! a scorer that returns constants. With `--scorer-tokens-per-second` the scorer is slow instead, and the figure of
//! interest is the memory that a long queue takes. Prints one JSON object on standard output.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use sluice_benches::process::median;
use sluice_benches::through_daemon::{self, Run, Setup, publish};
use sluice_daemon::batch::Batch;
use sluice_daemon::config::Config;
use sluice_daemon::score::model_thread::ModelThread;
use sluice_daemon::score::{ModelIdentity, Score, Scores};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{Bos, ContextPolicy, Precision};
use sluice_tests::{Kafka, root};
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
    publish(&kafka.bootstrap_servers, &documents_topic, tokenizer(), documents(&arguments));

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
    let column = |value: fn(&Run) -> f64| measured.iter().map(value).collect::<Vec<_>>();
    let median = |value: fn(&Run) -> f64| median(&column(value));
    let sizes = Config::default().sizes();
    let result = serde_json::json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "cores": std::thread::available_parallelism()?.get(),
        "documents": arguments.documents,
        "tokens_per_document": arguments.tokens,
        "seconds": column(|one| one.seconds),
        "tokens": column(|one| one.tokens),
        "daemon_cpu_seconds": column(|one| one.cpu_seconds),
        "broker_cpu_seconds": column(|one| one.broker_cpu_seconds),
        "median_tokens_per_second": median(|one| one.tokens / one.seconds),
        "median_tokens_per_daemon_cpu_second": median(|one| one.tokens / one.cpu_seconds),
        "median_tokens_per_broker_cpu_second": median(|one| one.tokens / one.broker_cpu_seconds),
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

/// Random ids, so that compression does not make the records smaller than those of real text.
fn documents(arguments: &Arguments) -> impl Iterator<Item = Vec<u32>> + use<> {
    let mut random = fastrand::Rng::with_seed(1);
    let tokens = arguments.tokens;
    (0..arguments.documents).map(move |_| (0..tokens).map(|_| random.u32(..VOCABULARY)).collect())
}

fn measure(config: &Config, arguments: &Arguments, broker: u32) -> anyhow::Result<Run> {
    let policy = ContextPolicy { window: 2048, stride: 1024, bos: Bos::None };
    let scorer = NullScorer {
        tokens_per_second: arguments.scorer_tokens_per_second,
        batch_seconds: arguments.batch_milliseconds / 1000.0,
    };
    let scorer = ModelThread::start(move || Ok(scorer))?;
    let forever = arguments.seconds_max == 0;
    through_daemon::run(&Setup {
        config,
        model: ModelIdentity {
            fingerprint: Fingerprint::of_bytes(b"null model"),
            tokenizer: tokenizer(),
            vocabulary: VOCABULARY,
            precision: Precision::F32,
        },
        scorer: &scorer,
        policy,
        ladder: config.sizes().ladder(policy),
        documents: arguments.documents,
        time_max: if forever { Duration::MAX } else { Duration::from_secs(arguments.seconds_max) },
        broker: Some(broker),
    })
}

fn tokenizer() -> Fingerprint {
    Fingerprint::of_bytes(b"null")
}
