//! Kafka out: publishes outcomes in the order of the ledger and commits the offsets they came from.
//!
//! *Exactly once*: records and offsets are one Kafka transaction, so that a reader with `read_committed` sees each
//! outcome once, whatever is killed. *At least once*: offsets are committed after the broker has confirmed the
//! records, and what lies between the two is published again by the next daemon.

mod breaker;
mod error;
mod headers;
mod producer;
mod transaction;

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use rdkafka::consumer::{CommitMode, Consumer as _};
use rdkafka::error::KafkaResult;
use rdkafka::producer::Producer as _;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use sluice_kafka::{MadeAnew, TopicIds};

use crate::config::{Config, Delivery, Kafka};
use crate::exit::{DATA, ExitCode as _};
use crate::health::{Condition, Health, Loop, Wait};
use crate::kafka::{self, DocumentsConsumer, Mark};
use crate::ledger::{Group, Ledger, Ticket};
use crate::metrics::Metrics;
use crate::notice::Notices;
use crate::outcome::{DeadLetter, Outcome};
use breaker::Breaker;
use error::{Failure, is_too_large};
use headers::headers;
use producer::{RecordProducer, wait_delivered};

const IDLE: Duration = Duration::from_millis(100);
/// How long one call to the broker may take before the loop shows a sign of life and makes it again.
const CALL: Duration = Duration::from_secs(1);
/// How long the scored topic's id is waited for once the brokers have told it.
const ID_WAIT: Duration = Duration::from_millis(200);
const ID_TURN: Duration = Duration::from_millis(2);

/// Records that were in a batch which the broker refused as too large.
type Suspects = HashSet<Ticket>;

fn new_producer(config: &Config, topics: &Arc<TopicIds>) -> anyhow::Result<RecordProducer> {
    RecordProducer::new(&kafka::sink_config(&config.kafka)?, topics).map_err(kafka::setting_error)
}

/// The producer and the names it publishes under.
pub struct Sink<'a> {
    producer: RecordProducer,
    topics: Arc<TopicIds>,
    delivery: Delivery,
    config: &'a Config,
    consumer: &'a DocumentsConsumer,
    ledger: &'a Ledger<Outcome>,
    metrics: &'a Metrics,
    health: &'a Health,
    notices: Notices,
    breaker: Breaker,
    /// Down while the transactions coordinator does not answer.
    coordinator: Condition,
    /// Down while every transaction is aborted for the same reason.
    publishing: Condition,
    /// When the open transaction began, by the clock that goes on while a machine sleeps.
    begun: Cell<Option<SystemTime>>,
    /// Whether the brokers were asked to commit it, and may have done so.
    commit_asked: Cell<bool>,
    /// The producer's own request for its transactional id may arrive once more, and fence it off.
    fences_itself: Cell<bool>,
}

impl<'a> Sink<'a> {
    /// A producer for `config`'s brokers.
    pub fn new(
        config: &'a Config,
        consumer: &'a DocumentsConsumer,
        ledger: &'a Ledger<Outcome>,
        metrics: &'a Metrics,
        health: &'a Health,
    ) -> anyhow::Result<Self> {
        let topics = Arc::default();
        let producer = new_producer(config, &topics)?;
        let notices = Notices::default();
        let breaker = Breaker::new(config.limits.failing_records, config.limits.failing_percent);
        let delivery = config.kafka.delivery;
        let coordinator = health.condition(Wait::Coordinator);
        coordinator.set_down(delivery == Delivery::ExactlyOnce);
        let publishing = health.condition(Wait::Publishing);
        let (begun, commit_asked, fences_itself) = Default::default();
        Ok(Self {
            producer,
            topics,
            delivery,
            config,
            consumer,
            ledger,
            metrics,
            health,
            notices,
            breaker,
            coordinator,
            publishing,
            begun,
            commit_asked,
            fences_itself,
        })
    }

    /// Publishes and commits until asked to stop and nothing is in flight any more. Where delivery is exactly once,
    /// whatever an earlier daemon with the same transactional id left open is resolved first.
    pub fn run(&mut self) -> anyhow::Result<()> {
        match self.publish() {
            // The daemon ends, and another loop says why, or there is nothing to publish.
            Ok(()) | Err(Failure::GivenUp) => Ok(()),
            Err(failure) => Err(failure.into_error()),
        }
    }

