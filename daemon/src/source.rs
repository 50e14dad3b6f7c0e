//! Kafka in: reads records, refuses the bad ones, and pauses where the budget is used up. Models are unknown here.

use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use crossbeam_channel::Sender;
use rdkafka::client::{ClientContext, OAuthToken};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use sluice_schemas::record::{RecordError, TokenizedDocument};

use crate::config::Config;
use crate::exit::{ExitCode as _, UNAVAILABLE, USAGE};
use crate::health::{Health, Loop};
use crate::kafka::{self, Complaints};
use crate::ledger::{Ledger, Ticket};
use crate::metrics::Metrics;
use crate::notice::Notices;
use crate::score::ModelIdentity;
use crate::sink::{DeadLetter, Outcome};

const POLL: Duration = Duration::from_millis(100);
/// How long a paused consumer waits before it looks at the budget again.
const POLL_PAUSED: Duration = Duration::from_millis(2);

/// How long the budget must stay used up before reading is paused.
const PAUSE_AFTER: Duration = Duration::from_secs(1);
/// How long after its last word a broker is asked for a sign of life: one that was down, and one that is quiet.
const PROBE_DOWN: Duration = Duration::from_secs(2);
const PROBE_QUIET: Duration = Duration::from_secs(10);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one try may take to learn where to begin reading.
const PLACE_TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes that take as much of the budget as a token, which may have four of them in the record.
const BYTES_PER_TOKEN: usize = 4;
/// Least that a record takes of the budget: the books on it are not free.
const TOKENS_PER_RECORD: usize = 64;

/// A document to be scored, with its place in the ledger.
#[derive(Debug)]
pub struct Job {
    /// Its place in the ledger.
    pub ticket: Ticket,
    /// The record's key.
    pub key: Option<Bytes>,
    /// The payload, of which the document holds parts.
    pub payload: Bytes,
    /// The document.
    pub document: TokenizedDocument,
}

/// The consumer, shared with the sink, which commits through it.
pub type DocumentsConsumer = BaseConsumer<Context>;

/// Takes the consumer's callbacks: partitions that come and go, errors, log lines.
pub struct Context {
    topic: String,
    ledger: Arc<Ledger<Outcome>>,
    metrics: Metrics,
    health: Health,
    drain: Duration,
    complaints: Complaints,
    /// Partitions that are assigned and not read yet, because their committed offset is not settled.
    unplaced: Mutex<BTreeSet<i32>>,
}

impl ClientContext for Context {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, config: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        Ok(sluice_kafka::oauth_token(config)?)
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        kafka::log_client(level, facility, message);
    }

    fn stats(&self, statistics: Statistics) {
        let partitions = statistics.topics.values().flat_map(|topic| topic.partitions.values());
        let lag: u64 = partitions
            .filter_map(|p| self.ledger.lag(p.partition, p.committed_offset, p.ls_offset.max(0)))
            .sum();
        self.metrics.consumer_lag.set(lag as i64);
        let queued = self.ledger.queued();
        self.metrics.set_queued(queued.unscored, queued.unpublished);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.metrics.kafka_errors.inc();
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            broker_is_down(&self.health, reason);
        } else {
            self.complaints.hear(&error, reason);
        }
    }
}

impl ConsumerContext for Context {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, kind: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let changed = match kind {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => self.assigned(consumer, list),
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS => self.revoked(consumer, list),
            other => {
                let error = KafkaError::Rebalance(other.into());
                tracing::warn!(%error, "rebalance failed; the client tries again");
                consumer.incremental_unassign(list)
            }
        };
        if let Err(error) = changed {
            tracing::warn!(%error, "the client did not take the change of its partitions");
        }
        self.metrics.rebalances.inc();
        self.show_assignment();
    }
}

