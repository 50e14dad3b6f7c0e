//! The topic that the tests of ranks read: documents of every kind, in transactions of which some were aborted.

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Losses, Precision, ScoredDocument, TokenIds, TokenizedDocument,
};
use sluice_schemas::windows::windows;
use sluice_tests::Kafka;
use sluice_tests::ranks::Settings;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tempfile::TempDir;

pub const TOPIC: &str = "scored";
pub const EPOCHS: usize = 2;
pub const ROWS: usize = 2;
pub const ROW: usize = 64;
pub const VOCABULARY: u32 = 1000;
pub const CALL: Duration = Duration::from_secs(30);
pub const PATIENCE: Duration = Duration::from_mins(1);
/// Far more than a rank needs to see that the hub is gone, and far less than it waits for one that is there.
pub const END_MAX: Duration = Duration::from_secs(20);
pub const SIGKILL: i32 = 9;

/// Documents of each partition; each is a lane.
pub const DOCUMENTS: [usize; 8] = [150, 0, 30, 90, 12, 60, 3, 45];
/// Transactions that they are written in, each followed by one that is aborted.
pub const TRANSACTIONS: usize = 5;

/// A reference model whose windows are shorter than a row.
pub const SHORT: (&str, ContextPolicy) = ("short", ContextPolicy { window: 48, stride: 24, bos: Bos::None });
/// One whose windows are longer than a row.
pub const LONG: (&str, ContextPolicy) =
    ("long", ContextPolicy { window: 96, stride: 48, bos: Bos::Document(7) });

pub fn tokenizer() -> Fingerprint {
    Fingerprint::of_bytes(tokenizer_json().as_bytes())
}

/// A `tokenizer.json` of one word for each id.
pub fn tokenizer_json() -> String {
    let words: BTreeMap<String, u32> = (0..VOCABULARY).map(|id| (format!("w{id}"), id)).collect();
    let model = serde_json::json!({ "type": "WordLevel", "vocab": words, "unk_token": "w0" });
    serde_json::json!({ "version": "1.0", "added_tokens": [], "model": model }).to_string()
}

/// A broker with the topic that all tests of this file read.
pub struct Fixture {
    pub kafka: Kafka,
    _data: TempDir,
    /// Pieces of each document.
    pub pieces: BTreeMap<String, usize>,
}

impl Fixture {
    /// The one that another test has started, if it still runs.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Fixture>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let fixture = Arc::new(Self::start());
            *shared = Arc::downgrade(&fixture);
            fixture
        })
    }

    pub fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let kafka = Kafka::start(&data.path().join("kafka"));
        kafka.create_topic(TOPIC, DOCUMENTS.len() as i32);
        let pieces = write_topic(&kafka.bootstrap_servers);
        Self { kafka, _data: data, pieces }
    }

    pub fn settings(&self, state: &Path) -> Settings {
        let models = [SHORT, LONG].map(|(model, _)| Fingerprint::of_bytes(model.as_bytes()).to_string());
        let flags = [
            ("--topic", TOPIC.to_owned()),
            ("--rows", ROWS.to_string()),
            ("--len", ROW.to_string()),
            ("--micro-batches", "8".to_owned()),
            ("--shuffle-buffer", "40".to_owned()),
            ("--seed", "1".to_owned()),
            ("--epochs", EPOCHS.to_string()),
            ("--checkpoint-every", "3".to_owned()),
            ("--tokenizer-fingerprint", tokenizer().to_string()),
            ("--vocabulary", VOCABULARY.to_string()),
            ("--allow-reference-models", models.join(",")),
        ];
        Settings {
            bootstrap_servers: self.kafka.bootstrap_servers.clone(),
            state: state.to_owned(),
            flags: flags.into(),
        }
    }

    /// How often each document's pieces are read in all passes.
    pub fn reads(&self) -> BTreeMap<String, usize> {
        self.pieces.iter().map(|(id, pieces)| (id.clone(), pieces * EPOCHS)).collect()
    }
}

