//! Documents whose tokens follow from the seed and their number, produced while the faults act.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{TokenIds, TokenizedDocument};

use super::options::Options;
use super::topics::Topics;
use crate::Kafka;

const KEYS: usize = 40;
/// Longer than the model's context at times, and a single token at others.
const TOKENS: std::ops::Range<usize> = 1..140;
const VOCABULARY: u32 = 512;

/// What the broker has acknowledged.
#[derive(Clone, Debug, Default)]
pub struct Obligations {
    /// The run's seed.
    pub seed: u64,
    /// Documents `0..documents`.
    pub documents: usize,
    /// Poison records `0..poison`.
    pub poison: usize,
}

/// Tokens of document `number`.
pub fn tokens(seed: u64, number: usize) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(seed ^ (number as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    (0..random.usize(TOKENS)).map(|_| random.u32(..VOCABULARY)).collect()
}

/// Key of document `number`: one of a few, so that the order within a key can be seen.
pub fn key(number: usize) -> String {
    format!("key-{}", number % KEYS)
}

/// Id of document `number`.
pub fn id(number: usize) -> String {
    format!("document-{number}")
}

/// Key of poison record `number`.
pub fn poison_key(number: usize) -> String {
    format!("poison-{number}")
}

/// A thread that produces documents.
pub struct Load {
    seed: u64,
    topic: String,
    producer: ThreadedProducer<DefaultProducerContext>,
    sent: Arc<AtomicUsize>,
    poison: Mutex<usize>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Load {
    /// Begins.
    pub(super) fn start(kafka: &Kafka, topics: &Topics, model: &Path, options: &Options) -> Self {
        let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
            .set("bootstrap.servers", &kafka.bootstrap_servers)
            .set("enable.idempotence", "true")
            .set("message.timeout.ms", "0")
            .set("partitioner", "murmur2_random")
            .create()
            .unwrap();
        let tokenizer = Fingerprint::of_bytes(&std::fs::read(model.join("tokenizer.json")).unwrap());
        let (sent, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (producer, sent, stop) = (producer.clone(), Arc::clone(&sent), Arc::clone(&stop));
            let (seed, topic) = (options.seed, topics.documents.clone());
            let pause = Duration::from_secs(1) / u32::try_from(options.documents_per_second).unwrap();
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let number = sent.load(Ordering::Relaxed);
                    let document = TokenizedDocument {
                        id: id(number),
                        tokens: TokenIds::new(&tokens(seed, number)),
                        tokenizer,
                        source: String::new(),
                        attributes: BTreeMap::new(),
                    };
                    let (key, payload) = (key(number), document.encode());
                    let record = BaseRecord::<str, [u8]>::to(&topic).key(&key).payload(&payload);
                    producer.send(record).map_err(|(error, _)| error).unwrap();
                    sent.store(number + 1, Ordering::Relaxed);
                    std::thread::sleep(pause);
                }
            }
        });
        Self {
            seed: options.seed,
            topic: topics.documents.clone(),
            producer,
            sent,
            poison: Mutex::new(0),
            stop,
            thread,
        }
    }

    /// Documents handed to the producer so far.
    pub fn acknowledged(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    /// Sends `count` records that cannot be scored, of several kinds.
    pub fn poison(&self, count: usize) {
        let mut sent = self.poison.lock().unwrap();
        for number in *sent..*sent + count {
            let foreign = TokenizedDocument {
                id: poison_key(number),
                tokens: TokenIds::new(&[1, 2, 3]),
                tokenizer: Fingerprint::of_bytes(b"another tokenizer"),
                source: String::new(),
                attributes: BTreeMap::new(),
            };
            let payload: Option<Bytes> = match number % 4 {
                0 => Some(foreign.encode()),
                1 => Some(vec![0xff; 50].into()),
                2 => Some(foreign.encode().slice(..20)),
                _ => None,
            };
            let key = poison_key(number);
            let mut record = BaseRecord::<str, [u8]>::to(&self.topic).key(&key);
            record.payload = payload.as_deref();
            self.producer.send(record).map_err(|(error, _)| error).unwrap();
        }
        *sent += count;
    }

    /// Ends, once the broker has acknowledged everything.
    pub fn stop(self) -> Obligations {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.producer.flush(Duration::from_mins(2)).unwrap();
        Obligations {
            seed: self.seed,
            documents: self.sent.load(Ordering::Relaxed),
            poison: *self.poison.lock().unwrap(),
        }
    }
}
