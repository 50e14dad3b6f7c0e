//! Kafka in: reads records, refuses the bad ones, and pauses where the budget is used up. Models are unknown here.

mod assignment;
mod broker;
mod gap;
mod identity;
mod offsets;
mod placing;
mod stable;

use std::sync::Arc;
use std::thread::{Builder, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use crossbeam_channel::Sender;
use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _};
use sluice_kafka::MadeAnew;
use sluice_schemas::record::{RecordError, TokenizedDocument};

use crate::config::Config;
use crate::exit::{DATA, ExitCode as _, ExitError, FENCED, UNAVAILABLE, USAGE};
use crate::health::{Health, Loop};
use crate::job::Job;
use crate::kafka::{self, DocumentsConsumer, GroupHooks};
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::notice::Notices;
use crate::outcome::{DeadLetter, Outcome};
use crate::score::ModelIdentity;
use assignment::Assignment;

const POLL: Duration = Duration::from_millis(100);
/// How long a paused consumer waits before it looks at the budget again.
const POLL_PAUSED: Duration = Duration::from_millis(2);
/// How long one waits that may hear at any moment where a partition begins.
const POLL_ASKING: Duration = Duration::from_millis(10);

/// How long the budget must stay used up before reading is paused.
const PAUSE_AFTER: Duration = Duration::from_secs(1);
/// How long after its last word a broker is asked for a sign of life: one that was down, and one that is quiet.
const PROBE_DOWN: Duration = Duration::from_secs(2);
const PROBE_QUIET: Duration = Duration::from_secs(10);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the topic's id is waited for once the brokers have told it; old ones tell none.
const ID_WAIT: Duration = Duration::from_millis(200);

/// Bytes that take as much of the budget as a token, which may have four of them in the record.
const BYTES_PER_TOKEN: usize = 4;
/// Least that a record takes of the budget: the books on it are not free.
const TOKENS_PER_RECORD: usize = 64;

/// A member of the group that reads the documents topic.
pub struct Source<'a> {
    consumer: DocumentsConsumer,
    assignment: Arc<Assignment>,
    config: &'a Config,
    ledger: Arc<Ledger<Outcome>>,
    metrics: Metrics,
    health: Health,
    notices: Notices,
}

/// Records that are gone. What was read before them is published first: it may be gone from the topic as well.
#[derive(Debug)]
struct Gap {
    /// When it was found.
    found: Instant,
    words: String,
}

impl Gap {
    /// The end of reading.
    fn into_result(self) -> anyhow::Result<()> {
        Err(anyhow!(self.words)).exit_code(DATA)
    }
}

/// Connects to the brokers and joins the group.
pub fn subscribe(
    config: &Config,
    ledger: Arc<Ledger<Outcome>>,
    metrics: Metrics,
    health: Health,
) -> anyhow::Result<Source<'_>> {
    let settings = &config.kafka;
    let assignment = Arc::new(Assignment::new(config, Arc::clone(&ledger), metrics.clone(), health.clone()));
    let hooks: Arc<dyn GroupHooks> = assignment.clone();
    let consumer: DocumentsConsumer = kafka::consumer_config(settings)
        .create_with_context(kafka::Context::new(hooks))
        .map_err(kafka::setting_error)?;
    let serve = || drop(consumer.poll(Duration::ZERO));
    let metadata =
        kafka::reach(consumer.client(), &settings.bootstrap_servers, serve).exit_code(UNAVAILABLE)?;
    kafka::check_delivery(consumer.client(), settings.delivery).exit_code(USAGE)?;
    // Else the brokers would refuse it again and again, and it would wait for them.
    kafka::check_limits(settings, &metadata).exit_code(USAGE)?;
    kafka::check_topics(&metadata, settings).exit_code(UNAVAILABLE)?;
    // Has the client tell the topic's id, which is committed with its offsets.
    consumer.fetch_metadata(Some(&settings.documents_topic), PROBE_TIMEOUT).exit_code(UNAVAILABLE)?;
    let asked = Instant::now();
    while assignment.identity().id().is_none() && asked.elapsed() < ID_WAIT {
        drop(consumer.poll(POLL_PAUSED));
    }
    consumer.subscribe(&[&settings.documents_topic]).context("cannot subscribe")?;
    let notices = Notices::default();
    Ok(Source { consumer, assignment, config, ledger, metrics, health, notices })
}

