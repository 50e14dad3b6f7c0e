//! Settings of the daemon's Kafka clients: our defaults, then the user's properties, then what delivery depends on.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use rdkafka::ClientConfig;
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::KafkaError;
use rdkafka::producer::BaseProducer;
use rdkafka::types::RDKafkaConfRes;
use sluice_kafka::DEBUG_METADATA;

use super::context::PlainContext;
use crate::config::{Delivery, Kafka, canonical_property};

/// Unless the user sets another.
const TRANSACTION_TIMEOUT_MS: &str = "180000";

/// A client's settings: brokers, then the user's properties.
pub fn client_config(bootstrap_servers: &str, properties: &BTreeMap<String, String>) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("client.id", "sluiced");
    for (key, value) in properties {
        config.set(canonical_property(key), value);
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
        config.set(canonical_property(key), value);
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
        config.set(canonical_property(key), value);
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
    sluice_kafka::listen(&mut config, DEBUG_METADATA);
    config
}

/// Refuses properties that librdkafka does not know, whose values it does not take, or that do not go together, before
/// anything starts. What does not go together shows only where a client is made, so both are made, and dropped before they
/// have asked anything.
pub fn check_properties(settings: &Kafka) -> anyhow::Result<()> {
    let _consumer: BaseConsumer<PlainContext> =
        consumer_config(settings).create_with_context(PlainContext::default()).map_err(setting_error)?;
    let _producer: BaseProducer<PlainContext> =
        sink_config(settings)?.create_with_context(PlainContext::default()).map_err(setting_error)?;
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
        // Where it says that a connection was lost, and no other callback does.
        sluice_kafka::listen(&mut config, "broker");
    }
    sluice_kafka::listen(&mut config, DEBUG_METADATA);
    Ok(config)
}

/// How long the client waits for an answer before it asks again.
pub fn request_timeout(settings: &Kafka) -> Duration {
    /// Unless the user sets another.
    const DEFAULT: Duration = Duration::from_mins(1);
    let set = settings.properties.get("socket.timeout.ms");
    set.and_then(|millis| millis.parse().ok()).map_or(DEFAULT, Duration::from_millis)
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
