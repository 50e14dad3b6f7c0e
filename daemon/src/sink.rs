//! Kafka out: publishes outcomes in the order of the ledger, then commits the offsets they came from.
//!
//! Delivery is at least once: a record is committed only after the broker has confirmed what came of it, and one
//! whose commit was lost is published again.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use sluice_schemas::names;

use crate::config::Config;
use crate::health::{Health, Loop};
use crate::kafka;
use crate::ledger::{Group, Ledger, Ticket};
use crate::metrics::{Metrics, RECORD_TOO_LARGE};
use crate::source::{DocumentsConsumer, log_client};

const IDLE: Duration = Duration::from_millis(100);
const QUEUE_FULL_WAIT: Duration = Duration::from_millis(10);

/// What became of a record.
#[derive(Debug)]
pub enum Outcome {
    /// It was scored.
    Scored(Scored),
    /// It could not be.
    DeadLetter(DeadLetter),
}

/// A record for the scored topic.
#[derive(Debug)]
pub struct Scored {
    /// The key of the record that was read; the document's id where it had none.
    pub key: Bytes,
    /// The encoded [`sluice_schemas::record::ScoredDocument`].
    pub payload: Bytes,
    /// The payload as it was read, for the case that the broker refuses this record.
    pub origin: Bytes,
    /// Number of tokens.
    pub tokens: usize,
}

/// A record for the dead-letter topic.
#[derive(Debug)]
pub struct DeadLetter {
    /// The key of the record that was read.
    pub key: Option<Bytes>,
    /// The payload as it was read; nothing where it is too large to be carried along.
    pub payload: Option<Bytes>,
    /// A short name of the reason.
    pub reason: &'static str,
    /// The reason in words.
    pub detail: String,
}

/// Collects the records of the current group that the broker refused.
#[derive(Debug, Default)]
struct Refusals(Mutex<Vec<(usize, KafkaError)>>);

struct Context {
    refusals: Arc<Refusals>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_client(level, facility, message);
    }
}

impl ProducerContext for Context {
    /// Index of the record in its group.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        if let Err((error, _)) = result {
            self.refusals.0.lock().unwrap_or_else(PoisonError::into_inner).push((index, error.clone()));
        }
    }
}

/// The producer and the names it publishes under.
pub struct Sink {
    producer: ThreadedProducer<Context>,
    refusals: Arc<Refusals>,
    documents_topic: String,
    scored_topic: String,
    dead_letter_topic: String,
    record_bytes_max: usize,
}

