//! Partitions that come and go: what the client does to begin reading them, and what becomes of what is in flight.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList, TopicPartitionListElem};
use rdkafka::types::RDKafkaRespErr;

use super::broker::Broker;
use super::identity::Identity;
use super::offsets::{Onlooker, committed};
use super::placing::Placing;
use super::stable::{Ends, Standing};
use crate::config::{Config, Kafka};
use crate::health::{Condition, Health, Latch, Wait};
use crate::kafka::{DocumentsConsumer, GroupHooks, Hooks};
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::outcome::Outcome;

/// What librdkafka calls a partition that it reads.
const FETCHING: &str = "active";

/// The partitions of this member of the group, and what its client says beside them.
pub(super) struct Assignment {
    topic: String,
    ledger: Arc<Ledger<Outcome>>,
    metrics: Metrics,
    health: Health,
    drain: Duration,
    placing: Mutex<Placing>,
    /// Told when there is something new to ask for, or nothing any more.
    asked: Condvar,
    /// Held until the group has spoken for the first time.
    joining: Mutex<Option<Latch>>,
    /// Down while there is no partition to read.
    reading: Condition,
    /// Down while there are some, and none can be read yet.
    settled: Condition,
    broker: Broker,
    identity: Identity,
    standing: Mutex<Standing>,
}

impl Hooks for Assignment {
    fn log(&self, facility: &str, message: &str) {
        self.identity.hear(facility, message);
    }

    fn statistics(&self, statistics: &Statistics) {
        let partitions = statistics.topics.values().flat_map(|topic| topic.partitions.values());
        // A pause throws away what was fetched, and the place of fetching goes back only a moment later.
        let is_reading = self.metrics.paused.get() == 0;
        let lag: u64 = partitions
            .filter_map(|p| {
                // Marks of transactions and records of aborted ones are fetched and never handed out.
                let all_handed_out = is_reading && p.fetchq_cnt == 0 && p.fetch_state == FETCHING;
                let fetched = if all_handed_out { p.next_offset } else { 0 };
                self.ledger.lag(p.partition, p.committed_offset, fetched, p.ls_offset.max(0))
            })
            .sum();
        self.metrics.consumer_lag.set((lag + self.look(Placing::behind)) as i64);
        let read = statistics.topics.values().flat_map(|topic| topic.partitions.values());
        let ends = read.filter(|p| p.fetch_state == FETCHING).map(|p| Ends {
            partition: p.partition,
            next: p.next_offset,
            stable: p.ls_offset,
            end: p.hi_offset,
        });
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        let longest = standing.look(ends, Instant::now());
        self.metrics.open_transaction_seconds.set(longest.as_secs() as i64);
        let queued = self.ledger.queued();
        self.metrics.set_queued(queued.unscored, queued.unpublished);
    }

    fn error(&self, error: &KafkaError, reason: &str) -> bool {
        self.metrics.kafka_errors.inc();
        let all_down = error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown);
        if all_down {
            self.broker.set_down(reason);
        }
        all_down
    }
}

impl GroupHooks for Assignment {
    fn rebalance(&self, consumer: &DocumentsConsumer, kind: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let changed = if kind == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            self.assigned(consumer, list)
        } else {
            self.revoked(consumer, list)
        };
        if let Err(error) = changed {
            tracing::warn!(%error, "the client did not take the change of its partitions");
        }
        self.metrics.rebalances.inc();
        // Here and nowhere else, for the start of the daemon is over with it.
        *self.joining.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn topic_id(&self) -> Option<String> {
        self.identity.id()
    }

    fn published_elsewhere(&self, scored: &str) -> Option<(i32, String)> {
        self.identity.published_elsewhere(scored)
    }
}

impl Assignment {
    /// For the consumer of `config`'s documents topic, which has no partitions yet.
    pub(super) fn new(
        config: &Config,
        ledger: Arc<Ledger<Outcome>>,
        metrics: Metrics,
        health: Health,
    ) -> Self {
        let joining = Mutex::new(Some(health.latch(Wait::Group)));
        let reading = health.condition(Wait::Partition);
        reading.set_down(true);
        Self {
            topic: config.kafka.documents_topic.clone(),
            ledger,
            metrics,
            drain: config.limits.drain(),
            placing: Mutex::default(),
            asked: Condvar::new(),
            joining,
            reading,
            settled: health.condition(Wait::Offset),
            broker: Broker::new(&health),
            identity: Identity::new(config.kafka.documents_topic.clone()),
            standing: Mutex::default(),
            health,
        }
    }

