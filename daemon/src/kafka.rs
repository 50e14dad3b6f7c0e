//! What every Kafka client of the daemon shares: settings, those we own, and errors in words.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext, OAuthToken};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::Metadata;
use rdkafka::types::RDKafkaConfRes;

use crate::config::{Delivery, Kafka};

/// How long a broker may take to answer the first question, and how often it is asked.
const REACH: Duration = Duration::from_secs(10);
const REACH_TURN: Duration = Duration::from_secs(1);

/// Unless the user sets another.
const TRANSACTION_TIMEOUT_MS: &str = "180000";

/// Settings of librdkafka that delivery depends on, with the key of ours that sets each, or why none may.
const OWNED: [(&str, &str); 15] = [
    ("bootstrap.servers", "set kafka.bootstrap_servers instead"),
    ("metadata.broker.list", "set kafka.bootstrap_servers instead"),
    ("group.id", "set kafka.group_id instead"),
    ("message.max.bytes", "set kafka.record_bytes_max instead"),
    ("enable.auto.commit", "offsets are committed only after what they cover is published"),
    ("auto.commit.enable", "offsets are committed only after what they cover is published"),
    ("enable.auto.offset.store", "offsets are committed only after what they cover is published"),
    ("isolation.level", "records of aborted transactions must not be scored"),
    ("enable.idempotence", "a retry must not publish a record twice"),
    ("request.required.acks", "a record counts as published once every replica in sync has it"),
    ("statistics.interval.ms", "the lag is worked out from it"),
    ("acks", "a record counts as published once every replica in sync has it"),
    ("transactional.id", "set kafka.group_id and kafka.instance instead"),
    ("auto.offset.reset", "a new group begins with the first document, and a gap later on is an error"),
    ("enable.partition.eof", "the daemon reads without an end"),
];

/// Why the property `key` may not be set, where that is so.
pub fn owned_property(key: &str) -> Option<String> {
    OWNED
        .iter()
        .find(|(owned, _)| *owned == key)
        .map(|(_, why)| format!("kafka.properties: `{key}` cannot be set: {why}"))
}

/// A client's settings: brokers, then the user's properties.
pub fn client_config(bootstrap_servers: &str, properties: &BTreeMap<String, String>) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("client.id", "sluiced");
    for (key, value) in properties {
        config.set(key, value);
    }
    config.set("bootstrap.servers", bootstrap_servers);
    config
}

/// Settings of a producer that writes nothing twice and gives up on nothing but the record itself.
pub fn producer_config(
    bootstrap_servers: &str,
    properties: &BTreeMap<String, String>,
    record_bytes_max: u32,
) -> ClientConfig {
    let mut config = ClientConfig::new();
    // Defaults that the user may change.
    config
        .set("client.id", "sluiced")
        .set("compression.type", "lz4")
        .set("linger.ms", "5")
        .set("batch.num.messages", "10000")
        .set("queue.buffering.max.kbytes", "262144")
        // A transaction that follows on another is put off by the broker for a few milliseconds, until the one before is
        // sealed. The client's default of 100 would be most of its time.
        .set("retry.backoff.ms", "10")
        // The same partition for a key as the Java client would choose.
        .set("partitioner", "murmur2_random");
    for (key, value) in properties {
        config.set(key, value);
    }
    config
        .set("bootstrap.servers", bootstrap_servers)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        // An outage of the brokers delays; it loses nothing.
        .set("message.timeout.ms", "0")
        .set("message.max.bytes", record_bytes_max.to_string());
    config
}

/// Settings of the consumer of the documents topic.
pub fn consumer_config(settings: &Kafka) -> ClientConfig {
    let mut config = ClientConfig::new();
    // Defaults that the user may change. What is read ahead is memory beyond the budget, so it is little.
    config
        .set("client.id", "sluiced")
        .set("queued.max.messages.kbytes", "16384")
        .set("fetch.max.bytes", "16777216")
        // A daemon that was killed is missed sooner than after the client's default of 45 s, and one that comes back
        // after an outage of the broker is let in again as soon.
        .set("session.timeout.ms", "15000");
    for (key, value) in &settings.properties {
        config.set(key, value);
    }
    config
        .set("bootstrap.servers", &settings.bootstrap_servers)
        .set("group.id", &settings.group_id)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // Where to begin is asked by `source`; a gap later on must be an error, not all documents once more.
        .set("auto.offset.reset", "error")
        .set("isolation.level", "read_committed")
        .set("partition.assignment.strategy", "cooperative-sticky")
        // How often the lag is worked out.
        .set("statistics.interval.ms", "1000");
    config
}

/// Refuses properties that librdkafka does not know or whose values it does not take, before anything starts.
pub fn check_properties(settings: &Kafka) -> anyhow::Result<()> {
    consumer_config(settings).create_native_config().map_err(setting_error)?;
    sink_config(settings)?.create_native_config().map_err(setting_error)?;
    Ok(())
}

/// An error about a setting in words that do not repeat its value, which may be a secret.
pub fn setting_error(error: KafkaError) -> anyhow::Error {
    match error {
        KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, _, key, _) => {
            anyhow!(
                "librdkafka knows no property `{key}`; its names are in its CONFIGURATION.md{}",
                sluice_kafka::hint(&key)
            )
        }
        KafkaError::ClientConfig(_, _, key, _) => {
            anyhow!(
                "librdkafka does not take the value given for the property `{key}`{}",
                sluice_kafka::hint(&key)
            )
        }
        other => anyhow!(other).context("the settings of the Kafka client do not go together"),
    }
}

