//! `sluiced dead-letters replay`: records that could not be scored, back to the documents topic once their reason is gone.
//!
//! Each reason has a consumer group of its own, whose offsets are committed in the transaction that brings records back:
//! none comes back twice, whatever is killed, and those of another reason stay for another time.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, DeliveryResult, Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::metadata::MetadataTopic;
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;
use sluice_kafka::TopicIds;
use sluice_schemas::names;
use sluice_text::output::print_line;

use crate::exit::{ExitCode as _, UNAVAILABLE, USAGE};
use crate::kafka::{self, Hooks};

/// Longest wait for an answer of the brokers.
const CALL: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(100);
/// How long the topic's id is waited for; old brokers tell none.
const ID_WAIT: Duration = Duration::from_millis(500);
const QUEUE_FULL_WAIT: Duration = Duration::from_millis(10);
/// Records that are brought back in one transaction, and their bytes.
const RECORDS_MAX: usize = 10_000;
const BYTES_MAX: usize = 64 << 20;

/// What `sluiced dead-letters replay` was asked to do.
#[derive(Clone, Debug)]
pub struct Replay {
    /// Brokers, as HOST:PORT, separated by commas.
    pub bootstrap_servers: String,
    /// Topic of dead letters.
    pub dead_letter_topic: String,
    /// Topic that they come back to, where they came from it.
    pub documents_topic: String,
    /// The reason of those that are meant.
    pub reason: String,
    /// Only say how many there are.
    pub dry_run: bool,
    /// Other settings of librdkafka.
    pub properties: BTreeMap<String, String>,
    /// Most bytes of one record.
    pub record_bytes_max: u32,
}

impl Hooks for TopicIds {
    fn log(&self, facility: &str, message: &str) {
        self.hear(facility, message);
    }
}

impl ConsumerContext for kafka::Context<TopicIds> {}

type Letters = BaseConsumer<kafka::Context<TopicIds>>;

/// Of a producer whose transaction tells whether all was delivered.
#[derive(Debug, Default)]
struct Untold;

impl Hooks for Untold {}

impl ProducerContext for kafka::Context<Untold> {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

type Client = ThreadedProducer<kafka::Context<Untold>>;

/// A record to bring back.
struct Record {
    key: Option<Bytes>,
    payload: Bytes,
}

/// What was found.
#[derive(Debug, Default)]
struct Counts {
    brought_back: u64,
    /// Letters without the record that they are about: it was too large to be carried along, or a tombstone.
    empty: u64,
    /// Letters of other reasons.
    others: BTreeMap<String, u64>,
}

/// Brings back what it is asked for and is there now; says how much on standard output.
pub fn replay(asked: &Replay) -> anyhow::Result<()> {
    let consumer = connect(asked)?;
    let id = topic_id(&consumer, &asked.dead_letter_topic)?;
    // With the topic's id, for one that was deleted and made anew begins at its beginning.
    let group = format!("sluiced-replay-{}-{}-{id}", asked.dead_letter_topic, asked.reason);
    drop(consumer);
    // Before the offsets are asked for: whatever an earlier run left open is aborted.
    let mut producer = if asked.dry_run { None } else { Some(producer(asked, &group)?) };
    let consumer = reader(asked, &group)?;
    // What is there now: letters that come meanwhile may be of what has just come back.
    let mut unread = assign(&consumer, &asked.dead_letter_topic)?;
    let mut counts = Counts::default();
    let (mut records, mut bytes) = (Vec::new(), 0);
    let mut reached = BTreeMap::new();
    let mut heard = Instant::now();
    while !unread.is_empty() {
        match consumer.poll(POLL) {
            None if heard.elapsed() > CALL => {
                return Err(anyhow!("the brokers tell no end of the topic `{}`", asked.dead_letter_topic))
                    .exit_code(UNAVAILABLE);
            }
            None => continue,
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                unread.remove(&partition);
            }
            Some(Err(error)) => {
                let is_lost = error.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset);
                if is_lost || heard.elapsed() > CALL {
                    return Err(error).context("cannot read dead letters").exit_code(UNAVAILABLE);
                }
                // The client connects again by itself.
                tracing::debug!(%error, "kafka consumer error");
                continue;
            }
            Some(Ok(letter)) if unread.get(&letter.partition()).is_none_or(|end| letter.offset() >= *end) => {
                unread.remove(&letter.partition());
            }
            Some(Ok(letter)) => {
                reached.insert(letter.partition(), letter.offset() + 1);
                if let Some(record) = sort(&letter, asked, &mut counts) {
                    bytes += record.payload.len();
                    records.push(record);
                }
            }
        }
        heard = Instant::now();
        let is_full = records.len() >= RECORDS_MAX || bytes >= BYTES_MAX;
        if asked.dry_run {
            counts.brought_back += records.drain(..).count() as u64;
        } else if (is_full || unread.is_empty()) && !records.is_empty() {
            // A new one for each transaction: what of the last one may still be under way is refused (ADR 25).
            let client = match producer.take() {
                Some(client) => client,
                None => self::producer(asked, &group)?,
            };
            publish(&client, &consumer, asked, &records, &reached)
                .context("none of the last records came back, or all; run this again")?;
            counts.brought_back += records.drain(..).count() as u64;
        }
        if is_full {
            bytes = 0;
        }
    }
    let verb = if asked.dry_run { "would come back" } else { "came back" };
    let mut lines = vec![format!(
        "{} dead letters of reason {} {verb} to {}",
        counts.brought_back, asked.reason, asked.documents_topic
    )];
    if counts.empty > 0 {
        lines.push(format!(
            "{} have no record in them; read it where their headers say that it came from",
            counts.empty
        ));
    }
    lines.extend(counts.others.iter().map(|(reason, number)| format!("{number} of reason {reason} stay")));
    // Whoever has closed the pipe has seen enough.
    print_line(&lines.join("\n"))?;
    Ok(())
}

