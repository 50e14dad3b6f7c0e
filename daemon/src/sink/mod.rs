//! Kafka out: publishes outcomes in the order of the ledger and commits the offsets they came from.
//!
//! *Exactly once*: records and offsets are one Kafka transaction, so that a reader with `read_committed` sees each
//! outcome once, whatever is killed. *At least once*: offsets are committed after the broker has confirmed the
//! records, and what lies between the two is published again by the next daemon.

mod error;
mod headers;
mod producer;

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use rdkafka::consumer::{CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::producer::Producer as _;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::config::{Config, Delivery};
use crate::exit::{ExitError, FENCED};
use crate::health::{Health, Loop};
use crate::kafka::{self, DocumentsConsumer};
use crate::ledger::{Group, Ledger, Ticket};
use crate::metrics::{FENCED_BY_GROUP, FENCED_BY_PRODUCER, Metrics};
use crate::notice::Notices;
use crate::outcome::{DeadLetter, Outcome};
use error::{Failure, Verdict, classify, is_fenced_by_group, is_too_large};
use headers::headers;
use producer::{RecordProducer, Stuck};

const IDLE: Duration = Duration::from_millis(100);
/// How long one call to the broker may take before the loop shows a sign of life and makes it again.
const CALL: Duration = Duration::from_secs(1);
/// The same for calls of a transaction, which wait for the broker's word: each resumed call is a chance for the client
/// to lose its place.
const TRANSACTION_CALL: Duration = Duration::from_secs(30);
/// Wait between an aborted transaction and the next try.
const ABORT_WAIT: Duration = Duration::from_millis(200);

/// Records that were in a batch which the broker refused as too large.
type Suspects = HashSet<Ticket>;

fn new_producer(config: &Config) -> anyhow::Result<RecordProducer> {
    RecordProducer::new(&kafka::sink_config(&config.kafka)?).map_err(kafka::setting_error)
}

/// The producer and the names it publishes under.
pub struct Sink<'a> {
    producer: RecordProducer,
    delivery: Delivery,
    config: &'a Config,
    consumer: &'a DocumentsConsumer,
    ledger: &'a Ledger<Outcome>,
    metrics: &'a Metrics,
    health: &'a Health,
    notices: Notices,
    /// When the open transaction began, by the clock that goes on while a machine sleeps.
    begun: Cell<Option<SystemTime>>,
}

impl<'a> Sink<'a> {
    /// A producer for `config`'s brokers; where delivery is exactly once, whatever an earlier daemon with the same
    /// transactional id left open is resolved first.
    pub fn new(
        config: &'a Config,
        consumer: &'a DocumentsConsumer,
        ledger: &'a Ledger<Outcome>,
        metrics: &'a Metrics,
        health: &'a Health,
    ) -> anyhow::Result<Self> {
        let producer = new_producer(config)?;
        let notices = Notices::default();
        let delivery = config.kafka.delivery;
        let begun = Cell::new(None);
        let sink = Self { producer, delivery, config, consumer, ledger, metrics, health, notices, begun };
        if sink.delivery == Delivery::ExactlyOnce {
            sink.resolve_open_transaction()?;
        }
        Ok(sink)
    }

    /// Takes over the transactional id: what an earlier producer with the same one left open is aborted.
    fn resolve_open_transaction(&self) -> anyhow::Result<()> {
        self.insist(|| self.producer.client.init_transactions(TRANSACTION_CALL))
            .map_err(|failure| failure.into_error().context("cannot begin with transactions"))
    }

