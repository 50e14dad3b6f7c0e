//! The start is over with the group's first assignment, and not with the first turn of a loop.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use rdkafka::mocking::MockCluster;
use sluice_daemon::config::{Config, Delivery};
use sluice_daemon::health::Health;
use sluice_daemon::ledger::Ledger;
use sluice_daemon::metrics::Metrics;
use sluice_daemon::score::ModelIdentity;
use sluice_daemon::source::subscribe;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::Precision;

const PATIENCE: Duration = Duration::from_mins(1);

#[test]
fn a_start_is_over_when_the_group_has_spoken() {
    let cluster = MockCluster::new(1).unwrap();
    let mut config = Config::default();
    config.kafka.bootstrap_servers = cluster.bootstrap_servers();
    config.kafka.delivery = Delivery::AtLeastOnce;
    let topics = &config.kafka;
    for topic in [&topics.documents_topic, &topics.scored_topic, &topics.dead_letter_topic] {
        cluster.create_topic(topic, 2, 1).unwrap();
    }
    let (ledger, metrics, health) = (Arc::new(Ledger::default()), Metrics::new().unwrap(), Health::default());
    let source = subscribe(&config, Arc::clone(&ledger), metrics.clone(), health.clone()).unwrap();
    health.set_serving();
    assert_eq!(health.not_ready(), Some("no partition is assigned yet"));
    let model = ModelIdentity {
        fingerprint: Fingerprint::of_bytes(b"model"),
        tokenizer: Fingerprint::of_bytes(b"tokenizer"),
        vocabulary: 2,
        precision: Precision::F32,
    };
    let (jobs, _kept_open) = unbounded();
    std::thread::scope(|scope| {
        scope.spawn(|| source.run(&jobs, model).unwrap());
        let begun = Instant::now();
        while !health.has_started() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        let seen = (health.has_started(), metrics.rebalances.get());
        // Then their offsets are asked for.
        while health.not_ready().is_some() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        let placed =
            (health.not_ready(), metrics.assigned_partitions.get(), metrics.unplaced_partitions.get());
        // Before anything is asserted: the reading loop would never end.
        health.stop();
        assert_eq!(seen, (true, 1), "the first turn comes before the first assignment");
        assert_eq!(placed, (None, 2, 0));
    });
    assert!(ledger.is_finished());
}