impl Context {
    /// Takes partitions over, each at the group's committed offset, or at its beginning where there is none.
    ///
    /// Not left to the client, which begins a partition anew when a rebalance comes while its offset is held up by an
    /// open transaction (librdkafka 2.12, `rd_kafka_assignment_apply_offsets`): thousands of documents came twice. Here
    /// such a partition is not read until [`Self::place`] knows where.
    fn assigned(&self, consumer: &BaseConsumer<Self>, list: &mut TopicPartitionList) -> KafkaResult<()> {
        let partitions = numbers(list);
        tracing::info!(?partitions, "partitions assigned");
        let known = committed_offsets(consumer, list).unwrap_or_else(|error| {
            tracing::debug!(%error, "committed offsets are not to be had yet");
            HashMap::new()
        });
        let mut unplaced = TopicPartitionList::new();
        for partition in &partitions {
            let topic = &self.topic;
            // Any offset for one that is not known, but none that the client would have to ask for: the answer could come
            // after the true one.
            let begin = known.get(partition).copied().unwrap_or(Offset::Offset(0));
            list.set_partition_offset(topic, *partition, begin)?;
            if !known.contains_key(partition) {
                unplaced.add_partition(topic, *partition);
            }
        }
        consumer.incremental_assign(list)?;
        if unplaced.count() > 0 {
            consumer.pause(&unplaced)?;
            self.unplaced().extend(numbers(&unplaced));
        }
        self.ledger.assign(known.into_keys());
        Ok(())
    }

    fn revoked(&self, consumer: &BaseConsumer<Self>, list: &TopicPartitionList) -> KafkaResult<()> {
        let partitions = numbers(list);
        self.unplaced().retain(|partition| !partitions.contains(partition));
        // What is being scored can still be committed, unless the group has already given it to another, or nobody is
        // left to commit it.
        self.ledger.forget_unbegun(&partitions);
        let drained = !consumer.assignment_lost()
            && !self.health.is_aborted()
            && self.ledger.wait_drained(&partitions, self.drain);
        tracing::info!(?partitions, drained, "partitions revoked");
        self.ledger.revoke(partitions);
        consumer.incremental_unassign(list)
    }

    /// Goes on with partitions whose committed offset was not to be had when they were assigned, as far as it is now.
    fn place(&self, consumer: &BaseConsumer<Self>) -> KafkaResult<()> {
        let topic = &self.topic;
        let mut list = TopicPartitionList::new();
        for &partition in self.unplaced().iter() {
            list.add_partition(topic, partition);
        }
        for (partition, offset) in committed_offsets(consumer, &list)? {
            consumer.seek(topic, partition, offset, PLACE_TIMEOUT)?;
            let mut one = TopicPartitionList::new();
            one.add_partition(topic, partition);
            consumer.resume(&one)?;
            self.unplaced().remove(&partition);
            self.ledger.assign([partition]);
            tracing::info!(partition, ?offset, "reading begins, now that its offset is settled");
        }
        self.show_assignment();
        Ok(())
    }

    fn unplaced(&self) -> MutexGuard<'_, BTreeSet<i32>> {
        self.unplaced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show_assignment(&self) {
        self.health.set_assigned(self.ledger.is_assigned());
        self.metrics.assigned_partitions.set(self.ledger.assigned_partitions() as i64);
    }
}

/// Where to begin reading each of `partitions`, less those whose offset an open transaction holds up.
fn committed_offsets(
    consumer: &DocumentsConsumer,
    partitions: &TopicPartitionList,
) -> KafkaResult<HashMap<i32, Offset>> {
    if partitions.count() == 0 {
        return Ok(HashMap::new());
    }
    let mut query = TopicPartitionList::new();
    for element in partitions.elements() {
        query.add_partition(element.topic(), element.partition());
    }
    let committed = consumer.committed_offsets(query, PLACE_TIMEOUT)?;
    let settled = committed.elements().into_iter().filter(|element| element.error().is_ok());
    Ok(settled
        .map(|element| match element.offset() {
            Offset::Offset(offset) => (element.partition(), Offset::Offset(offset)),
            _ => (element.partition(), Offset::Beginning),
        })
        .collect())
}

