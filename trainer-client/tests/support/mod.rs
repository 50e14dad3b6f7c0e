//! What several tests share: a tokenizer, records, a mock broker with records in it, and a small learner.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test uses some of it, and may stop at the first surprise"
)]

pub mod bigram;
pub mod model;
pub mod program;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use serde_json::json;
use sluice_feed::feed::Feed;
use sluice_feed::pack::{BatchShape, Packing};
use sluice_feed::plan::Plan as FeedPlan;
use sluice_feed::random::SplitMix64;
use sluice_feed::stream::{DocumentStream, Extent, Shard};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names::RECORD_HEADER;
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Losses, Precision, ScoredDocument, TokenIds, TokenizedDocument,
};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// A byte-level tokenizer without merges: 256 ids, one for each byte.
pub fn write_tokenizer(folder: &Path) -> PathBuf {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocabulary: BTreeMap<String, u32> = alphabet.into_iter().map(String::from).zip(0..).collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
    });
    let path = folder.join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    path
}

pub fn tokenized(id: &str, source: &str, tokens: &[u32], tokenizer: Fingerprint) -> TokenizedDocument {
    TokenizedDocument {
        id: id.to_owned(),
        tokens: TokenIds::new(tokens),
        tokenizer,
        source: source.to_owned(),
        attributes: BTreeMap::new(),
    }
}

/// A scored document, each token with the same reference loss.
pub fn scored(document: TokenizedDocument, loss: f32, reference_model: Fingerprint) -> ScoredDocument {
    let mut losses = vec![loss; document.tokens.len()];
    losses[0] = f32::NAN;
    ScoredDocument {
        document,
        reference_losses: Losses::new(&losses, LossFormat::F32).unwrap(),
        reference_entropies: None,
        reference_model,
        context: ContextPolicy { window: 32, stride: 16, bos: Bos::None },
        precision: Precision::F32,
    }
}

/// Documents of two sources: "pattern" repeats a short run of tokens, "noise" is uniform over 256 ids.
pub fn mixture(count: usize, tokenizer: Fingerprint, reference_model: Fingerprint) -> Vec<ScoredDocument> {
    let mut generator = SplitMix64::keyed(17, 0);
    (0..count)
        .map(|number| {
            let length = 20 + generator.below(60);
            let is_pattern = number % 2 == 0;
            let tokens: Vec<u32> = (0..length)
                .map(
                    |position| {
                        if is_pattern { 60 + (position % 5) as u32 } else { generator.below(256) as u32 }
                    },
                )
                .collect();
            let (source, loss) = if is_pattern { ("pattern", 0.1) } else { ("noise", 5.5) };
            scored(tokenized(&format!("d{number}"), source, &tokens, tokenizer), loss, reference_model)
        })
        .collect()
}

pub type Cluster = MockCluster<'static, DefaultProducerContext>;

/// A mock broker with an empty topic.
pub fn cluster(topic: &str, partitions: i32) -> Cluster {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic(topic, partitions, 1).unwrap();
    cluster
}

/// Produces payloads, each to its partition.
pub fn produce(servers: &str, topic: &str, records: impl IntoIterator<Item = (i32, Vec<u8>)>) {
    produce_as(servers, topic, None, records);
}

/// Produces payloads, each to its partition, with a header that names what they are.
pub fn produce_as(
    servers: &str,
    topic: &str,
    kind: Option<&str>,
    records: impl IntoIterator<Item = (i32, Vec<u8>)>,
) {
    let records = records.into_iter().map(|(partition, payload)| (partition, Some(payload)));
    produce_with_tombstones(servers, topic, kind, records);
}

/// The same, a record without a payload where there is none.
pub fn produce_with_tombstones(
    servers: &str,
    topic: &str,
    kind: Option<&str>,
    records: impl IntoIterator<Item = (i32, Option<Vec<u8>>)>,
) {
    let producer: ThreadedProducer<_> =
        ClientConfig::new().set("bootstrap.servers", servers).create().unwrap();
    for (partition, payload) in records {
        let mut record = BaseRecord::<(), [u8]>::to(topic).partition(partition);
        if let Some(payload) = &payload {
            record = record.payload(payload);
        }
        if let Some(kind) = kind {
            let header = Header { key: RECORD_HEADER, value: Some(kind) };
            record = record.headers(OwnedHeaders::new().insert(header));
        }
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(Duration::from_secs(10)).unwrap();
}

/// A feed over a stream in memory, a micro-batch a step.
pub fn feed_over(
    stream: impl DocumentStream + 'static,
    shape: BatchShape,
    shuffle_buffer: usize,
    tokenizer: Fingerprint,
) -> Feed {
    let plan = FeedPlan {
        topic: "memory".into(),
        extent: Extent::UntilEnd { epochs: 1 },
        shape,
        packing: Packing::default(),
        micro_batches: 1,
        shuffle_buffer,
        seed: 1,
    };
    Feed::over(Box::new(stream), plan, Shard::WHOLE, None, tokenizer)
}

/// Spreads documents over partitions in turn.
pub fn produce_scored(cluster: &Cluster, topic: &str, partitions: i32, documents: &[ScoredDocument]) {
    let payloads = documents.iter().map(|document| document.encode().to_vec());
    produce(&cluster.bootstrap_servers(), topic, (0..partitions).cycle().zip(payloads));
}