impl Source<'_> {
    /// The member's client, through which what was read is committed.
    pub fn consumer(&self) -> &DocumentsConsumer {
        &self.consumer
    }

    /// Reads until asked to stop, then waits until everything read is published.
    pub fn run(&self, jobs: &Sender<Job>, model: ModelIdentity) -> anyhow::Result<()> {
        let Self { assignment, consumer, config, .. } = self;
        std::thread::scope(|scope| {
            let _until_the_end = StopAsking(assignment);
            let asking = Builder::new()
                .name("placing".to_owned())
                .spawn_scoped(scope, || assignment.keep_asking(consumer, &config.kafka))
                .context("cannot start a thread")?;
            self.read(jobs, model, &asking)
        })
    }

    fn read(
        &self,
        jobs: &Sender<Job>,
        model: ModelIdentity,
        asking: &ScopedJoinHandle<'_, ()>,
    ) -> anyhow::Result<()> {
        let Self { consumer, assignment, config, ledger, metrics, health, .. } = self;
        let budget = config.sizes().in_flight_tokens;
        let mut paused = false;
        let mut stopping: Option<Instant> = None;
        let mut last_answer = Instant::now();
        let mut gap: Option<Gap> = None;
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
                    return gap.map_or(Ok(()), Gap::into_result);
                }
                if since.elapsed() > config.limits.drain() {
                    bail!(
                        "{in_flight} tokens were still in flight when the drain deadline passed; they will be read again"
                    );
                }
            }
            if gap.as_ref().is_some_and(|gap| in_flight == 0 || gap.found.elapsed() > config.limits.drain()) {
                return gap.map_or(Ok(()), Gap::into_result);
            }
            // A pause throws away what the client has fetched, so it is for when the budget stays used up.
            if !paused
                && in_flight >= budget
                && !health.is_stopping()
                && ledger.wait_below(budget, PAUSE_AFTER)
            {
                continue;
            }
            let pause = health.is_stopping()
                || gap.is_some()
                || in_flight >= budget
                || (paused && in_flight > budget / 2);
            if pause != paused {
                assignment.set_paused(consumer, pause);
                metrics.paused.set(i64::from(pause));
                paused = pause;
            }
            let probe_after = if assignment.broker().is_down() { PROBE_DOWN } else { PROBE_QUIET };
            if last_answer.elapsed() > probe_after {
                last_answer = Instant::now();
                match consumer.client().fetch_metadata(Some(&config.kafka.documents_topic), PROBE_TIMEOUT) {
                    Ok(_) => assignment.broker().set_up(),
                    Err(error) => assignment.broker().set_down(&error.to_string()),
                }
            }
            if asking.is_finished() {
                bail!("nobody asks for offsets any more; this is a defect of Sluice");
            }
            if let Err(error) = assignment.place_known(consumer)
                && let Some(others) = self.notices.due("placing")
            {
                tracing::warn!(%error, others_since_last_warning = others, "cannot begin to read a partition");
            }
            let patience = match (paused, assignment.is_asking()) {
                (true, _) => POLL_PAUSED,
                (false, true) => POLL_ASKING,
                (false, false) => POLL,
            };
            let polled = consumer.poll(patience);
            // Before what was polled: the client tells of it before the first record of the new topic.
            if self.is_another_topic()? {
                continue;
            }
            match polled {
                None => {}
                Some(Err(error)) => {
                    let found = self.consumer_error(&error)?;
                    gap = gap.or(found);
                }
                // A record that was fetched before the drain began is left for the next reader.
                Some(Ok(_)) if stopping.is_some() || gap.is_some() => {}
                Some(Ok(message)) => {
                    assignment.broker().set_up();
                    last_answer = Instant::now();
                    self.accept(&message, jobs, model);
                    if paused {
                        // A rebalance has brought partitions that are not paused yet.
                        assignment.set_paused(consumer, true);
                    }
                }
            }
        }
    }

    /// Whether the documents topic was deleted and made anew, so that what was polled is not to be taken on. All of the new
    /// one is read: no offset of another topic is begun at.
    fn is_another_topic(&self) -> anyhow::Result<bool> {
        let identity = self.assignment.identity();
        if let Some(words) = identity.complaint() {
            return Err(anyhow!(words)).exit_code(DATA);
        }
        let Some(MadeAnew { earlier, later }) = identity.made_anew() else { return Ok(false) };
        tracing::warn!(
            topic = self.config.kafka.documents_topic,
            earlier,
            later,
            "the documents topic was deleted and made anew; what was not published of the old one is gone, and the new one is \
             read from its beginning"
        );
        self.assignment.place_in_new_topic(&self.consumer).context("cannot go over to the new topic")?;
        Ok(true)
    }

    /// Errors that the client recovers from are counted; the others end the daemon, a gap in the documents among them.
    fn consumer_error(&self, error: &KafkaError) -> anyhow::Result<Option<Gap>> {
        self.metrics.kafka_errors.inc();
        if let KafkaError::MessageConsumptionFatal(code) = error {
            return Err(self.fatal(*code));
        }
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AutoOffsetReset) => return self.gap(error),
            Some(RDKafkaErrorCode::Fatal) => return Err(self.fatal(RDKafkaErrorCode::Fatal)),
            Some(RDKafkaErrorCode::AllBrokersDown) => {
                self.assignment.broker().set_down("all brokers are down");
            }
            // Said once, and it comes again with every try.
            Some(RDKafkaErrorCode::BrokerTransportFailure) if self.assignment.broker().is_down() => {}
            _ => {
                if let Some(others) = self.notices.due("consumer error") {
                    tracing::warn!(
                        %error,
                        others_since_last_warning = others,
                        "kafka consumer error; the client tries again"
                    );
                }
            }
        }
        Ok(None)
    }

    /// The client has given up, and reads nothing ever again. A service manager starts it anew, but not where another
    /// daemon has the same name in the group: each would throw the other out.
    fn fatal(&self, code: RDKafkaErrorCode) -> anyhow::Error {
        let reason = self.consumer.client().fatal_error().map(|(_, reason)| reason).unwrap_or_default();
        let error = anyhow!("the consumer has failed for good: {code}; {reason}");
        if code != RDKafkaErrorCode::FencedInstanceId {
            return error;
        }
        let error = error.context(
            "another member of the group has the same group.instance.id; give every daemon its own in kafka.properties",
        );
        ExitError { code: FENCED, error }.into()
    }

    fn accept(&self, message: &BorrowedMessage<'_>, jobs: &Sender<Job>, model: ModelIdentity) {
        let payload = Bytes::copy_from_slice(message.payload().unwrap_or_default());
        let key = message.key().map(Bytes::copy_from_slice);
        let checked = check(payload.clone(), model);
        let tokens = checked.as_ref().map_or(0, |document| document.tokens.len());
        let bytes = payload.len() + key.as_ref().map_or(0, Bytes::len);
        let room = tokens.max(bytes / BYTES_PER_TOKEN).max(TOKENS_PER_RECORD);
        let Some(ticket) = self.ledger.open(message.partition(), message.offset(), room) else {
            return;
        };
        self.metrics.documents_read.inc();
        match checked {
            Ok(document) => {
                self.metrics.tokens_read.inc_by(tokens as u64);
                // The receiver is gone only while the daemon stops; the record is then read again.
                let _ = jobs.send(Job { ticket, key, payload, document });
            }
            Err(error) => {
                let letter = DeadLetter::new(key, payload, error.code(), &error.to_string());
                self.ledger.complete(ticket, Outcome::DeadLetter(letter));
            }
        }
    }
}

/// Ends the asking with the reading, however that ends.
struct StopAsking<'a>(&'a Assignment);

impl Drop for StopAsking<'_> {
    fn drop(&mut self) {
        self.0.stop_asking();
    }
}

fn check(payload: Bytes, model: ModelIdentity) -> Result<TokenizedDocument, RecordError> {
    let document = TokenizedDocument::decode(payload)?;
    document.check_tokenizer(model.tokenizer)?;
    document.tokens.check_vocabulary(model.vocabulary)?;
    Ok(document)
}