    fn publish(&mut self) -> Result<(), Failure> {
        if self.delivery == Delivery::ExactlyOnce {
            self.resolve_open_transaction()?;
        }
        self.ask_scored_topic();
        loop {
            self.health.beat(Loop::Sink);
            let limits = &self.config.limits;
            let delay = if self.health.is_stopping() { Duration::ZERO } else { limits.publish_delay() };
            let mut group = self.ledger.take(limits.publish_tokens, IDLE, delay);
            if self.health.is_aborted() {
                return Ok(());
            }
            self.check_scored_topic()?;
            if group.is_empty() {
                // Not before the ledger is closed: a record may still be on its way from the source.
                if self.ledger.is_finished() {
                    return Ok(());
                }
                continue;
            }
            self.check_reasons(&group)?;
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

    /// Fails before `group` is published where too many of the last records have failed for a reason of ours.
    fn check_reasons(&mut self, group: &Group<Outcome>) -> anyhow::Result<()> {
        for taken in group {
            let fault = taken.outcome.our_fault();
            if let (true, Some(reason)) = (self.breaker.count(fault.is_some()), fault) {
                let detail = match &taken.outcome {
                    Outcome::DeadLetter(letter) => letter.detail.as_str(),
                    Outcome::Scored(_) => "",
                };
                let limits = &self.config.limits;
                return Err(anyhow!(
                    "more than {} % of the last {} records could not be scored for a reason that is hardly theirs, at last \
                     partition {}, offset {}: {reason}, {detail}; none of these is committed. Check \
                     model.path and its tokenizer, or allow more with limits.failing_percent; `sluiced dead-letters replay` \
                     brings back what came before",
                    limits.failing_percent,
                    limits.failing_records,
                    taken.ticket.partition,
                    taken.ticket.offset,
                ))
                .exit_code(DATA);
            }
        }
        Ok(())
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

    /// Records first, and once the broker has confirmed them all, the offsets.
    fn deliver_at_least_once(&self, group: &mut Group<Outcome>) -> Result<(), Failure> {
        self.ledger.drop_revoked(group);
        let mut suspects = HashSet::new();
        let mut unsent: Vec<usize> = (0..group.len()).collect();
        while !unsent.is_empty() {
            let sent = unsent
                .iter()
                .try_for_each(|&index| self.send(group, index, &suspects))
                .and_then(|()| self.flush());
            sent.map_err(|failure| match failure {
                Failure::GivenUp => failure,
                failure => Failure::Fatal(failure.into_error().context("cannot publish")),
            })?;
            unsent = self.sort_out_refused(group, &mut suspects)?;
        }
        self.check_scored_topic()?;
        let id = self.topic_id();
        self.ledger.drop_revoked(group);
        let points = Ledger::commit_points(group);
        if points.is_empty() {
            return Ok(());
        }
        match self.consumer.commit(&self.offsets(&points, id), CommitMode::Sync) {
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
            wait_delivered(&self.producer.client, CALL);
            Ok(self.producer.client.flush(CALL))
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

    /// The id of the topic whose records are read. To be asked for before the ledger is asked what may be committed, which
    /// forgets everything of a topic before its name stands for another.
    fn topic_id(&self) -> Option<String> {
        self.consumer.context().hooks().topic_id()
    }

    /// Has the client tell the scored topic's id, which is committed with the first offsets already. Old brokers tell none.
    fn ask_scored_topic(&self) {
        let topic = &self.config.kafka.scored_topic;
        // What cannot be asked now is heard of with the first records.
        let _ = self.producer.client.client().fetch_metadata(Some(topic), CALL);
        let asked = Instant::now();
        while self.topics.id(topic).is_none() && asked.elapsed() < ID_WAIT {
            std::thread::sleep(ID_TURN);
        }
    }

    /// Fails where what was published before is gone.
    fn check_scored_topic(&self) -> anyhow::Result<()> {
        let Kafka { scored_topic: topic, documents_topic: documents, .. } = &self.config.kafka;
        let (which, earlier, later) = match (self.topics.made_anew(topic), self.topics.id(topic)) {
            (Some(MadeAnew { earlier, later }), _) => (String::new(), earlier, later),
            (None, Some(id)) => match self.consumer.context().hooks().published_elsewhere(&id) {
                Some((partition, other)) => (format!(" (partition {partition})"), other, id),
                None => return Ok(()),
            },
            (None, None) => return Ok(()),
        };
        Err(anyhow!(
            "the topic `{topic}` was deleted and made anew, or is on another cluster (id {earlier}, now {later}): what was \
             published to it before is gone, and its documents count as scored{which}; decide, with all daemons of the group \
             stopped: kafka-consumer-groups.sh --reset-offsets --topic {documents} --to-current to go on with the next ones, \
             or --to-earliest to have all that are there scored again"
        ))
        .exit_code(DATA)
    }

    /// The list to commit. The topics' ids go with each offset, so that it is never taken for one of another topic that
    /// has the name by then, nor its documents for scored whose losses are gone.
    fn offsets(&self, points: &HashMap<i32, i64>, id: Option<String>) -> TopicPartitionList {
        let mark = Mark { documents: id, scored: self.topics.id(&self.config.kafka.scored_topic) };
        let mut offsets = TopicPartitionList::new();
        for (&partition, &offset) in points {
            let mut element = offsets.add_partition(&self.config.kafka.documents_topic, partition);
            // It is one past a real one, so this cannot fail.
            let _ = element.set_offset(Offset::Offset(offset));
            element.set_metadata(mark.to_string());
        }
        offsets
    }
}
