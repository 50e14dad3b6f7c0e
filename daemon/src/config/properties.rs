//! What may stand under `kafka.properties`, and in `--property`: anything of librdkafka's but what delivery depends on.

/// Settings of librdkafka that delivery depends on, with the key of ours that sets each, or why none may.
const OWNED: [(&str, &str); 20] = [
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
    ("partition.assignment.strategy", "partitions move one by one, as `cooperative-sticky` has it"),
    ("group.protocol", "partitions are placed by the `classic` protocol"),
    ("group.remote.assignor", "partitions are placed by the `classic` protocol"),
    (
        "message.timeout.ms",
        "an outage of the brokers delays and loses nothing; set transaction.timeout.ms instead",
    ),
    (
        "delivery.timeout.ms",
        "an outage of the brokers delays and loses nothing; set transaction.timeout.ms instead",
    ),
];

/// Other names that librdkafka has for properties of which the daemon sets a default. Under both names, either might win.
const ALIASES: [(&str, &str); 2] =
    [("queue.buffering.max.ms", "linger.ms"), ("compression.codec", "compression.type")];

/// The name under which the daemon sets the property `key`.
pub fn canonical_property(key: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == key).map_or(key, |(_, name)| name)
}

/// Why the property `key` may not be set, where that is so.
pub fn owned_property(key: &str) -> Option<String> {
    OWNED
        .iter()
        .find(|(owned, _)| *owned == key)
        .map(|(_, why)| format!("kafka.properties: `{key}` cannot be set: {why}"))
}