/// Fills the topic and gives the number of pieces that each document comes to, of those that come to any.
pub fn write_topic(bootstrap_servers: &str) -> BTreeMap<String, usize> {
    let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", bootstrap_servers)
        .set("transactional.id", "writer")
        .create()
        .unwrap();
    let send = |partition: usize, id: &str, payload: Option<&Bytes>| {
        let mut record = BaseRecord::<str, [u8]>::to(TOPIC).key(id).partition(partition as i32);
        if let Some(payload) = payload {
            record = record.payload(payload);
        }
        producer.send(record).map_err(|(error, _)| error).unwrap();
    };
    let mut random = fastrand::Rng::with_seed(8);
    let mut pieces = BTreeMap::new();
    producer.init_transactions(CALL).unwrap();
    for transaction in 0..TRANSACTIONS {
        producer.begin_transaction().unwrap();
        for (partition, documents) in DOCUMENTS.into_iter().enumerate() {
            for number in (0..documents).filter(|number| number * TRANSACTIONS / documents == transaction) {
                let document = document(&mut random, partition, format!("{partition}/{number}"));
                let count = pieces_of(&document);
                if count > 0 {
                    pieces.insert(document.document.id.clone(), count);
                }
                send(partition, &document.document.id, Some(&document.encode()));
            }
            if documents > 0 && partition % 3 == transaction % 3 {
                send(partition, "a tombstone", None);
            }
        }
        producer.commit_transaction(CALL).unwrap();

        producer.begin_transaction().unwrap();
        for partition in
            (0..DOCUMENTS.len()).filter(|&partition| DOCUMENTS[partition] > 0 && partition % 2 == 0)
        {
            for number in 0..3 {
                let id = format!("aborted/{partition}/{transaction}/{number}");
                let document = document(&mut random, partition, id);
                send(partition, &document.document.id, Some(&document.encode()));
            }
        }
        // So that they are in the topic, and not dropped here.
        producer.flush(CALL).unwrap();
        producer.abort_transaction(CALL).unwrap();
    }
    pieces
}

/// A document of any length, often longer than a row or a window. Some partitions hold documents of one model alone.
pub fn document(random: &mut fastrand::Rng, partition: usize, id: String) -> ScoredDocument {
    let (model, context) = match partition {
        5 => SHORT,
        6 => LONG,
        _ => random.choice([SHORT, LONG]).unwrap(),
    };
    let length = match random.u8(0..10) {
        0 => random.usize(1..4),
        1..=6 => random.usize(2..50),
        7 | 8 => random.usize(50..110),
        _ => random.usize(110..260),
    };
    scored(random, id, length, model, context)
}

pub fn scored(
    random: &mut fastrand::Rng,
    id: String,
    length: usize,
    model: &str,
    context: ContextPolicy,
) -> ScoredDocument {
    let tokens: Vec<u32> = (0..length).map(|_| random.u32(0..VOCABULARY)).collect();
    let mut values = || {
        let mut values: Vec<f32> = (0..length).map(|_| random.f32() * 12.0).collect();
        values[0] = if context.bos == Bos::None { f32::NAN } else { values[0] };
        Losses::new(&values, LossFormat::F16).unwrap()
    };
    let (reference_losses, entropies) = (values(), values());
    ScoredDocument {
        document: TokenizedDocument {
            id,
            tokens: TokenIds::new(&tokens),
            tokenizer: tokenizer(),
            source: String::new(),
            attributes: BTreeMap::new(),
        },
        reference_losses,
        reference_entropies: random.bool().then_some(entropies),
        reference_model: Fingerprint::of_bytes(model.as_bytes()),
        context,
        precision: Precision::F32,
    }
}

/// The windows of the reference where they fit a row, and windows of a row's length where they do not.
pub fn pieces_of(document: &ScoredDocument) -> usize {
    let tokens = document.document.tokens.to_vec();
    let ContextPolicy { window, stride, bos } = document.context;
    let row = ROW as u32;
    let places = tokens.len() + usize::from(bos != Bos::None);
    let context = if window > row && places > ROW {
        ContextPolicy { window: row, stride: stride * row / window, bos }
    } else {
        document.context
    };
    windows(&tokens, context).len()
}
