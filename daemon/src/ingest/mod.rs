//! `sluiced ingest`: text through a tokenizer to the documents topic.

mod read;

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names;
use sluice_schemas::record::{TokenIds, TokenizedDocument};
use tokenizers::Tokenizer;

use crate::exit::{DATA, ExitCode as _, ExitError, NO_INPUT, UNAVAILABLE, USAGE};
use crate::kafka::{self, log_client};
pub use read::{Fields, Format, Text, open};

/// Documents tokenized at once, over all cores.
const CHUNK_DOCUMENTS: usize = 1024;
/// Bytes of text tokenized at once.
const CHUNK_BYTES: usize = 8 << 20;
/// Bad lines that are shown; all are counted.
const SHOWN: u64 = 10;

/// What `sluiced ingest` was asked to do.
#[derive(Clone, Debug)]
pub struct Ingest {
    /// Brokers, as HOST:PORT, separated by commas.
    pub bootstrap_servers: String,
    /// Topic of tokenized documents.
    pub topic: String,
    /// The `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// Names of the fields in JSON Lines.
    pub fields: Fields,
    /// What the files are.
    pub format: Format,
    /// Source of documents that do not name their own.
    pub source: String,
    /// Other settings of librdkafka.
    pub properties: BTreeMap<String, String>,
    /// Most bytes of one record.
    pub record_bytes_max: u32,
    /// Files; `-` is standard input.
    pub files: Vec<PathBuf>,
}

/// What became of the input.
#[derive(Debug, Default)]
struct Counts {
    documents: u64,
    tokens: u64,
    bad: u64,
}

struct Delivery {
    failures: Arc<AtomicU64>,
}

impl ClientContext for Delivery {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_client(level, facility, message);
    }
}

impl ProducerContext for Delivery {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result
            && self.failures.fetch_add(1, Ordering::Relaxed) < SHOWN
        {
            tracing::error!(%error, "the broker refused a document");
        }
    }
}

/// Ingests every file; bad lines are passed over, counted, and make the exit code 65.
pub fn run(ingest: &Ingest) -> anyhow::Result<()> {
    let json = std::fs::read(&ingest.tokenizer)
        .with_context(|| format!("cannot read the tokenizer {}", ingest.tokenizer.display()))
        .exit_code(NO_INPUT)?;
    let fingerprint = Fingerprint::of_bytes(&json);
    let mut tokenizer = Tokenizer::from_bytes(&json)
        .map_err(|error| anyhow!("{} is no tokenizer.json: {error}", ingest.tokenizer.display()))
        .exit_code(NO_INPUT)?;
    // A record holds the document's own tokens, neither cut nor padded, whatever the file says.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| anyhow!(error))?;
    if let Some(problem) = ingest.properties.keys().find_map(|key| kafka::owned_property(key)) {
        return Err(anyhow!(problem)).exit_code(USAGE);
    }
    for file in ingest.files.iter().filter(|file| file.as_os_str() != "-") {
        if !file.is_file() {
            return Err(anyhow!("the file {} does not exist", file.display())).exit_code(NO_INPUT);
        }
    }

    let failures = Arc::new(AtomicU64::new(0));
    let producer: ThreadedProducer<Delivery> =
        kafka::producer_config(&ingest.bootstrap_servers, &ingest.properties, ingest.record_bytes_max)
            .create_with_context(Delivery { failures: Arc::clone(&failures) })
            .context("--property")
            .exit_code(USAGE)?;
    kafka::reach(producer.client(), &ingest.bootstrap_servers, Duration::from_secs(10))
        .exit_code(UNAVAILABLE)?;

    let progress = progress_bar(&ingest.files);
    let mut counts = Counts::default();
    for file in &ingest.files {
        ingest_file(file, ingest, &tokenizer, fingerprint, &producer, &progress, &mut counts)?;
    }
    progress.set_message("waiting for the broker");
    producer
        .flush(Duration::from_mins(5))
        .context("the broker did not confirm all documents within 5 minutes")?;
    progress.finish_and_clear();
    let failed = failures.load(Ordering::Relaxed);
    tracing::info!(
        documents = counts.documents - failed,
        tokens = counts.tokens,
        bad = counts.bad,
        failed,
        tokenizer = fingerprint.short(),
        topic = ingest.topic,
        "ingested"
    );
    if failed > 0 {
        bail!("the broker refused {failed} documents");
    }
    if counts.bad > 0 {
        return Err(anyhow!("{} lines or files hold no document; all others were ingested", counts.bad))
            .exit_code(DATA);
    }
    Ok(())
}

