//! The daemon's settings: what there is to set, what each means, and what may not be.
//!
//! Every key can stand in the TOML file, in an environment variable (`SLUICED_KAFKA_GROUP_ID`) and in a flag
//! (`--kafka-group-id`); the later of these wins. The flags and their help are made from these types.

mod environment;
mod keys;
mod layers;
mod properties;
mod reference;
mod sizes;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sluice_schemas::names;
use sluice_schemas::record::LossFormat;

pub use layers::{ConfigError, Layers, Scope, add_flags, add_flags_of, foreign_variables, load, load_of};
pub use properties::{canonical_property, owned_property};
pub use reference::{example, reference};
pub use sizes::Sizes;

use crate::device::Device;

/// Settings of `sluiced serve`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Kafka: where records come from and go to.
    pub kafka: Kafka,
    /// The reference model and where it runs.
    pub model: ModelSettings,
    /// What is computed and recorded.
    pub score: Score,
    /// How documents are put together for the model.
    pub batch: BatchSettings,
    /// Bounds of memory and time.
    pub limits: Limits,
    /// The HTTP endpoint for metrics and health.
    pub http: Http,
    /// What is logged.
    pub log: Log,
}

/// Kafka: where records come from and go to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Kafka {
    /// Brokers to begin with, as HOST:PORT, separated by commas.
    pub bootstrap_servers: String,
    /// Consumer group; daemons of one group share the partitions.
    pub group_id: String,
    /// Topic of tokenized documents.
    pub documents_topic: String,
    /// Topic of scored documents.
    pub scored_topic: String,
    /// Topic of records that could not be scored.
    pub dead_letter_topic: String,
    /// `exactly-once`: records and offsets in one transaction. `at-least-once`: offsets after records, for brokers
    /// without transactions, such as `sluiced dev-broker`.
    #[schemars(with = "String")]
    pub delivery: Delivery,
    /// Name of this daemon among those of its group, stable over restarts; two that run at the same time must differ.
    pub instance: String,
    /// Most bytes of one record, as the broker's `message.max.bytes`; larger ones are dead-lettered.
    pub record_bytes_max: u32,
    /// Any other setting of librdkafka, passed on as it is. `NAME.from_file` reads the value of `NAME` from a file, so
    /// that a secret need not stand here.
    pub properties: BTreeMap<String, String>,
}

impl Default for Kafka {
    fn default() -> Self {
        Self {
            bootstrap_servers: String::new(),
            group_id: "sluiced".to_owned(),
            documents_topic: names::DOCUMENTS_TOPIC.to_owned(),
            scored_topic: names::SCORED_TOPIC.to_owned(),
            dead_letter_topic: names::DEAD_LETTER_TOPIC.to_owned(),
            delivery: Delivery::ExactlyOnce,
            instance: "0".to_owned(),
            record_bytes_max: 1_000_000,
            properties: BTreeMap::new(),
        }
    }
}

/// What a reader of the scored topic may rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Delivery {
    /// Every outcome once, for readers with `read_committed`.
    ExactlyOnce,
    /// Every outcome, and some twice after a daemon was killed.
    AtLeastOnce,
}

/// The reference model and where it runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// Folder with model.onnx, tokenizer.json and config.json.
    pub path: PathBuf,
    /// Path of libonnxruntime.so; empty for the environment variable `ORT_DYLIB_PATH`, else the system's library.
    pub onnxruntime: PathBuf,
    /// Of a token classifier, the class whose probability is recorded, by its name or index; empty for the only one, or of two
    /// the one beside a label that says that nothing was found, such as `O` or `NEGATIVE`.
    pub class: String,
    /// Where the model runs: `cpu`, or `cuda:N` for the GPU with index N.
    pub device: String,
    /// Threads of one operator on the CPU; 0 for one a core.
    pub threads: usize,
    /// Most bytes of device memory for the model's arena; 0 for no limit.
    pub device_memory_bytes: usize,
    /// Whether attention that the graph spells out is replaced by one operator, layer by layer, where both compute the same.
    pub fuse_attention: bool,
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            onnxruntime: PathBuf::new(),
            class: String::new(),
            device: "cpu".to_owned(),
            threads: 0,
            device_memory_bytes: 0,
            fuse_attention: true,
        }
    }
}

