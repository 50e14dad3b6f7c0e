//! Documents whose tokens follow from the seed and their number, produced while the faults act.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::message::{DeliveryResult, Message as _};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{TokenIds, TokenizedDocument};

use super::options::Options;
use super::topics::Topics;
use super::watch::Watch;
use crate::Kafka;

const KEYS: usize = 40;
/// Longer than the model's context at times, and a single token at others.
const TOKENS: std::ops::Range<usize> = 1..140;
const VOCABULARY: u32 = 512;

/// What there is to be found afterwards, by name.
#[derive(Clone, Debug, Default)]
pub struct Obligations {
    /// The run's seed.
    pub seed: u64,
    /// What the broker has acknowledged, and the partition that it is in.
    pub acknowledged: HashMap<String, i32>,
    /// What the producer was not told the fate of: it may be there.
    pub doubtful: HashSet<String>,
    /// What was removed before anybody read it.
    pub trimmed: HashSet<String>,
}

impl Obligations {
    /// What must come out.
    pub fn expected(&self) -> impl Iterator<Item = &String> {
        self.acknowledged.keys().filter(|name| !self.trimmed.contains(*name))
    }
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
fn id(number: usize) -> String {
    format!("document-{number}")
}

/// The number of a document, of its id.
pub fn number(id: &str) -> Option<usize> {
    id.strip_prefix("document-")?.parse().ok()
}

/// Key of poison record `number`.
fn poison_key(number: usize) -> String {
    format!("poison-{number}")
}

/// The name under which a record of the documents topic comes out.
pub fn name(key: Option<&[u8]>, payload: Option<Bytes>) -> String {
    let key = String::from_utf8_lossy(key.unwrap_or_default()).into_owned();
    if key.starts_with("poison-") {
        return key;
    }
    TokenizedDocument::decode(payload.unwrap_or_default()).unwrap().id
}

/// Hears what becomes of each record.
#[derive(Clone)]
struct Delivery {
    books: Arc<Mutex<Obligations>>,
    watch: Watch,
}

impl Delivery {
    fn books(&self) -> MutexGuard<'_, Obligations> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Delivery {}

impl ProducerContext for Delivery {
    type DeliveryOpaque = Box<String>;

    fn delivery(&self, outcome: &DeliveryResult<'_>, name: Box<String>) {
        match outcome {
            Ok(message) => {
                self.watch.acknowledged(&name, message.partition());
                self.books().acknowledged.insert(*name, message.partition());
            }
            Err((error, _)) => {
                eprintln!("the fate of {name} is not known: {error}");
                self.books().doubtful.insert(*name);
            }
        }
    }
}

/// A thread that produces documents.
pub struct Load {
    topic: String,
    producer: ThreadedProducer<Delivery>,
    delivery: Delivery,
    poison: AtomicUsize,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Load {
    /// Begins.
    pub(super) fn start(
        kafka: &Kafka,
        topics: &Topics,
        model: &Path,
        options: &Options,
        watch: Watch,
    ) -> Self {
        let books = Obligations { seed: options.seed, ..Obligations::default() };
        let delivery = Delivery { books: Arc::new(Mutex::new(books)), watch };
        let producer: ThreadedProducer<Delivery> = ClientConfig::new()
            .set("bootstrap.servers", &kafka.bootstrap_servers)
            .set("enable.idempotence", "true")
            .set("message.timeout.ms", "0")
            .set("partitioner", "murmur2_random")
            .set("reconnect.backoff.max.ms", "1000")
            .set("topic.metadata.refresh.interval.ms", "2000")
            .create_with_context(delivery.clone())
            .unwrap();
        let tokenizer = Fingerprint::of_bytes(&std::fs::read(model.join("tokenizer.json")).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (producer, stop) = (producer.clone(), Arc::clone(&stop));
            let (seed, topic) = (options.seed, topics.documents.clone());
            let pause = Duration::from_secs(1) / u32::try_from(options.documents_per_second).unwrap();
            move || {
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let document = TokenizedDocument {
                        id: id(number),
                        tokens: TokenIds::new(&tokens(seed, number)),
                        tokenizer,
                        source: String::new(),
                        attributes: BTreeMap::new(),
                    };
                    let payload = document.encode();
                    send(&producer, &topic, &key(number), Some(payload.as_ref()), document.id);
                    std::thread::sleep(pause);
                }
            }
        });
        Self {
            topic: topics.documents.clone(),
            producer,
            delivery,
            poison: AtomicUsize::new(0),
            stop,
            thread,
        }
    }

    /// Records that the broker has acknowledged so far.
    pub fn acknowledged(&self) -> usize {
        self.delivery.books().acknowledged.len()
    }

    /// Notes what was removed before anybody read it.
    pub fn trim(&self, names: Vec<String>) {
        for name in &names {
            self.delivery.watch.finished(name);
        }
        self.delivery.books().trimmed.extend(names);
    }

    /// Sends `count` records that cannot be scored, of several kinds.
    pub fn poison(&self, count: usize) {
        let first = self.poison.fetch_add(count, Ordering::Relaxed);
        for number in first..first + count {
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
            send(&self.producer, &self.topic, &foreign.id, payload.as_deref(), foreign.id.clone());
        }
    }

    /// Ends, once the broker has said of everything what became of it.
    pub fn stop(self) -> Obligations {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.producer.flush(Duration::from_mins(2)).unwrap();
        self.delivery.books().clone()
    }
}

fn send(producer: &ThreadedProducer<Delivery>, topic: &str, key: &str, payload: Option<&[u8]>, name: String) {
    let mut record = BaseRecord::<str, [u8], Box<String>>::with_opaque_to(topic, Box::new(name)).key(key);
    record.payload = payload;
    producer.send(record).map_err(|(error, _)| error).unwrap();
}