    /// What was last heard of the brokers.
    pub(super) fn broker(&self) -> &Broker {
        &self.broker
    }

    /// Which topic the documents topic is.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Has the committed offsets of new partitions asked for; [`Self::place_known`] takes each over once its own is there.
    ///
    /// Not left to the client, which begins a partition anew when a rebalance comes while its offset is held up by an
    /// open transaction (librdkafka 2.12, `rd_kafka_assignment_apply_offsets`): thousands of documents came twice.
    fn assigned(&self, consumer: &DocumentsConsumer, list: &TopicPartitionList) -> KafkaResult<()> {
        let partitions = numbers(list);
        tracing::info!(?partitions, "partitions assigned");
        self.note_loss(consumer);
        // The group's protocol goes on with this word, whatever it is about.
        let spoken = consumer.incremental_assign(&TopicPartitionList::new());
        self.change(|placing| placing.ask(&partitions, Instant::now()));
        self.asked.notify_all();
        spoken
    }

    fn revoked(&self, consumer: &DocumentsConsumer, list: &TopicPartitionList) -> KafkaResult<()> {
        let partitions = numbers(list);
        // What the model has can still be committed, unless the group has already given it to another, or nobody is
        // left to commit it.
        self.ledger.forget_waiting(&partitions);
        let drained = !consumer.assignment_lost()
            && !self.health.is_aborted()
            && self.ledger.wait_drained(&partitions, self.drain);
        tracing::info!(?partitions, drained, "partitions revoked");
        // The client knows nothing of the others.
        let mut placed = self.placed();
        placed.retain(|partition| partitions.contains(partition));
        self.change(|placing| placing.give_up(&partitions));
        self.identity.give_up(&partitions);
        self.ledger.revoke(partitions);
        consumer.incremental_unassign(&self.list(&placed))
    }

    /// Begins to read the partitions whose committed offset has come.
    pub(super) fn place_known(&self, consumer: &DocumentsConsumer) -> KafkaResult<()> {
        let known = self.look(Placing::known);
        if known.is_empty() || self.note_loss(consumer) {
            return Ok(());
        }
        let mut list = TopicPartitionList::new();
        for &(partition, offset) in &known {
            list.add_partition_offset(&self.topic, partition, offset)?;
        }
        if let Err(error) = consumer.incremental_assign(&list) {
            let partitions: Vec<i32> = known.iter().map(|(partition, _)| *partition).collect();
            self.change(|placing| placing.ask(&partitions, Instant::now()));
            return Err(error);
        }
        self.ledger.assign(known.iter().map(|(partition, _)| *partition));
        self.change(|placing| {
            for (partition, offset) in known {
                if placing.place(partition, offset) {
                    tracing::info!(partition, ?offset, "reading begins, now that its offset is settled");
                }
            }
        });
        // A pause outlives the assignment it was made in: the client would never read these, and nobody would know.
        // Where the budget is used up, the first record that comes has them paused again.
        consumer.resume(&list)
    }

    /// Begins anew with every partition, from where the group has committed: what is in flight is given up.
    pub(super) fn place_anew(&self, consumer: &DocumentsConsumer) -> KafkaResult<()> {
        let placed = self.placed();
        self.ledger.revoke(placed.iter().copied());
        let changed = consumer.incremental_unassign(&self.list(&placed));
        self.change(|placing| placing.ask(&placing.partitions(), Instant::now()));
        self.asked.notify_all();
        changed
    }

    /// Goes over to the topic that has the name now.
    pub(super) fn place_in_new_topic(&self, consumer: &DocumentsConsumer) -> KafkaResult<()> {
        // First, so that nothing of the old topic is committed under the new one's id.
        self.ledger.revoke(self.placed());
        self.identity.take();
        self.place_anew(consumer)
    }