fn numbers(list: &TopicPartitionList) -> Vec<i32> {
    list.elements().iter().map(rdkafka::topic_partition_list::TopicPartitionListElem::partition).collect()
}

/// Connects to the brokers and joins the group.
pub fn subscribe(
    config: &Config,
    ledger: Arc<Ledger<Outcome>>,
    metrics: Metrics,
    health: Health,
) -> anyhow::Result<DocumentsConsumer> {
    let settings = &config.kafka;
    let context = Context {
        topic: settings.documents_topic.clone(),
        ledger,
        metrics,
        health,
        drain: config.limits.drain(),
        complaints: Complaints::default(),
        unplaced: Mutex::default(),
    };
    let consumer: DocumentsConsumer =
        kafka::consumer_config(settings).create_with_context(context).map_err(kafka::setting_error)?;
    let serve = || drop(consumer.poll(Duration::ZERO));
    let metadata =
        kafka::reach(consumer.client(), &settings.bootstrap_servers, serve).exit_code(UNAVAILABLE)?;
    kafka::check_delivery(consumer.client(), settings.delivery).exit_code(USAGE)?;
    if kafka::partitions(&metadata, &settings.documents_topic).is_none() {
        return Err(anyhow!(
            "the topic `{}` does not exist at {}; create it with `sluiced topics create`, or set \
             kafka.documents_topic",
            settings.documents_topic,
            settings.bootstrap_servers
        ))
        .exit_code(UNAVAILABLE);
    }
    consumer.subscribe(&[&settings.documents_topic]).context("cannot subscribe")?;
    Ok(consumer)
}

/// Reads until asked to stop, then waits until everything read is published.
pub fn run(
    consumer: &DocumentsConsumer,
    jobs: &Sender<Job>,
    ledger: &Ledger<Outcome>,
    model: ModelIdentity,
    config: &Config,
    metrics: &Metrics,
    health: &Health,
) -> anyhow::Result<()> {
    let budget = config.limits.in_flight_tokens;
    let notices = Notices::default();
    let mut paused = false;
    let mut stopping: Option<Instant> = None;
    let mut last_answer = Instant::now();
    loop {
        health.beat(Loop::Source);
        let in_flight = ledger.tokens();
        metrics.in_flight_tokens.set(in_flight as i64);
        metrics.oldest_in_flight_seconds.set(ledger.oldest_age().as_secs() as i64);
        if health.is_aborted() {
            return Ok(());
        }
        if health.is_stopping() {
            let since = *stopping.get_or_insert_with(|| {
                ledger.forget_unbegun(&ledger.partitions());
                Instant::now()
            });
            if ledger.is_drained() {
                return Ok(());
            }
            if since.elapsed() > config.limits.drain() {
                bail!(
                    "{in_flight} tokens were still in flight when the drain deadline passed; they will be read again"
                );
            }
        }
        // A pause throws away what the client has fetched, so it is for when the budget stays used up.
        if !paused && in_flight >= budget && !health.is_stopping() && ledger.wait_below(budget, PAUSE_AFTER) {
            continue;
        }
        let pause = health.is_stopping() || in_flight >= budget || (paused && in_flight > budget / 2);
        if pause != paused {
            set_paused(consumer, pause);
            metrics.paused.set(i64::from(pause));
            paused = pause;
        }
        let probe_after = if health.is_broker_down() { PROBE_DOWN } else { PROBE_QUIET };
        if last_answer.elapsed() > probe_after {
            last_answer = Instant::now();
            match consumer.client().fetch_metadata(Some(&config.kafka.documents_topic), PROBE_TIMEOUT) {
                Ok(_) => broker_is_up(health),
                Err(error) => broker_is_down(health, &error.to_string()),
            }
        }
        if let Err(error) = consumer.context().place(consumer) {
            tracing::debug!(%error, "offsets are not settled yet");
        }
        match consumer.poll(if paused { POLL_PAUSED } else { POLL }) {
            None => {}
            Some(Err(error)) => consumer_error(&error, health, metrics, &notices)?,
            // A record that was fetched before the drain began is left for the next reader.
            Some(Ok(_)) if stopping.is_some() => {}
            Some(Ok(message)) => {
                broker_is_up(health);
                last_answer = Instant::now();
                accept(&message, jobs, ledger, model, metrics);
                if paused {
                    // A rebalance has brought partitions that are not paused yet.
                    set_paused(consumer, true);
                }
            }
        }
    }
}

