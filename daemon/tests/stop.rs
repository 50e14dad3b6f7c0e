//! A record that is read while the daemon begins to stop is published, however the loops' turns fall.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rdkafka::mocking::MockCluster;
use sluice_daemon::config::{Config, Delivery};
use sluice_daemon::health::Health;
use sluice_daemon::ledger::Ledger;
use sluice_daemon::metrics::Metrics;
use sluice_daemon::outcome::{DeadLetter, Outcome};
use sluice_daemon::sink::Sink;
use sluice_daemon::source::subscribe;

/// Several turns of the publishing loop.
const TURNS: Duration = Duration::from_millis(500);

#[test]
fn publishing_goes_on_until_nothing_can_come_any_more() {
    let cluster = MockCluster::new(1).unwrap();
    let mut config = Config::default();
    config.kafka.bootstrap_servers = cluster.bootstrap_servers();
    config.kafka.delivery = Delivery::AtLeastOnce;
    let topics = &config.kafka;
    for topic in [&topics.documents_topic, &topics.scored_topic, &topics.dead_letter_topic] {
        cluster.create_topic(topic, 1, 1).unwrap();
    }
    let (ledger, metrics, health) = (Arc::new(Ledger::default()), Metrics::new().unwrap(), Health::default());
    let source = subscribe(&config, Arc::clone(&ledger), metrics.clone(), health.clone()).unwrap();
    std::thread::scope(|scope| {
        let sink =
            scope.spawn(|| Sink::new(&config, source.consumer(), &ledger, &metrics, &health).unwrap().run());
        health.stop();
        std::thread::sleep(TURNS);
        assert!(!sink.is_finished(), "the reading loop has not said yet that it reads no more");
        ledger.assign([0]);
        let ticket = ledger.open(0, 0, 64).unwrap();
        let letter = DeadLetter::new(None, Bytes::from_static(b"?"), "malformed", "no document");
        ledger.complete(ticket, Outcome::DeadLetter(letter));
        ledger.close();
        sink.join().unwrap().unwrap();
    });
    assert!(ledger.is_finished());
    assert_eq!(metrics.dead_letters.with_label_values(&["malformed"]).get(), 1);
}
