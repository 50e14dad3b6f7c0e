//! `sluiced ingest`: text through a tokenizer to the documents topic.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names;
use sluice_schemas::record::{TokenIds, TokenizedDocument};
use sluice_text::{Bounds, EncodeError, Fields, Format, Text, TextReader, TextTokenizer};

use crate::config::owned_property;
use crate::exit::{DATA, ExitCode as _, ExitError, NO_INPUT, UNAVAILABLE, USAGE};
use crate::kafka::{self, Hooks};

/// Documents tokenized at once, over all cores.
const CHUNK_DOCUMENTS: usize = 1024;
/// Bytes of text tokenized at once.
const CHUNK_BYTES: usize = 8 << 20;
/// How long an outage of the broker may last, in milliseconds.
const OUTAGE_MS_MAX: &str = "120000";
/// Longest time without a word while the broker takes nothing.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Bad lines that are shown; all are counted.
const SHOWN: u64 = 10;
/// Fewest bytes of a token in a record. More tokens than this allows cannot fit, and are not made.
const TOKEN_BYTES_MIN: u32 = 2;
/// Bytes of text for each byte that a record may have. What has more does not fit: no tokenizer in use needs fewer than
/// one token for eight bytes of text, which are two bytes of the record.
const TEXT_BYTES_PER_RECORD_BYTE: usize = 4;

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
    /// Name of a token that every document begins with, such as a BOS.
    pub begin_with: Option<String>,
    /// Name of a token that every document ends with, such as an EOS.
    pub end_with: Option<String>,
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

/// Counts the documents that the broker did not take, and shows the first few.
#[derive(Debug, Default)]
struct Refusals(AtomicU64);

impl Hooks for Refusals {}

/// The producer's callbacks.
type Delivery = kafka::Context<Refusals>;

impl ProducerContext for Delivery {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result
            && self.hooks().0.fetch_add(1, Ordering::Relaxed) < SHOWN
        {
            tracing::error!(%error, "the broker refused a document");
        }
    }
}