impl Sink {
    /// A producer for `config`'s brokers.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let settings = &config.kafka;
        let refusals = Arc::new(Refusals::default());
        let producer = kafka::producer_config(
            &settings.bootstrap_servers,
            &settings.properties,
            settings.record_bytes_max,
        )
        .create_with_context(Context { refusals: Arc::clone(&refusals) })
        .context("kafka.properties")?;
        Ok(Self {
            producer,
            refusals,
            documents_topic: settings.documents_topic.clone(),
            scored_topic: settings.scored_topic.clone(),
            dead_letter_topic: settings.dead_letter_topic.clone(),
            record_bytes_max: settings.record_bytes_max as usize,
        })
    }

    /// Publishes and commits until asked to stop and nothing is in flight any more.
    pub fn run(
        &self,
        consumer: &DocumentsConsumer,
        ledger: &Ledger<Outcome>,
        publish_tokens: usize,
        metrics: &Metrics,
        health: &Health,
    ) -> anyhow::Result<()> {
        loop {
            health.beat(Loop::Sink);
            let mut group = ledger.take(publish_tokens, IDLE);
            if health.is_aborted() {
                return Ok(());
            }
            if group.outcomes.is_empty() {
                if health.is_stopping() && ledger.is_drained() {
                    return Ok(());
                }
                continue;
            }
            let timer = metrics.publish_seconds.start_timer();
            self.publish(&mut group, metrics, health)?;
            self.commit(consumer, ledger, &group, metrics);
            timer.observe_duration();
            ledger.release(&group);
        }
    }

    /// Publishes `group` and waits until the broker has confirmed every record of it.
    ///
    /// A record that is too large for the broker becomes a dead letter, and one that is too large even so loses its
    /// payload.
    fn publish(&self, group: &mut Group<Outcome>, metrics: &Metrics, health: &Health) -> anyhow::Result<()> {
        let mut unsent: Vec<usize> = (0..group.outcomes.len()).collect();
        while !unsent.is_empty() {
            let mut too_large = Vec::new();
            for &index in &unsent {
                let (ticket, outcome) = &group.outcomes[index];
                let sent = match outcome {
                    Outcome::Scored(scored) => self.send_scored(index, scored),
                    Outcome::DeadLetter(letter) => self.send_dead_letter(index, *ticket, letter),
                };
                self.note(sent, index, &mut too_large)?;
            }
            self.settle(&mut too_large, health)?;
            for &index in &too_large {
                let outcome = &mut group.outcomes[index].1;
                *outcome = Outcome::DeadLetter(self.shrink(outcome)?);
            }
            unsent = too_large;
        }
        for (_, outcome) in &group.outcomes {
            match outcome {
                Outcome::Scored(scored) => {
                    metrics.documents_scored.inc();
                    metrics.tokens_scored.inc_by(scored.tokens as u64);
                }
                Outcome::DeadLetter(letter) => metrics.dead_letters.with_label_values(&[letter.reason]).inc(),
            }
        }
        Ok(())
    }

    /// The dead letter to publish in place of a record that is too large.
    fn shrink(&self, outcome: &Outcome) -> anyhow::Result<DeadLetter> {
        match outcome {
            Outcome::Scored(scored) => Ok(DeadLetter {
                key: Some(scored.key.clone()),
                payload: Some(scored.origin.clone()),
                reason: RECORD_TOO_LARGE,
                detail: format!(
                    "with its losses the record has {} bytes, more than the broker or kafka.record_bytes_max ({}) \
                     allows",
                    scored.payload.len(),
                    self.record_bytes_max
                ),
            }),
            Outcome::DeadLetter(letter) if letter.payload.is_some() => Ok(DeadLetter {
                key: letter.key.clone(),
                payload: None,
                reason: letter.reason,
                detail: letter.detail.clone(),
            }),
            Outcome::DeadLetter(_) => Err(anyhow!(
                "the broker refuses even a dead letter without its payload as too large; raise max.message.bytes of \
                 the topic `{}`",
                self.dead_letter_topic
            )),
        }
    }

    /// Waits for the broker's word on every record sent; adds those that are too large to `too_large`.
    fn settle(&self, too_large: &mut Vec<usize>, health: &Health) -> anyhow::Result<()> {
        loop {
            health.beat(Loop::Sink);
            match self.producer.flush(Duration::from_secs(1)) {
                Ok(()) => break,
                Err(KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut)) if health.is_aborted() => {
                    return Err(anyhow!("gave up publishing; what was not committed will be read again"));
                }
                Err(KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut)) => {}
                Err(error) => return Err(error).context("cannot publish"),
            }
        }
        let refused = std::mem::take(&mut *self.refusals.0.lock().unwrap_or_else(PoisonError::into_inner));
        for (index, error) in refused {
            self.note(Err(error), index, too_large)?;
        }
        Ok(())
    }

    fn note(
        &self,
        sent: Result<(), KafkaError>,
        index: usize,
        too_large: &mut Vec<usize>,
    ) -> anyhow::Result<()> {
        match sent {
            Ok(()) => Ok(()),
            Err(error) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) => {
                too_large.push(index);
                Ok(())
            }
            Err(error) => Err(error).with_context(|| {
                format!("cannot publish to `{}` or `{}`", self.scored_topic, self.dead_letter_topic)
            }),
        }
    }

    fn send_scored(&self, index: usize, scored: &Scored) -> Result<(), KafkaError> {
        let headers = OwnedHeaders::new()
            .insert(Header { key: names::RECORD_HEADER, value: Some(names::SCORED_DOCUMENT) });
        self.send(
            BaseRecord::with_opaque_to(&self.scored_topic, index)
                .key(scored.key.as_ref())
                .payload(scored.payload.as_ref())
                .headers(headers),
        )
    }

    fn send_dead_letter(&self, index: usize, ticket: Ticket, letter: &DeadLetter) -> Result<(), KafkaError> {
        let mut headers = OwnedHeaders::new();
        for (key, value) in [
            (names::ERROR_HEADER, letter.reason),
            (names::ERROR_DETAIL_HEADER, &letter.detail),
            (names::ORIGIN_TOPIC_HEADER, &self.documents_topic),
            (names::ORIGIN_PARTITION_HEADER, &ticket.partition.to_string()),
            (names::ORIGIN_OFFSET_HEADER, &ticket.offset.to_string()),
        ] {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        if letter.payload.is_none() {
            headers = headers.insert(Header { key: names::PAYLOAD_OMITTED_HEADER, value: Some("true") });
        }
        let mut record = BaseRecord::with_opaque_to(&self.dead_letter_topic, index).headers(headers);
        if let Some(payload) = &letter.payload {
            record = record.payload(payload.as_ref());
        }
        if let Some(key) = &letter.key {
            record = record.key(key.as_ref());
        }
        self.send(record)
    }

    /// Hands a record to the client, waiting while its queue is full.
    fn send(&self, mut record: BaseRecord<'_, [u8], [u8], usize>) -> Result<(), KafkaError> {
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((error, returned)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                    record = returned;
                    std::thread::sleep(QUEUE_FULL_WAIT);
                }
                Err((error, _)) => return Err(error),
            }
        }
    }

    /// Commits what `group` covers. A failure costs a repetition at worst, and the next commit covers it.
    fn commit(
        &self,
        consumer: &DocumentsConsumer,
        ledger: &Ledger<Outcome>,
        group: &Group<Outcome>,
        metrics: &Metrics,
    ) {
        let mut offsets = TopicPartitionList::new();
        for (partition, offset) in ledger.commit_points(group) {
            // The list is fresh and the offset is one past a real one, so this cannot fail.
            let _ = offsets.add_partition_offset(&self.documents_topic, partition, Offset::Offset(offset));
        }
        if offsets.count() == 0 {
            return;
        }
        match consumer.commit(&offsets, CommitMode::Sync) {
            Ok(()) => metrics.commits.inc(),
            Err(error) => {
                metrics.commit_failures.inc();
                tracing::warn!(%error, "cannot commit offsets; the next commit covers them");
            }
        }
    }
}
