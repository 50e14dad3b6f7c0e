//! What it costs to get a batch out of Kafka: a topic of scored documents, read, shuffled and packed as a run does it, with
//! no step between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use serde_json::json;
use sluice_feed::feed::{Alone, Feed, Step};
use sluice_feed::pack::{BatchShape, Packing};
use sluice_feed::plan::Plan;
use sluice_feed::stream::{Broker, Decoder, Extent, Shard, TopicKind};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Losses, Precision, ScoredDocument, TokenIds, TokenizedDocument,
};
use sluice_tests::produce;

use crate::process::cpu_seconds;
use crate::step::Setup;
use crate::workload::Lengths;

const TOPIC: &str = "scored";
const DOCUMENTS: usize = 1000;
/// Passes over them: enough for a clock of hundredths of a second.
const EPOCHS: u64 = 30;
/// As in experiment 1.
const SHUFFLE_BUFFER: usize = 256;

/// CPU time, of all threads, and wall time of a batch of `setup`'s shape, the mean over many.
pub fn batches(setup: &Setup, vocabulary: usize) -> anyhow::Result<serde_json::Value> {
    let broker = sluice_tests::Broker::start(&["scored:4"]);
    let lengths = Lengths { median: 400.0, sigma: 1.0, longest: 2048 };
    let texts = lengths.documents(DOCUMENTS, vocabulary as u32);
    let tokenizer = write_topic(&broker.bootstrap_servers, TOPIC, &texts)?;

    let plan = Plan {
        topic: TOPIC.to_owned(),
        extent: Extent::UntilEnd { epochs: EPOCHS },
        shape: BatchShape { rows: setup.rows, len: setup.len },
        packing: Packing::default(),
        micro_batches: 1,
        shuffle_buffer: SHUFFLE_BUFFER,
        seed: 1,
    };
    let mut feed = Feed::open(
        Broker::new(broker.bootstrap_servers.clone(), vec![])?,
        plan,
        Shard::WHOLE,
        None,
        Decoder::new(TopicKind::Scored, tokenizer, vocabulary as u32),
        Arc::default(),
    )?;
    let (started, cpu) = (Instant::now(), cpu_seconds(std::process::id())?);
    let (mut count, mut tokens) = (0u32, 0);
    while let Step::Batches(batch) = feed.next_step(&mut Alone)? {
        count += 1;
        tokens += batch.iter().map(|packed| packed.batch.predictions()).sum::<usize>();
    }
    ensure!(count > 0, "the stream gave no batch");
    Ok(json!({
        "batches": count,
        "tokens": tokens,
        "seconds": started.elapsed().as_secs_f64() / f64::from(count),
        "cpu_seconds": (cpu_seconds(std::process::id())? - cpu) / f64::from(count),
    }))
}

/// Fills a topic with documents of these tokens, and made-up losses; the fingerprint of their tokenizer.
pub fn write_topic(bootstrap_servers: &str, topic: &str, texts: &[Vec<u32>]) -> anyhow::Result<Fingerprint> {
    let tokenizer = Fingerprint::of_bytes(b"random ids");
    let mut records = Vec::with_capacity(texts.len());
    for (number, tokens) in texts.iter().enumerate() {
        let record = scored(format!("document-{number}"), tokens, tokenizer)?;
        records.push((record.document.id.clone(), record.encode()));
    }
    let borrowed: Vec<_> = records.iter().map(|(id, bytes)| (id.as_str(), Some(bytes.clone()))).collect();
    produce(bootstrap_servers, topic, &borrowed);
    Ok(tokenizer)
}

fn scored(id: String, tokens: &[u32], tokenizer: Fingerprint) -> anyhow::Result<ScoredDocument> {
    let losses: Vec<f32> = (0..tokens.len()).map(|at| if at == 0 { f32::NAN } else { 5.0 }).collect();
    Ok(ScoredDocument {
        document: TokenizedDocument {
            id,
            tokens: TokenIds::new(tokens),
            tokenizer,
            source: String::new(),
            attributes: BTreeMap::new(),
        },
        reference_losses: Losses::new(&losses, LossFormat::F32)?,
        reference_entropies: None,
        reference_model: Fingerprint::of_bytes(b"random losses"),
        context: ContextPolicy { window: 2048, stride: 1024, bos: Bos::None },
        precision: Precision::F32,
    })
}
