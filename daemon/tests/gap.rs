//! The client's word that a partition cannot be read on, where no log has lost the place: reading begins anew.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use rdkafka::ClientConfig;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use sluice_daemon::config::{Config, Delivery};
use sluice_daemon::health::Health;
use sluice_daemon::ledger::Ledger;
use sluice_daemon::metrics::Metrics;
use sluice_daemon::score::ModelIdentity;
use sluice_daemon::sink::Sink;
use sluice_daemon::source::subscribe;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::Precision;

const PATIENCE: Duration = Duration::from_mins(1);
const PARTITIONS: i32 = 2;
const EACH: u64 = 5;

fn wait(holds: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while !holds() && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
    }
    holds()
}

/// Records that need no model: each becomes a dead letter.
fn send(config: &Config) {
    let mut settings = ClientConfig::new();
    settings.set("bootstrap.servers", &config.kafka.bootstrap_servers);
    let producer: ThreadedProducer<DefaultProducerContext> = settings.create().unwrap();
    for partition in 0..PARTITIONS {
        for _ in 0..EACH {
            let record = BaseRecord::<str, str>::to(&config.kafka.documents_topic).payload("no document");
            producer.send(record.partition(partition)).map_err(|(error, _)| error).unwrap();
        }
    }
    producer.flush(PATIENCE).unwrap();
}

#[test]
fn reading_begins_anew_where_the_group_stands() {
    let cluster = MockCluster::new(1).unwrap();
    let mut config = Config::default();
    config.kafka.bootstrap_servers = cluster.bootstrap_servers();
    config.kafka.delivery = Delivery::AtLeastOnce;
    let topics = &config.kafka;
    for topic in [&topics.documents_topic, &topics.scored_topic, &topics.dead_letter_topic] {
        cluster.create_topic(topic, PARTITIONS, 1).unwrap();
    }
    let (ledger, metrics, health) = (Arc::new(Ledger::default()), Metrics::new().unwrap(), Health::default());
    let source = subscribe(&config, Arc::clone(&ledger), metrics.clone(), health.clone()).unwrap();
    health.set_serving();
    let model = ModelIdentity {
        fingerprint: Fingerprint::of_bytes(b"model"),
        tokenizer: Fingerprint::of_bytes(b"tokenizer"),
        vocabulary: 2,
        precision: Precision::F32,
    };
    let (jobs, _kept_open) = unbounded();
    let committed = |times| metrics.dead_letters.with_label_values(&["malformed"]).get() >= times * EACH * 2;
    let (before, after) = std::thread::scope(|scope| {
        scope.spawn(|| source.run(&jobs, model).unwrap());
        scope.spawn(|| {
            Sink::new(&config, source.consumer(), &ledger, &metrics, &health).unwrap().run().unwrap();
        });
        send(&config);
        let before = wait(|| committed(1) && ledger.is_drained());
        let gone = RDKafkaRespErr::RD_KAFKA_RESP_ERR_OFFSET_OUT_OF_RANGE;
        cluster.request_errors(RDKafkaApiKey::Fetch, &[gone]);
        let told = wait(|| metrics.kafka_errors.get() > 0);
        send(&config);
        let after = told && wait(|| committed(2) && ledger.is_drained());
        // Before anything is asserted: the reading loop would never end.
        health.stop();
        (before, after)
    });
    assert!(before && after);
    assert_eq!(metrics.documents_read.get(), 2 * EACH * 2, "nothing was read twice, and nothing passed over");
    assert_eq!(metrics.dead_letters.with_label_values(&["malformed"]).get(), 2 * EACH * 2);
}
