//! What every Kafka client of the daemon shares: settings, those we own, and errors in words.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext};
use rdkafka::metadata::Metadata;

/// Settings of librdkafka that delivery depends on, with the key of ours that sets each, or why none may.
const OWNED: [(&str, &str); 13] = [
    ("bootstrap.servers", "set kafka.bootstrap_servers instead"),
    ("metadata.broker.list", "set kafka.bootstrap_servers instead"),
    ("group.id", "set kafka.group_id instead"),
    ("message.max.bytes", "set kafka.record_bytes_max instead"),
    ("enable.auto.commit", "offsets are committed only after what they cover is published"),
    ("auto.commit.enable", "offsets are committed only after what they cover is published"),
    ("enable.auto.offset.store", "offsets are committed only after what they cover is published"),
    ("isolation.level", "records of aborted transactions must not be scored"),
    ("enable.idempotence", "a retry must not publish a record twice"),
    ("acks", "a record counts as published once every replica in sync has it"),
    ("transactional.id", "it is not yours to set"),
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

/// Number of partitions of `topic`, or nothing where it does not exist.
pub fn partitions(metadata: &Metadata, topic: &str) -> Option<usize> {
    metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none()).map(|t| t.partitions().len())
}