/// What is computed and recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Score {
    /// Longest run of tokens given to the model at once; 0 for the model's own limit, and at most 4096.
    pub window_tokens: u32,
    /// Tokens between the starts of two windows of a longer document; 0 for half a window.
    pub stride_tokens: u32,
    /// Where the model's BOS token (`bos_token_id` in `config.json`) stands: `none`, before each `document`, or before
    /// each `window`. Use what the model was trained with.
    #[schemars(with = "String")]
    pub bos: BosChoice,
    /// Layout of a loss, or of a token classifier's probability, in the record: `f32`, or `f16` for half the bytes.
    #[schemars(with = "String")]
    pub loss_format: LossFormat,
    /// Whether the entropy of each prediction is recorded too.
    pub entropies: bool,
}

impl Default for Score {
    fn default() -> Self {
        Self {
            window_tokens: 0,
            stride_tokens: 0,
            bos: BosChoice::None,
            loss_format: LossFormat::F32,
            entropies: false,
        }
    }
}

/// Where the model's BOS token stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BosChoice {
    /// Nowhere: the first token of a document has no prediction.
    None,
    /// Before the first token of a document.
    Document,
    /// Before the first token of every window.
    Window,
}

/// How documents are put together for the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BatchSettings {
    /// Most tokens of one batch, padding included; 0 for 4096 on a CPU and 65536 on a GPU.
    pub tokens_max: usize,
    /// Tokens that are read ahead, sorted by length and cut into batches; more means less padding. 0 for 16 batches.
    pub lookahead_tokens: usize,
    /// Longest wait for more documents while the look-ahead is not full, in milliseconds.
    pub delay_ms_max: u64,
    /// Row lengths from one power of two to the next; more means less padding, and more shapes for a GPU to warm. 0 for 16
    /// on a CPU and 8 on a GPU.
    pub length_steps: usize,
}

impl Default for BatchSettings {
    fn default() -> Self {
        Self { tokens_max: 0, lookahead_tokens: 0, delay_ms_max: 5, length_steps: 0 }
    }
}

/// Bounds of memory and time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Most tokens in flight, from reading to committing; reading pauses there and goes on at half of it. A record
    /// counts as at least 64 tokens, and as at least a quarter of its bytes. This bounds memory: 48 bytes a token, and
    /// 128 MiB for the Kafka clients, beside the model. 0 for four times the look-ahead, and at least 1048576.
    pub in_flight_tokens: usize,
    /// Most tokens that are published and committed together.
    pub publish_tokens: usize,
    /// Longest wait for more to publish and commit together while more is being scored, in milliseconds.
    pub publish_delay_ms: u64,
    /// Longest time that SIGTERM, or a partition moving away, waits for what is being scored and published, in seconds.
    pub drain_seconds: u64,
    /// Age of a loop's last sign of life, in seconds, at which `/live` fails.
    pub stalled_seconds: u64,
    /// How many of the last records are looked at for `limits.failing_percent`.
    pub failing_records: usize,
    /// How many in a hundred of them may be dead letters for a reason that is more likely the model's or the device's than
    /// theirs (another tokenizer, tokens beyond the vocabulary, losses that are no losses, a model that fails). Beyond that
    /// the daemon ends before it commits them.
    pub failing_percent: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            in_flight_tokens: 0,
            publish_tokens: 262_144,
            publish_delay_ms: 100,
            drain_seconds: 30,
            stalled_seconds: 120,
            failing_records: 1000,
            failing_percent: 50,
        }
    }
}

impl Limits {
    /// [`Self::publish_delay_ms`] as a duration.
    pub fn publish_delay(&self) -> Duration {
        Duration::from_millis(self.publish_delay_ms)
    }

    /// [`Self::stalled_seconds`] as a duration.
    pub fn stalled(&self) -> Duration {
        Duration::from_secs(self.stalled_seconds)
    }

    /// [`Self::drain_seconds`] as a duration.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}

/// The HTTP endpoint for metrics and health.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Http {
    /// Address of /metrics, /live and /ready; port 0 takes a free one, and the log says which.
    pub listen: String,
}

