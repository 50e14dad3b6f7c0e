//! What every Kafka client of the daemon shares: settings, those we own, and errors in words.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::metadata::Metadata;
use rdkafka::types::RDKafkaConfRes;

use crate::config::{Delivery, Kafka};

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
    ("auto.offset.reset", "a new group begins with the first document, so that none is passed over"),
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
        .set("fetch.max.bytes", "16777216");
    for (key, value) in &settings.properties {
        config.set(key, value);
    }
    config
        .set("bootstrap.servers", &settings.bootstrap_servers)
        .set("group.id", &settings.group_id)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
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
            anyhow!("librdkafka knows no property `{key}`; its names are in its CONFIGURATION.md")
        }
        KafkaError::ClientConfig(_, _, key, _) => {
            anyhow!("librdkafka does not take the value given for the property `{key}`")
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
        let timeout_ms = config.get("transaction.timeout.ms").unwrap_or("180000").to_owned();
        timeout_ms.parse::<u32>().with_context(|| {
            format!(
                "kafka.properties: transaction.timeout.ms = `{timeout_ms}` is not a number of milliseconds"
            )
        })?;
        config.set("message.timeout.ms", &timeout_ms).set("transaction.timeout.ms", timeout_ms);
    }
    Ok(config)
}

/// The id under which brokers fence off an earlier life of this daemon: stable over restarts, and different for
/// daemons that run at the same time.
pub fn transactional_id(settings: &Kafka) -> String {
    format!("{}-{}", settings.group_id, settings.instance)
}

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

/// The cluster's metadata, or an error that names the address.
pub fn reach<C: ClientContext>(
    client: &Client<C>,
    bootstrap_servers: &str,
    timeout: Duration,
) -> anyhow::Result<Metadata> {
    client.fetch_metadata(None, timeout).map_err(|error| anyhow!(error)).with_context(|| {
        format!(
            "no broker answers at {bootstrap_servers} within {} s; check kafka.bootstrap_servers and that the broker \
             runs",
            timeout.as_secs()
        )
    })
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
    metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none()).map(|t| t.partitions().len())
}