    /// Publishes and commits until asked to stop and nothing is in flight any more.
    pub fn run(&mut self) -> anyhow::Result<()> {
        loop {
            self.health.beat(Loop::Sink);
            let limits = &self.config.limits;
            let delay = if self.health.is_stopping() { Duration::ZERO } else { limits.publish_delay() };
            let mut group = self.ledger.take(limits.publish_tokens, IDLE, delay);
            if self.health.is_aborted() {
                return Ok(());
            }
            if group.is_empty() {
                // Not before the ledger is closed: a record may still be on its way from the source.
                if self.ledger.is_finished() {
                    return Ok(());
                }
                continue;
            }
            let timer = self.metrics.publish_seconds.start_timer();
            match self.delivery {
                Delivery::ExactlyOnce => self.deliver_exactly_once(&mut group)?,
                Delivery::AtLeastOnce => self.deliver_at_least_once(&mut group)?,
            }
            timer.observe_duration();
            tracing::debug!(records = group.len(), "published and committed");
            self.count(&group);
            self.ledger.release(&group);
        }
    }

    /// Warns of the first dead letter of its reason at once, and of later ones together.
    fn warn_of_dead_letter(&self, letter: &DeadLetter, ticket: Ticket) {
        if let Some(others) = self.notices.due(letter.reason) {
            tracing::warn!(
                reason = letter.reason,
                detail = letter.detail,
                partition = ticket.partition,
                offset = ticket.offset,
                others_since_last_warning = others,
                "dead letter"
            );
        }
    }

    fn count(&self, group: &Group<Outcome>) {
        for taken in group {
            self.metrics.committed_seconds.observe(taken.opened.elapsed().as_secs_f64());
            match &taken.outcome {
                Outcome::Scored(scored) => {
                    let scored_after = taken.completed.duration_since(taken.opened);
                    self.metrics.scored_seconds.observe(scored_after.as_secs_f64());
                    self.metrics.documents_scored.inc();
                    self.metrics.tokens_scored.inc_by(scored.tokens as u64);
                }
                Outcome::DeadLetter(letter) => {
                    self.metrics.dead_letters.with_label_values(&[letter.reason]).inc();
                    self.warn_of_dead_letter(letter, taken.ticket);
                }
            }
        }
    }

    /// Records and offsets in one transaction, begun only now that everything is scored. After an abort the same
    /// outcomes go into another, less those whose partition was taken away meanwhile.
    fn deliver_exactly_once(&mut self, group: &mut Group<Outcome>) -> anyhow::Result<()> {
        let mut suspects = HashSet::new();
        loop {
            self.ledger.drop_revoked(group);
            if group.is_empty() {
                return Ok(());
            }
            match self.transaction(group, &suspects) {
                Ok(()) => {
                    self.metrics.commits.inc();
                    return Ok(());
                }
                Err(Failure::Fatal(error)) => return Err(error),
                Err(Failure::Aborted(error)) => {
                    tracing::info!(error = format!("{error:#}"), "transaction aborted; trying again");
                    self.metrics.aborts.inc();
                    self.insist(|| self.producer.client.abort_transaction(TRANSACTION_CALL))
                        .map_err(Failure::into_error)?;
                    self.sort_out_refused(group, &mut suspects)?;
                    std::thread::sleep(ABORT_WAIT);
                }
                Err(Failure::Stuck) => {
                    tracing::warn!(
                        "the Kafka client does not return from a call; going on with a new producer"
                    );
                    self.metrics.producers_replaced.inc();
                    self.producer = new_producer(self.config)?;
                    self.resolve_open_transaction()?;
                }
            }
        }
    }