/// Settings of the daemon's own producer.
pub fn sink_config(settings: &Kafka) -> anyhow::Result<ClientConfig> {
    let mut config =
        producer_config(&settings.bootstrap_servers, &settings.properties, settings.record_bytes_max);
    if settings.delivery == Delivery::ExactlyOnce {
        config.set("transactional.id", transactional_id(settings));
        // A transaction holds records that are scored already, so it is open for moments; a broker's outage makes
        // it minutes, and must not end the daemon.
        let timeout_ms = transaction_timeout(settings)?.as_millis().to_string();
        config.set("message.timeout.ms", &timeout_ms).set("transaction.timeout.ms", timeout_ms);
    }
    Ok(config)
}

/// How long the brokers leave a transaction open.
pub fn transaction_timeout(settings: &Kafka) -> anyhow::Result<Duration> {
    let set = settings.properties.get("transaction.timeout.ms");
    let timeout_ms = set.map_or(TRANSACTION_TIMEOUT_MS, String::as_str);
    let millis = timeout_ms.parse::<u32>().with_context(|| {
        format!("kafka.properties: transaction.timeout.ms = `{timeout_ms}` is not a number of milliseconds")
    })?;
    Ok(Duration::from_millis(millis.into()))
}

/// The id under which brokers fence off an earlier life of this daemon: stable over restarts, and different for
/// daemons that run at the same time.
pub fn transactional_id(settings: &Kafka) -> String {
    format!("{}-{}", settings.group_id, settings.instance)
}

/// What a client complains of, said once: it tries again and again.
#[derive(Debug, Default)]
pub struct Complaints(Mutex<Option<String>>);

impl Complaints {
    /// Logs what a person must mend; the rest is for the client to recover from.
    pub fn hear(&self, error: &KafkaError, reason: &str) {
        let refused = matches!(
            error.rdkafka_error_code(),
            Some(
                RDKafkaErrorCode::Authentication
                    | RDKafkaErrorCode::SaslAuthenticationFailed
                    | RDKafkaErrorCode::SSL
            )
        );
        if !refused {
            tracing::debug!(%error, reason, "kafka client error");
            return;
        }
        // Without the time it took, which differs each time.
        let said = reason.split(" (after").next().unwrap_or(reason);
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_deref() != Some(said) {
            tracing::error!(reason = said, "the broker and this client do not accept each other");
            *last = Some(said.to_owned());
        }
    }
}

/// Callbacks of clients that only ask or create: log lines, complaints and tokens.
#[derive(Debug, Default)]
pub struct PlainContext(Complaints);

impl ClientContext for PlainContext {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, config: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        Ok(sluice_kafka::oauth_token(config)?)
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_client(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.hear(&error, reason);
    }
}

impl ConsumerContext for PlainContext {}

/// Passes a line of librdkafka's log on to ours.
pub fn log_client(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            tracing::error!(facility, "{message}");
        }
        // librdkafka calls a refused connection an error and tries again; what matters arrives as an event.
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning | RDKafkaLogLevel::Notice => {
            tracing::debug!(facility, "{message}");
        }
        _ => tracing::trace!(facility, "{message}"),
    }
}

/// The cluster's metadata, or an error that names the address. `serve` runs the client's callbacks, without which it
/// gets no token and says nothing; a client with a thread of its own needs nothing there.
pub fn reach<C: ClientContext>(
    client: &Client<C>,
    bootstrap_servers: &str,
    serve: impl Fn(),
) -> anyhow::Result<Metadata> {
    let deadline = Instant::now() + REACH;
    loop {
        serve();
        match client.fetch_metadata(None, REACH_TURN) {
            Ok(metadata) => return Ok(metadata),
            Err(_) if Instant::now() < deadline => {}
            Err(error) => {
                serve();
                return Err(anyhow!(error)).with_context(|| {
                    format!(
                        "no broker answers at {bootstrap_servers} within {} s; check kafka.bootstrap_servers and that \
                         the broker runs",
                        REACH.as_secs()
                    )
                });
            }
        }
    }
}

/// Whether the brokers are librdkafka's mock cluster.
pub fn is_mock<C: ClientContext>(client: &Client<C>) -> bool {
    client.fetch_cluster_id(Duration::from_secs(10)).is_some_and(|cluster| cluster.starts_with("mockCluster"))
}

/// Refuses `delivery` where the brokers cannot keep its promise.
///
/// librdkafka's mock cluster takes transactions and neither isolates them nor keeps their offsets, so that every start
/// would read everything again.
pub fn check_delivery<C: ClientContext>(client: &Client<C>, delivery: Delivery) -> anyhow::Result<()> {
    if delivery == Delivery::ExactlyOnce && is_mock(client) {
        bail!(
            "this is librdkafka's mock cluster (sluiced dev-broker), which keeps no transactions; set kafka.delivery to \
             at-least-once"
        );
    }
    Ok(())
}

/// Number of partitions of `topic`, or nothing where it does not exist.
pub fn partitions(metadata: &Metadata, topic: &str) -> Option<usize> {
    shape(metadata, topic).map(|(partitions, _)| partitions)
}

/// Number of partitions of `topic` and of copies of the first, or nothing where it does not exist.
pub fn shape(metadata: &Metadata, topic: &str) -> Option<(usize, usize)> {
    let topic = metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none())?;
    let copies = topic.partitions().first().map_or(0, |partition| partition.replicas().len());
    Some((topic.partitions().len(), copies))
}