impl Default for Http {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9464".to_owned() }
    }
}

/// What is logged, on standard error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Least severity: `error`, `warn`, `info`, `debug`, `trace`, or a filter as `RUST_LOG` takes it.
    pub level: String,
    /// `human` or `json`.
    pub format: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: "human".to_owned() }
    }
}

impl Config {
    /// Everything that can be said against these settings without looking at a file or a broker.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut demand = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        demand(
            !self.kafka.bootstrap_servers.is_empty(),
            "kafka.bootstrap_servers is not set; give HOST:PORT".to_owned(),
        );
        demand(
            !self.model.path.as_os_str().is_empty(),
            "model.path is not set; give the folder of the model".to_owned(),
        );
        if let Err(problem) = self.model.device.parse::<Device>() {
            demand(false, format!("model.device: {problem}"));
        }
        self.size_problems().into_iter().for_each(|problem| demand(false, problem));
        for (key, value) in [
            ("kafka.group_id", &self.kafka.group_id),
            ("kafka.instance", &self.kafka.instance),
            ("kafka.documents_topic", &self.kafka.documents_topic),
            ("kafka.scored_topic", &self.kafka.scored_topic),
            ("kafka.dead_letter_topic", &self.kafka.dead_letter_topic),
        ] {
            demand(!value.is_empty(), format!("{key} is empty"));
        }
        demand(
            self.kafka.documents_topic != self.kafka.scored_topic
                && self.kafka.documents_topic != self.kafka.dead_letter_topic
                && self.kafka.scored_topic != self.kafka.dead_letter_topic,
            "kafka.documents_topic, scored_topic and dead_letter_topic must be three different topics"
                .to_owned(),
        );
        for key in self.kafka.properties.keys().filter_map(|key| owned_property(key)) {
            demand(false, key);
        }
        for (key, value) in [
            ("limits.publish_tokens", self.limits.publish_tokens),
            ("limits.failing_records", self.limits.failing_records),
            ("kafka.record_bytes_max", self.kafka.record_bytes_max as usize),
        ] {
            demand(value > 0, format!("{key} must be at least 1"));
        }
        for (key, value, most) in [
            ("model.threads", self.model.threads as u64, 1024),
            ("batch.tokens_max", self.batch.tokens_max as u64, 1 << 24),
            ("batch.length_steps", self.batch.length_steps as u64, 1024),
            ("batch.delay_ms_max", self.batch.delay_ms_max, 60_000),
            ("limits.publish_delay_ms", self.limits.publish_delay_ms, 60_000),
            ("limits.drain_seconds", self.limits.drain_seconds, 86_400),
            ("limits.stalled_seconds", self.limits.stalled_seconds, 86_400),
            ("limits.failing_records", self.limits.failing_records as u64, 1 << 24),
            ("limits.failing_percent", self.limits.failing_percent as u64, 100),
        ] {
            demand(value <= most, format!("{key} is {value}; it may be at most {most}"));
        }
        demand(self.limits.stalled_seconds > 0, "limits.stalled_seconds must be at least 1".to_owned());
        demand(
            self.score.window_tokens == 0 || self.score.window_tokens >= 2,
            "score.window_tokens must be at least 2: one token alone predicts nothing".to_owned(),
        );
        demand(
            self.score.window_tokens == 0 || self.score.stride_tokens < self.score.window_tokens,
            "score.stride_tokens must be less than score.window_tokens, so that windows overlap".to_owned(),
        );
        demand(
            self.http.listen.parse::<std::net::SocketAddr>().is_ok(),
            format!("http.listen: `{}` is no ADDRESS:PORT, such as 127.0.0.1:9464", self.http.listen),
        );
        let levels = ["off", "error", "warn", "info", "debug", "trace"];
        demand(
            self.log.level.split(',').all(|part| part.contains('=') || levels.contains(&part.trim())),
            format!(
                "log.level: `{}` is none of {}, nor a filter such as info,rdkafka=debug",
                self.log.level,
                levels.join(", ")
            ),
        );
        demand(
            matches!(self.log.format.as_str(), "human" | "json"),
            format!("log.format: `{}` is neither human nor json", self.log.format),
        );
        problems
    }
}