    fn transaction(&self, group: &mut Group<Outcome>, suspects: &Suspects) -> Result<(), Failure> {
        let client = &self.producer.client;
        self.begun.set(Some(SystemTime::now()));
        client.begin_transaction().map_err(|error| self.judge(error))?;
        for index in 0..group.len() {
            self.send(group, index, suspects)?;
        }
        let offsets = self.offsets(&Ledger::commit_points(group));
        let Some(membership) = self.consumer.group_metadata() else {
            return Err(Failure::Fatal(anyhow!("the consumer is not a member of a group")));
        };
        // In this order: a membership that was taken before its loss is refused by the broker, and one that was taken
        // after it, which may be a new one without these partitions, is found here.
        if self.consumer.assignment_lost() || !self.ledger.is_current(group) {
            self.metrics.fences.with_label_values(&[FENCED_BY_GROUP]).inc();
            return Err(Failure::Aborted(anyhow!("partitions have moved to another daemon meanwhile")));
        }
        let membership = Arc::new(membership);
        self.insist_unless_stuck(|| {
            let sign_of_life = || self.health.beat(Loop::Sink);
            self.producer.send_offsets(&offsets, &membership, TRANSACTION_CALL, sign_of_life)
        })?;
        self.insist(|| {
            self.producer.wait_delivered(CALL);
            client.commit_transaction(TRANSACTION_CALL)
        })
    }

    /// Makes one call again and again while its error is one that passes.
    fn insist(&self, call: impl Fn() -> KafkaResult<()>) -> Result<(), Failure> {
        self.insist_unless_stuck(|| Ok(call()))
    }

    /// [`Self::insist`] on a call that may never return.
    fn insist_unless_stuck(&self, call: impl Fn() -> Result<KafkaResult<()>, Stuck>) -> Result<(), Failure> {
        loop {
            self.health.beat(Loop::Sink);
            let Err(error) = call().map_err(|Stuck| Failure::Stuck)? else { return Ok(()) };
            if classify(&error) != Verdict::Retry {
                return Err(self.judge(error));
            }
            if self.health.is_aborted() {
                return Err(Failure::Fatal(anyhow!("gave up; the next start resolves the open transaction")));
            }
        }
    }

    fn judge(&self, error: KafkaError) -> Failure {
        if is_fenced_by_group(&error) {
            self.metrics.fences.with_label_values(&[FENCED_BY_GROUP]).inc();
        }
        match classify(&error) {
            Verdict::Abort | Verdict::Retry => Failure::Aborted(error.into()),
            Verdict::Fatal => Failure::Fatal(anyhow!(error).context("the producer failed for good")),
            Verdict::Fenced => {
                self.metrics.fences.with_label_values(&[FENCED_BY_PRODUCER]).inc();
                Failure::Fatal(self.fenced(error))
            }
        }
    }

    /// Brokers fence a producer off when another one has its transactional id, and when it left a transaction open for
    /// too long: a daemon that was suspended does, and a new start helps it. Against the other nothing helps but a person.
    fn fenced(&self, error: KafkaError) -> anyhow::Error {
        let timeout = kafka::transaction_timeout(&self.config.kafka).unwrap_or_default();
        let open = self.begun.get().and_then(|begun| begun.elapsed().ok()).unwrap_or_default();
        if open >= timeout {
            return anyhow!(error).context(format!(
                "the brokers have given up a transaction that was open for {} s; the next start reads its records again",
                open.as_secs()
            ));
        }
        let id = kafka::transactional_id(&self.config.kafka);
        let error = anyhow!(error).context(format!(
            "another daemon has taken over the transactional id `{id}`; give every daemon its own kafka.instance"
        ));
        ExitError { code: FENCED, error }.into()
    }

    /// Records first, and once the broker has confirmed them all, the offsets.
    fn deliver_at_least_once(&self, group: &mut Group<Outcome>) -> anyhow::Result<()> {
        self.ledger.drop_revoked(group);
        let mut suspects = HashSet::new();
        let mut unsent: Vec<usize> = (0..group.len()).collect();
        while !unsent.is_empty() {
            let sent = unsent
                .iter()
                .try_for_each(|&index| self.send(group, index, &suspects))
                .and_then(|()| self.flush());
            sent.map_err(|failure| failure.into_error().context("cannot publish"))?;
            unsent = self.sort_out_refused(group, &mut suspects)?;
        }
        self.ledger.drop_revoked(group);
        let points = Ledger::commit_points(group);
        if points.is_empty() {
            return Ok(());
        }
        match self.consumer.commit(&self.offsets(&points), CommitMode::Sync) {
            Ok(()) => self.metrics.commits.inc(),
            // At worst a repetition: the next commit covers it, or whoever has the partitions now repeats it.
            Err(error) => {
                self.metrics.commit_failures.inc();
                if let Some(others) = self.notices.due("commit") {
                    tracing::warn!(
                        %error,
                        others_since_last_warning = others,
                        "cannot commit offsets; what was published may be published again"
                    );
                }
            }
        }
        Ok(())
    }