/// Ingests every file; bad lines are passed over, counted, and make the exit code 65.
pub fn run(ingest: &Ingest) -> anyhow::Result<()> {
    let tokenizer = TextTokenizer::read(&ingest.tokenizer).map_err(ExitError::from)?;
    let fingerprint = tokenizer.fingerprint();
    let bounds = Bounds::named(&tokenizer, ingest.begin_with.as_deref(), ingest.end_with.as_deref());
    let bounds = bounds.exit_code(USAGE)?;
    if let Some(problem) = ingest.properties.keys().find_map(|key| owned_property(key)) {
        return Err(anyhow!(problem)).exit_code(USAGE);
    }
    for file in ingest.files.iter().filter(|file| file.as_os_str() != "-") {
        if !file.exists() || file.is_dir() {
            let what = if file.is_dir() { "is a folder; name its files" } else { "does not exist" };
            return Err(anyhow!("the file {} {what}", file.display())).exit_code(NO_INPUT);
        }
    }

    let producer: ThreadedProducer<Delivery> =
        kafka::producer_config(&ingest.bootstrap_servers, &ingest.properties, ingest.record_bytes_max)
            // A person waits for this: an outage that lasts is an error, and what was not taken is counted.
            .set("message.timeout.ms", OUTAGE_MS_MAX)
            .create_with_context(Delivery::default())
            .map_err(kafka::setting_error)
            .exit_code(USAGE)?;
    let metadata =
        kafka::reach(producer.client(), &ingest.bootstrap_servers, || {}).exit_code(UNAVAILABLE)?;
    if kafka::partitions(&metadata, &ingest.topic).is_none() {
        return Err(anyhow!(
            "the topic `{}` does not exist at {}; create it with `sluiced topics create`, or set --topic",
            ingest.topic,
            ingest.bootstrap_servers
        ))
        .exit_code(UNAVAILABLE);
    }

    let progress = progress_bar(&ingest.files);
    let mut run =
        Run { ingest, tokenizer, bounds, fingerprint, producer, progress, counts: Counts::default() };
    let ended = ingest.files.iter().try_for_each(|file| run.file(file));
    let Run { producer, progress, counts, .. } = run;
    // However it ended, what was handed over is seen through, and the figures are said.
    progress.set_message("waiting for the broker");
    wait_for_broker(&producer, &progress);
    progress.finish_and_clear();
    let failed = producer.context().hooks().0.load(Ordering::Relaxed);
    tracing::info!(
        documents = counts.documents - failed,
        tokens = counts.tokens,
        bad = counts.bad,
        failed,
        tokenizer = fingerprint.short(),
        topic = ingest.topic,
        "ingested"
    );
    ended?;
    if failed > 0 {
        return Err(anyhow!(
            "the broker at {} did not take {failed} documents; run the same command again, ids stay the same",
            ingest.bootstrap_servers
        ))
        .exit_code(UNAVAILABLE);
    }
    if counts.bad > 0 {
        return Err(anyhow!(
            "{} lines or files hold no document that could be published; all others were ingested",
            counts.bad
        ))
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

/// One call of `sluiced ingest` on its way through the files.
struct Run<'a> {
    ingest: &'a Ingest,
    tokenizer: TextTokenizer,
    bounds: Bounds,
    fingerprint: Fingerprint,
    producer: ThreadedProducer<Delivery>,
    progress: ProgressBar,
    counts: Counts,
}

impl Run<'_> {
    fn file(&mut self, file: &Path) -> anyhow::Result<()> {
        let reader = TextReader {
            format: self.ingest.format,
            fields: self.ingest.fields.clone(),
            text_bytes_max: TEXT_BYTES_PER_RECORD_BYTE * self.ingest.record_bytes_max as usize,
        };
        let documents = reader
            .open(file, |raw| Box::new(self.progress.wrap_read(raw)))
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
                Err(error) => self.bad(|| tracing::warn!("{error:#}")),
            }
            if chunk.len() >= CHUNK_DOCUMENTS || bytes >= CHUNK_BYTES {
                self.chunk(std::mem::take(&mut chunk))?;
                bytes = 0;
                let Counts { documents, tokens, .. } = self.counts;
                self.progress.set_message(format!("{documents} documents, {tokens} tokens"));
            }
        }
        self.chunk(chunk)
    }

    /// Counts a line, a file or a document that cannot be published, and shows the first few.
    fn bad(&mut self, show: impl FnOnce()) {
        self.counts.bad += 1;
        if self.counts.bad <= SHOWN {
            self.progress.suspend(show);
        }
    }

    fn chunk(&mut self, chunk: Vec<Text>) -> anyhow::Result<()> {
        let texts: Vec<&str> = chunk.iter().map(|text| text.text.as_str()).collect();
        let most = self.ingest.record_bytes_max;
        // Without special tokens but those that were asked for, which are tokens of the document like any others: scored,
        // learnt and counted. What else stands before a document is the scorer's policy, not the record's.
        let encoded = self.tokenizer.encode_all(&texts, (most / TOKEN_BYTES_MIN) as usize);
        for (text, tokens) in chunk.into_iter().zip(encoded) {
            let id = text.id;
            let tokens = match tokens {
                Ok(tokens) => tokens,
                Err(EncodeError::TooMany { .. }) => {
                    self.bad(|| tracing::warn!(id, "the document is larger than --record-bytes-max {most}"));
                    continue;
                }
                Err(error) => {
                    self.bad(|| tracing::warn!(id, "{error}"));
                    continue;
                }
            };
            let document = TokenizedDocument {
                id,
                tokens: TokenIds::new(&self.bounds.around(tokens)),
                tokenizer: self.fingerprint,
                source: text.source.unwrap_or_else(|| self.ingest.source.clone()),
                attributes: BTreeMap::new(),
            };
            let tokens = document.tokens.len() as u64;
            if send(&self.producer, &self.ingest.topic, &document, &self.progress)? {
                self.counts.documents += 1;
                self.counts.tokens += tokens;
            } else {
                self.bad(|| {
                    tracing::warn!(
                        id = document.id,
                        tokens,
                        "the document is larger than --record-bytes-max {most}"
                    );
                });
            }
        }
        Ok(())
    }
}

/// Hands a document to the client, waiting while its queue is full; false where the document is too large.
fn send(
    producer: &ThreadedProducer<Delivery>,
    topic: &str,
    document: &TokenizedDocument,
    progress: &ProgressBar,
) -> anyhow::Result<bool> {
    let payload = document.encode();
    let headers = OwnedHeaders::new()
        .insert(Header { key: names::RECORD_HEADER, value: Some(names::TOKENIZED_DOCUMENT) });
    let mut record =
        BaseRecord::to(topic).key(document.id.as_str()).payload(payload.as_ref()).headers(headers);
    let mut waiting = Waiting::default();
    loop {
        match producer.send(record) {
            Ok(()) => return Ok(true),
            Err((error, returned)) => match error.rdkafka_error_code() {
                Some(RDKafkaErrorCode::MessageSizeTooLarge) => return Ok(false),
                Some(RDKafkaErrorCode::QueueFull) => {
                    record = returned;
                    waiting.turn(progress);
                    std::thread::sleep(Duration::from_millis(10));
                }
                _ => {
                    return Err(anyhow!(error))
                        .with_context(|| format!("cannot publish document `{}`", document.id));
                }
            },
        }
    }
}

/// Waits until the broker has taken, or failed to take, every document handed over.
fn wait_for_broker(producer: &ThreadedProducer<Delivery>, progress: &ProgressBar) {
    let mut waiting = Waiting::default();
    // Ends by itself: every document times out.
    while producer.flush(Duration::from_millis(500)).is_err() && producer.in_flight_count() > 0 {
        waiting.turn(progress);
    }
}

/// Says that nothing moves, now and then.
struct Waiting(Instant);

impl Default for Waiting {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Waiting {
    fn turn(&mut self, progress: &ProgressBar) {
        if self.0.elapsed() > SILENCE_MAX {
            progress.suspend(|| tracing::warn!("waiting for the broker to take documents"));
            self.0 = Instant::now();
        }
    }
}
