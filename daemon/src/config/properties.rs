//! What may stand under `kafka.properties`, and in `--property`: anything of librdkafka's but what delivery depends on.

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