    /// Hands record `index` to the producer; a suspect goes in a batch of its own, so that a refusal is meant for it.
    fn send(&self, group: &mut Group<Outcome>, index: usize, suspects: &Suspects) -> Result<(), Failure> {
        let alone = suspects.contains(&group[index].ticket);
        if alone {
            self.flush()?;
        }
        // A record that the client itself refuses does not touch the transaction.
        while let Err(error) = self.hand_over(group, index) {
            if !is_too_large(&error) {
                return Err(self.judge(error));
            }
            self.shrink(group, index).map_err(Failure::Fatal)?;
        }
        if alone {
            self.flush()?;
        }
        Ok(())
    }

    /// Waits for the broker's word on every record that was handed over.
    fn flush(&self) -> Result<(), Failure> {
        self.insist(|| {
            self.producer.wait_delivered(CALL);
            self.producer.client.flush(CALL)
        })
    }

    fn hand_over(&self, group: &Group<Outcome>, index: usize) -> KafkaResult<()> {
        let settings = &self.config.kafka;
        let taken = &group[index];
        let topic = match taken.outcome {
            Outcome::Scored(_) => &settings.scored_topic,
            Outcome::DeadLetter(_) => &settings.dead_letter_topic,
        };
        let headers = headers(&taken.outcome, taken.ticket, &settings.documents_topic);
        let (key, payload) = (taken.outcome.key(), taken.outcome.payload());
        self.producer.send(topic, index, key.map(AsRef::as_ref), payload.map(AsRef::as_ref), headers)
    }

    /// Looks at the records that the broker refused as too large, and returns their indices.
    ///
    /// The broker's limit is on batches, and refuses a whole batch for one record. So the records of a refused batch
    /// are suspects, which are sent one by one, and one that is refused alone is made smaller. Any other refusal in
    /// an aborted transaction is that of the abort itself.
    fn sort_out_refused(
        &self,
        group: &mut Group<Outcome>,
        suspects: &mut Suspects,
    ) -> anyhow::Result<Vec<usize>> {
        let mut refused = Vec::new();
        for (index, error) in self.producer.refused() {
            if is_too_large(&error) {
                if !suspects.insert(group[index].ticket) {
                    self.shrink(group, index)?;
                }
                refused.push(index);
            } else if self.delivery == Delivery::AtLeastOnce {
                return Err(error).context("the broker refuses a record");
            }
        }
        refused.sort_unstable();
        Ok(refused)
    }

    fn shrink(&self, group: &mut Group<Outcome>, index: usize) -> anyhow::Result<()> {
        let taken = &mut group[index];
        match taken.outcome.shrink() {
            Some(letter) => taken.outcome = Outcome::DeadLetter(letter),
            None => bail!(
                "the broker refuses even a dead letter without payload and key as too large; raise max.message.bytes of \
                 the topic `{}`",
                self.config.kafka.dead_letter_topic
            ),
        }
        Ok(())
    }

    fn offsets(&self, points: &HashMap<i32, i64>) -> TopicPartitionList {
        let mut offsets = TopicPartitionList::new();
        for (&partition, &offset) in points {
            // The list is fresh and the offset is one past a real one, so this cannot fail.
            let _ = offsets.add_partition_offset(
                &self.config.kafka.documents_topic,
                partition,
                Offset::Offset(offset),
            );
        }
        offsets
    }
}