fn progress_bar(files: &[PathBuf]) -> ProgressBar {
    let sizes: Option<u64> =
        files.iter().map(|file| std::fs::metadata(file).ok().map(|metadata| metadata.len())).sum();
    let bar = match sizes {
        Some(bytes) => ProgressBar::new(bytes)
            .with_style(style("ingest {bar:40} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left  {msg}")),
        None => {
            ProgressBar::new_spinner().with_style(style("ingest {spinner} {bytes} {bytes_per_sec}  {msg}"))
        }
    };
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn ingest_file(
    file: &Path,
    ingest: &Ingest,
    tokenizer: &Tokenizer,
    fingerprint: Fingerprint,
    producer: &ThreadedProducer<Delivery>,
    progress: &ProgressBar,
    counts: &mut Counts,
) -> anyhow::Result<()> {
    let documents = open(file, ingest.format, &ingest.fields, progress)
        .with_context(|| format!("cannot read {}", file.display()))
        .exit_code(NO_INPUT)?;
    let mut chunk: Vec<Text> = Vec::new();
    let mut bytes = 0;
    for document in documents {
        match document {
            Ok(text) => {
                bytes += text.text.len();
                chunk.push(text);
            }
            Err(error) => {
                counts.bad += 1;
                if counts.bad <= SHOWN {
                    progress.suspend(|| tracing::warn!("{error:#}"));
                }
            }
        }
        if chunk.len() >= CHUNK_DOCUMENTS || bytes >= CHUNK_BYTES {
            send_chunk(std::mem::take(&mut chunk), ingest, tokenizer, fingerprint, producer, counts)?;
            bytes = 0;
            progress.set_message(format!("{} documents, {} tokens", counts.documents, counts.tokens));
        }
    }
    send_chunk(chunk, ingest, tokenizer, fingerprint, producer, counts)
}

fn send_chunk(
    chunk: Vec<Text>,
    ingest: &Ingest,
    tokenizer: &Tokenizer,
    fingerprint: Fingerprint,
    producer: &ThreadedProducer<Delivery>,
    counts: &mut Counts,
) -> anyhow::Result<()> {
    let texts: Vec<&str> = chunk.iter().map(|text| text.text.as_str()).collect();
    // Without special tokens: what stands before a document is the scorer's policy, not the record's.
    let encodings = tokenizer
        .encode_batch_fast(texts, false)
        .map_err(|error| ExitError { code: DATA, error: anyhow!("the tokenizer fails: {error}") })?;
    for (text, encoding) in chunk.into_iter().zip(encodings) {
        let document = TokenizedDocument {
            id: text.id,
            tokens: TokenIds::new(encoding.get_ids()),
            tokenizer: fingerprint,
            source: text.source.unwrap_or_else(|| ingest.source.clone()),
            attributes: BTreeMap::new(),
        };
        counts.documents += 1;
        counts.tokens += document.tokens.len() as u64;
        send(producer, &ingest.topic, &document)?;
    }
    Ok(())
}

fn send(
    producer: &ThreadedProducer<Delivery>,
    topic: &str,
    document: &TokenizedDocument,
) -> anyhow::Result<()> {
    let payload = document.encode();
    let headers = OwnedHeaders::new()
        .insert(Header { key: names::RECORD_HEADER, value: Some(names::TOKENIZED_DOCUMENT) });
    let mut record =
        BaseRecord::to(topic).key(document.id.as_str()).payload(payload.as_ref()).headers(headers);
    loop {
        match producer.send(record) {
            Ok(()) => return Ok(()),
            Err((error, returned)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                record = returned;
                std::thread::sleep(Duration::from_millis(10));
            }
            Err((error, _)) => {
                return Err(anyhow!(error))
                    .with_context(|| format!("cannot publish document `{}`", document.id));
            }
        }
    }
}
