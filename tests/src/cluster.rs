//! A real Kafka with the daemon's topics, and daemons on it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{ScoredDocument, TokenIds, TokenizedDocument};
use tempfile::TempDir;

use crate::{Daemon, Kafka, Shape, golden, produce_to, read_all};

/// Each test has a cluster to itself, and two cores have room for one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A cluster for one test, which ends with this value.
pub struct Cluster {
    /// Its brokers.
    pub kafka: Kafka,
    _data: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    /// A cluster of `brokers` brokers without topics.
    pub fn start(brokers: usize) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let data = tempfile::tempdir().unwrap();
        let kafka = Kafka::start_with(&data.path().join("kafka"), Shape { brokers, tls_sasl: false });
        Self { kafka, _data: data, _alone: alone }
    }

    /// One broker with the daemon's topics, of `partitions` partitions.
    pub fn with_topics(partitions: i32) -> Self {
        let cluster = Self::start(1);
        for (topic, partitions) in
            [("sluice.documents", partitions), ("sluice.scored", partitions), ("sluice.dead-letters", 1)]
        {
            cluster.kafka.create_topic(topic, partitions);
        }
        cluster
    }

    /// Its addresses.
    pub fn servers(&self) -> &str {
        &self.kafka.bootstrap_servers
    }

    /// A daemon with the tiny model.
    pub fn daemon(&self, flags: &[&str]) -> Daemon {
        Daemon::start_with(self.servers(), &golden("tiny-llama"), flags)
    }

    /// Publishes documents of `tokens` tokens, named by number.
    pub fn send(&self, numbers: Range<usize>, tokens: usize) {
        self.send_to(None, numbers, tokens);
    }

    /// The same to one partition, or to each by its key.
    pub fn send_to(&self, partition: Option<i32>, numbers: Range<usize>, tokens: usize) {
        let tokenizer = Fingerprint::of_bytes(&std::fs::read(golden("tiny-llama/tokenizer.json")).unwrap());
        let records: Vec<(String, Bytes)> = numbers
            .map(|number| {
                let document = TokenizedDocument {
                    id: format!("document-{number}"),
                    tokens: TokenIds::new(&vec![7; tokens]),
                    tokenizer,
                    source: String::new(),
                    attributes: BTreeMap::new(),
                };
                (document.id.clone(), document.encode())
            })
            .collect();
        let borrowed: Vec<_> =
            records.iter().map(|(id, payload)| (id.as_str(), Some(payload.clone()))).collect();
        produce_to(self.servers(), "sluice.documents", partition, &borrowed);
    }

    /// Ids of the scored documents that a reader of committed records finds, sorted.
    pub fn scored_ids(&self) -> Vec<String> {
        let records = read_all(self.servers(), "sluice.scored");
        let ids =
            records.iter().map(|record| ScoredDocument::decode(record.payload.clone().unwrap()).unwrap());
        let mut ids: Vec<_> = ids.map(|document| document.document.id).collect();
        ids.sort();
        ids
    }

    /// Asserts that each of `documents` documents was scored once and nothing else was.
    pub fn assert_each_once(&self, documents: usize) {
        let mut wanted: Vec<String> = (0..documents).map(|number| format!("document-{number}")).collect();
        wanted.sort();
        let found = self.scored_ids();
        if found != wanted {
            let lost: Vec<_> = wanted.iter().filter(|id| found.binary_search(id).is_err()).take(5).collect();
            let doubled: Vec<_> = found.windows(2).filter(|pair| pair[0] == pair[1]).take(5).collect();
            panic!("{} of {documents} documents; lost: {lost:?}; doubled: {doubled:?}", found.len());
        }
    }

    /// Waits until `documents` records are in the scored topic, for at most two minutes.
    pub fn wait_scored(&self, documents: usize) {
        let deadline = Instant::now() + Duration::from_mins(2);
        loop {
            let scored = read_all(self.servers(), "sluice.scored").len();
            if scored >= documents {
                return;
            }
            if Instant::now() > deadline {
                self.assert_each_once(documents);
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}
