//! Kafka in: reads records, refuses the bad ones, and pauses where the budget is used up. Models are unknown here.

mod assignment;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use crossbeam_channel::Sender;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _};
use sluice_schemas::record::{RecordError, TokenizedDocument};

use crate::config::Config;
use crate::exit::{DATA, ExitCode as _, UNAVAILABLE, USAGE};
use crate::health::{Health, Loop};
use crate::job::Job;
use crate::kafka;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::notice::Notices;
use crate::outcome::{DeadLetter, Outcome};
use crate::score::ModelIdentity;
use assignment::Context;

const POLL: Duration = Duration::from_millis(100);
/// How long a paused consumer waits before it looks at the budget again.
const POLL_PAUSED: Duration = Duration::from_millis(2);

/// How long the budget must stay used up before reading is paused.
const PAUSE_AFTER: Duration = Duration::from_secs(1);
/// How long after its last word a broker is asked for a sign of life: one that was down, and one that is quiet.
const PROBE_DOWN: Duration = Duration::from_secs(2);
const PROBE_QUIET: Duration = Duration::from_secs(10);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes that take as much of the budget as a token, which may have four of them in the record.
const BYTES_PER_TOKEN: usize = 4;
/// Least that a record takes of the budget: the books on it are not free.
const TOKENS_PER_RECORD: usize = 64;

/// The consumer, shared with the sink, which commits through it.
pub type DocumentsConsumer = BaseConsumer<Context>;

/// Connects to the brokers and joins the group.
pub fn subscribe(
    config: &Config,
    ledger: Arc<Ledger<Outcome>>,
    metrics: Metrics,
    health: Health,
) -> anyhow::Result<DocumentsConsumer> {
    let settings = &config.kafka;
    let context = Context::new(config, ledger, metrics, health);
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
                ledger.close();
                Instant::now()
            });
            if ledger.is_finished() {
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
        // Not for a service manager to try again: a person must decide.
        Some(RDKafkaErrorCode::AutoOffsetReset) => Err(anyhow!(
            "the documents topic has no record any more where this group would read on: retention has removed it, or the \
             topic was made anew; set the group's offsets with Kafka's kafka-consumer-groups.sh --reset-offsets ({error})"
        ))
        .exit_code(DATA)?,
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