    /// Whether the group has gone on without this member. What is in flight is another's then, which the ledger has to
    /// be told here: any change of its assignment has the client forget about the loss (librdkafka 2.12,
    /// `rd_kafka_cgrp_incremental_assign`), though the revocation that says so is still to come.
    fn note_loss(&self, consumer: &DocumentsConsumer) -> bool {
        let lost = consumer.assignment_lost();
        if lost {
            self.ledger.revoke(self.placed());
        }
        lost
    }

    /// Asks for committed offsets, one partition after the other, until [`Self::stop_asking`]. On a thread of its own,
    /// for the client does not answer as long as an open transaction holds the offset up.
    pub(super) fn keep_asking(&self, consumer: &DocumentsConsumer, settings: &Kafka) {
        let mut onlooker = Onlooker::new(settings);
        let mut placing = self.lock();
        while !placing.is_closed() {
            let Some(question) = placing.next_question(Instant::now()) else {
                placing = self.asked.wait(placing).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(placing);
            let begun = Instant::now();
            let answer = committed(consumer, &self.topic, question.partition, question.patience);
            if let Err(error) = &answer {
                tracing::debug!(%error, partition = question.partition, "its offset is not to be had yet");
            }
            let own =
                answer.ok().filter(|committed| !self.identity.is_foreign(question.partition, committed));
            if let Some(committed) = &own {
                self.identity.note_published(question.partition, committed);
            }
            let failed = own.is_none();
            self.change(|placing| placing.answered(question, own.map(|committed| committed.offset)));
            if failed && question.again {
                let behind = onlooker.behind(question.partition).ok();
                self.change(|placing| placing.set_behind(question, behind));
            }
            placing = self.lock();
            while let Some(overdue) = placing.overdue(Instant::now()) {
                let reason = match overdue.behind {
                    Some(_) => "an open transaction holds its offset up (kafka-transactions.sh names it)",
                    None => "the group's coordinator does not tell its offset",
                };
                tracing::warn!(
                    partition = overdue.partition,
                    seconds = overdue.held.as_secs(),
                    records = overdue.behind,
                    "a partition is assigned and not read: {reason}"
                );
            }
            // One that fails at once does not get the next question at once.
            let rest = question.patience.saturating_sub(begun.elapsed());
            if failed && !placing.is_closed() && !rest.is_zero() {
                let waited = self.asked.wait_timeout(placing, rest);
                placing = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Ends [`Self::keep_asking`].
    pub(super) fn stop_asking(&self) {
        self.lock().close();
        self.asked.notify_all();
    }

    /// Whether a partition may be known at any moment.
    pub(super) fn is_asking(&self) -> bool {
        self.look(Placing::is_asking)
    }

    /// Pauses, or resumes, the partitions that are read.
    pub(super) fn set_paused(&self, consumer: &DocumentsConsumer, pause: bool) {
        let placed = self.list(&self.placed());
        let changed = if pause { consumer.pause(&placed) } else { consumer.resume(&placed) };
        if let Err(error) = changed {
            tracing::warn!(%error, pause, "cannot pause or resume; trying again with the next record");
        }
    }

    /// The partitions that are read, and where each began.
    pub(super) fn begun(&self) -> Vec<(i32, Offset)> {
        self.look(Placing::placed)
    }

    fn placed(&self) -> Vec<i32> {
        self.begun().into_iter().map(|(partition, _)| partition).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Placing> {
        self.placing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look<T>(&self, at: impl FnOnce(&Placing) -> T) -> T {
        at(&self.lock())
    }

    /// Changes what is placed, and shows how much is and how much is not.
    fn change(&self, change: impl FnOnce(&mut Placing)) {
        let mut placing = self.lock();
        change(&mut placing);
        let (placed, unplaced) = (placing.placed().len(), placing.unplaced());
        self.reading.set_down(placed + unplaced == 0);
        self.settled.set_down(placed == 0 && unplaced > 0);
        self.metrics.assigned_partitions.set(placed as i64);
        self.metrics.unplaced_partitions.set(unplaced as i64);
    }

    fn list(&self, partitions: &[i32]) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for &partition in partitions {
            list.add_partition(&self.topic, partition);
        }
        list
    }
}

fn numbers(list: &TopicPartitionList) -> Vec<i32> {
    list.elements().iter().map(TopicPartitionListElem::partition).collect()
}