fn settings(asked: &Replay, group: &str) -> rdkafka::ClientConfig {
    let mut settings = kafka::client_config(&asked.bootstrap_servers, &asked.properties);
    settings
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "error")
        .set("isolation.level", "read_committed");
    sluice_kafka::listen(&mut settings, sluice_kafka::DEBUG_METADATA);
    settings
}

fn reader(asked: &Replay, group: &str) -> anyhow::Result<Letters> {
    settings(asked, group)
        .create_with_context(kafka::Context::new(TopicIds::default()))
        .map_err(kafka::setting_error)
        .exit_code(USAGE)
}

/// A client of brokers that have what is needed.
fn connect(asked: &Replay) -> anyhow::Result<Letters> {
    let consumer = reader(asked, "sluiced-replay")?;
    let serve = || drop(consumer.poll(Duration::ZERO));
    let metadata = kafka::reach(consumer.client(), &asked.bootstrap_servers, serve).exit_code(UNAVAILABLE)?;
    for topic in [&asked.dead_letter_topic, &asked.documents_topic] {
        if kafka::partitions(&metadata, topic).is_none() {
            return Err(anyhow!("the topic `{topic}` does not exist at {}", asked.bootstrap_servers))
                .exit_code(UNAVAILABLE);
        }
    }
    if kafka::is_mock(consumer.client()) {
        return Err(anyhow!("this is librdkafka's mock cluster, which keeps no transactions"))
            .exit_code(USAGE);
    }
    Ok(consumer)
}

/// The id of `topic`, empty where the brokers tell none.
fn topic_id(consumer: &Letters, topic: &str) -> anyhow::Result<String> {
    consumer.fetch_metadata(Some(topic), CALL).exit_code(UNAVAILABLE)?;
    let asked = Instant::now();
    let ids = consumer.context().hooks();
    while ids.id(topic).is_none() && asked.elapsed() < ID_WAIT {
        drop(consumer.poll(Duration::from_millis(1)));
    }
    Ok(ids.id(topic).unwrap_or_default())
}

