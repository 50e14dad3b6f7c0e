//! Partitions that come and go: what the client does to begin reading them, and what becomes of what is in flight.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList, TopicPartitionListElem};
use rdkafka::types::RDKafkaRespErr;

use super::broker::Broker;
use super::placing::Placing;
use crate::config::Config;
use crate::health::{Condition, Health, Latch, Wait};
use crate::kafka::{DocumentsConsumer, GroupHooks, Hooks};
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::outcome::Outcome;

/// What librdkafka calls a partition that it reads.
const FETCHING: &str = "active";
/// How long one try may take to learn where to begin reading.
const PLACE_TIMEOUT: Duration = Duration::from_secs(2);

/// The partitions of this member of the group, and what its client says beside them.
pub(super) struct Assignment {
    topic: String,
    ledger: Arc<Ledger<Outcome>>,
    metrics: Metrics,
    health: Health,
    drain: Duration,
    placing: Mutex<Placing>,
    /// Held until the group has spoken for the first time.
    joining: Mutex<Option<Latch>>,
    /// Down while no partition is read.
    reading: Condition,
    broker: Broker,
}

impl Hooks for Assignment {
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
        self.metrics.consumer_lag.set(lag as i64);
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
        // Here and nowhere else, for the start of the daemon is over with it.
        *self.joining.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
            joining,
            reading,
            broker: Broker::new(&health),
            health,
        }
    }

    /// What was last heard of the brokers.
    pub(super) fn broker(&self) -> &Broker {
        &self.broker
    }

    /// Takes partitions over, each at the group's committed offset, or at its beginning where there is none.
    ///
    /// Not left to the client, which begins a partition anew when a rebalance comes while its offset is held up by an
    /// open transaction (librdkafka 2.12, `rd_kafka_assignment_apply_offsets`): thousands of documents came twice. Here
    /// such a partition is not read until [`Self::place_held`] knows where.
    fn assigned(&self, consumer: &DocumentsConsumer, list: &mut TopicPartitionList) -> KafkaResult<()> {
        let partitions = numbers(list);
        tracing::info!(?partitions, "partitions assigned");
        self.change(|placing| placing.ask(&partitions));
        let settled = self.committed_offsets(consumer, &partitions).unwrap_or_else(|error| {
            tracing::debug!(%error, "committed offsets are not to be had yet");
            HashMap::new()
        });
        self.change(|placing| placing.answered(&settled));
        let taken = partitions.iter().try_for_each(|partition| {
            // Any offset for one that is not known, but none that the client would have to ask for: the answer could come
            // after the true one.
            let begin = settled.get(partition).copied().unwrap_or(Offset::Offset(0));
            list.set_partition_offset(&self.topic, *partition, begin)
        });
        let taken = taken.and_then(|()| consumer.incremental_assign(list));
        taken.inspect_err(|_| self.change(|placing| placing.give_up(&partitions)))?;
        self.begin(&settled);
        // A pause outlives the assignment it was made in: the client would never read these, and nobody would know.
        // Where the budget is used up, the first record that comes has them paused again.
        consumer.resume(list)?;
        let unplaced: Vec<i32> =
            partitions.into_iter().filter(|partition| !settled.contains_key(partition)).collect();
        if unplaced.is_empty() { Ok(()) } else { consumer.pause(&self.list(&unplaced)) }
    }

    fn revoked(&self, consumer: &DocumentsConsumer, list: &TopicPartitionList) -> KafkaResult<()> {
        let partitions = numbers(list);
        // What is being scored can still be committed, unless the group has already given it to another, or nobody is
        // left to commit it.
        self.ledger.forget_unbegun(&partitions);
        let drained = !consumer.assignment_lost()
            && !self.health.is_aborted()
            && self.ledger.wait_drained(&partitions, self.drain);
        tracing::info!(?partitions, drained, "partitions revoked");
        self.change(|placing| placing.give_up(&partitions));
        self.ledger.revoke(partitions);
        consumer.incremental_unassign(list)
    }

    /// Goes on with partitions whose committed offset was not to be had when they were assigned, as far as it is now.
    pub(super) fn place_held(&self, consumer: &DocumentsConsumer) -> KafkaResult<()> {
        let unplaced = self.look(Placing::unplaced);
        for (partition, offset) in self.committed_offsets(consumer, &unplaced)? {
            consumer.seek(&self.topic, partition, offset, PLACE_TIMEOUT)?;
            consumer.resume(&self.list(&[partition]))?;
            self.begin(&HashMap::from([(partition, offset)]));
            tracing::info!(partition, ?offset, "reading begins, now that its offset is settled");
        }
        Ok(())
    }

    /// Pauses, or resumes, the partitions that are read. The others are paused until they are placed.
    pub(super) fn set_paused(&self, consumer: &DocumentsConsumer, pause: bool) {
        let placed = self.list(&self.look(Placing::placed));
        let changed = if pause { consumer.pause(&placed) } else { consumer.resume(&placed) };
        if let Err(error) = changed {
            tracing::warn!(%error, pause, "cannot pause or resume; trying again with the next record");
        }
    }

    /// Partitions that are not read yet, because their offset was asked for in vain.
    pub(super) fn held(&self) -> Vec<i32> {
        self.look(Placing::held)
    }

    /// Notes that partitions are read, each from its offset on.
    fn begin(&self, offsets: &HashMap<i32, Offset>) {
        self.ledger.assign(offsets.keys().copied());
        self.change(|placing| {
            for (&partition, &offset) in offsets {
                placing.place(partition, offset);
            }
        });
    }

    fn look<T>(&self, at: impl FnOnce(&Placing) -> T) -> T {
        at(&self.placing.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes what is placed, and shows how many are.
    fn change(&self, change: impl FnOnce(&mut Placing)) {
        let mut placing = self.placing.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut placing);
        let placed = placing.placed().len();
        self.reading.set_down(placed == 0);
        self.metrics.assigned_partitions.set(placed as i64);
    }

    /// Where to begin reading each of `partitions`, less those whose offset an open transaction holds up.
    fn committed_offsets(
        &self,
        consumer: &DocumentsConsumer,
        partitions: &[i32],
    ) -> KafkaResult<HashMap<i32, Offset>> {
        if partitions.is_empty() {
            return Ok(HashMap::new());
        }
        let committed = consumer.committed_offsets(self.list(partitions), PLACE_TIMEOUT)?;
        let settled = committed.elements().into_iter().filter(|element| element.error().is_ok());
        Ok(settled
            .map(|element| match element.offset() {
                Offset::Offset(offset) => (element.partition(), Offset::Offset(offset)),
                _ => (element.partition(), Offset::Beginning),
            })
            .collect())
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