fn broker_is_down(health: &Health, reason: &str) {
    if health.set_broker_down(true) {
        tracing::warn!(reason, "no broker answers; waiting for one");
    }
}

fn broker_is_up(health: &Health) {
    if health.set_broker_down(false) {
        tracing::info!("a broker answers again");
    }
}

fn set_paused(consumer: &DocumentsConsumer, pause: bool) {
    let changed = consumer.assignment().and_then(|assignment| {
        if pause { consumer.pause(&assignment) } else { consumer.resume(&assignment) }
    });
    if let Err(error) = changed {
        tracing::warn!(%error, pause, "cannot pause or resume; trying again with the next record");
    }
}

/// Errors that the client recovers from are counted; the others end the daemon.
fn consumer_error(
    error: &KafkaError,
    health: &Health,
    metrics: &Metrics,
    notices: &Notices,
) -> anyhow::Result<()> {
    metrics.kafka_errors.inc();
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::AutoOffsetReset) => bail!(
            "the documents topic has no record any more where this group would read on: retention has removed it, or the \
             topic was made anew; set the group's offsets with Kafka's kafka-consumer-groups.sh --reset-offsets ({error})"
        ),
        Some(RDKafkaErrorCode::Fatal) => bail!("the consumer failed for good: {error}"),
        Some(RDKafkaErrorCode::AllBrokersDown) => {
            broker_is_down(health, "all brokers are down");
        }
        // Said once, and it comes again with every try.
        Some(RDKafkaErrorCode::BrokerTransportFailure) if health.is_broker_down() => {}
        _ => {
            if let Some(others) = notices.due("consumer error") {
                tracing::warn!(
                    %error,
                    others_since_last_warning = others,
                    "kafka consumer error; the client tries again"
                );
            }
        }
    }
    Ok(())
}

fn accept(
    message: &BorrowedMessage<'_>,
    jobs: &Sender<Job>,
    ledger: &Ledger<Outcome>,
    model: ModelIdentity,
    metrics: &Metrics,
) {
    let payload = Bytes::copy_from_slice(message.payload().unwrap_or_default());
    let key = message.key().map(Bytes::copy_from_slice);
    let checked = check(payload.clone(), model);
    let tokens = checked.as_ref().map_or(0, |document| document.tokens.len());
    let bytes = payload.len() + key.as_ref().map_or(0, Bytes::len);
    let room = tokens.max(bytes / BYTES_PER_TOKEN).max(TOKENS_PER_RECORD);
    let Some(ticket) = ledger.open(message.partition(), message.offset(), room) else {
        return;
    };
    metrics.documents_read.inc();
    match checked {
        Ok(document) => {
            metrics.tokens_read.inc_by(tokens as u64);
            // The receiver is gone only while the daemon stops; the record is then read again.
            let _ = jobs.send(Job { ticket, key, payload, document });
        }
        Err(error) => {
            let letter = DeadLetter::new(key, payload, error.code(), &error.to_string());
            ledger.complete(ticket, Outcome::DeadLetter(letter));
        }
    }
}

fn check(payload: Bytes, model: ModelIdentity) -> Result<TokenizedDocument, RecordError> {
    let document = TokenizedDocument::decode(payload)?;
    document.check_tokenizer(model.tokenizer)?;
    document.tokens.check_vocabulary(model.vocabulary)?;
    Ok(document)
}