fn producer(asked: &Replay, group: &str) -> anyhow::Result<Client> {
    let mut settings =
        kafka::producer_config(&asked.bootstrap_servers, &asked.properties, asked.record_bytes_max);
    settings.set("transactional.id", group).set("message.timeout.ms", CALL.as_millis().to_string());
    let client: Client = settings
        .create_with_context(kafka::Context::default())
        .map_err(kafka::setting_error)
        .exit_code(USAGE)?;
    client.init_transactions(CALL).context("cannot begin with transactions").exit_code(UNAVAILABLE)?;
    Ok(client)
}

/// Reads every partition from where this group has come to; where each ends now.
fn assign(consumer: &Letters, topic: &str) -> anyhow::Result<HashMap<i32, i64>> {
    let metadata = consumer.fetch_metadata(Some(topic), CALL).exit_code(UNAVAILABLE)?;
    let mut asked = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(MetadataTopic::partitions) {
        asked.add_partition(topic, partition.id());
    }
    let committed = consumer.committed_offsets(asked, CALL).context("cannot tell what came back before");
    let (mut begins, mut ends) = (TopicPartitionList::new(), HashMap::new());
    for element in committed.exit_code(UNAVAILABLE)?.elements() {
        let (low, high) =
            consumer.fetch_watermarks(topic, element.partition(), CALL).exit_code(UNAVAILABLE)?;
        let begin = match element.offset() {
            Offset::Offset(offset) => offset.max(low),
            _ => low,
        };
        begins.add_partition_offset(topic, element.partition(), Offset::Offset(begin))?;
        ends.insert(element.partition(), high);
    }
    consumer.assign(&begins)?;
    Ok(ends)
}

/// The record in `letter`, if it is one of those that are meant.
fn sort(letter: &BorrowedMessage<'_>, asked: &Replay, counts: &mut Counts) -> Option<Record> {
    let header = |name: &str| {
        let headers = letter.headers()?;
        let value = headers.iter().find(|header| header.key == name)?.value?;
        Some(String::from_utf8_lossy(value).into_owned())
    };
    let reason = header(names::ERROR_HEADER).unwrap_or_else(|| "none".to_owned());
    if reason != asked.reason || header(names::ORIGIN_TOPIC_HEADER).as_ref() != Some(&asked.documents_topic) {
        *counts.others.entry(reason).or_default() += 1;
        return None;
    }
    let payload = letter.payload().filter(|_| header(names::OMITTED_HEADER).is_none());
    let Some(payload) = payload else {
        counts.empty += 1;
        return None;
    };
    let payload = Bytes::copy_from_slice(payload);
    Some(Record { key: letter.key().map(Bytes::copy_from_slice), payload })
}

/// Publishes `records` and commits how far the letters were read, in one transaction.
fn publish(
    client: &Client,
    consumer: &Letters,
    asked: &Replay,
    records: &[Record],
    reached: &BTreeMap<i32, i64>,
) -> anyhow::Result<()> {
    client.begin_transaction()?;
    for record in records {
        let kind = Header { key: names::RECORD_HEADER, value: Some(names::TOKENIZED_DOCUMENT) };
        let mut message = BaseRecord::<[u8], [u8]>::to(&asked.documents_topic)
            .payload(&record.payload)
            .headers(OwnedHeaders::new().insert(kind));
        message.key = record.key.as_deref();
        while let Err((error, returned)) = client.send(message) {
            if error.rdkafka_error_code() != Some(RDKafkaErrorCode::QueueFull) {
                return Err(error.into());
            }
            message = returned;
            std::thread::sleep(QUEUE_FULL_WAIT);
        }
    }
    let mut offsets = TopicPartitionList::new();
    for (&partition, &offset) in reached {
        offsets.add_partition_offset(&asked.dead_letter_topic, partition, Offset::Offset(offset))?;
    }
    let Some(membership) = consumer.group_metadata() else { bail!("the consumer has no group") };
    client.send_offsets_to_transaction(&offsets, &membership, CALL)?;
    client.commit_transaction(CALL)?;
    Ok(())
}
