//! Partitions that come and go: where to begin reading them, and what becomes of what is in flight.

use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::client::{ClientContext, OAuthToken};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;

use super::{DocumentsConsumer, broker_is_down};
use crate::config::Config;
use crate::health::Health;
use crate::kafka::{self, Complaints};
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::outcome::Outcome;

/// What librdkafka calls a partition that it reads.
const FETCHING: &str = "active";
/// How long one try may take to learn where to begin reading.
const PLACE_TIMEOUT: Duration = Duration::from_secs(2);

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
    /// For the consumer of `config`'s documents topic, which has no partitions yet.
    pub(super) fn new(
        config: &Config,
        ledger: Arc<Ledger<Outcome>>,
        metrics: Metrics,
        health: Health,
    ) -> Self {
        Self {
            topic: config.kafka.documents_topic.clone(),
            ledger,
            metrics,
            health,
            drain: config.limits.drain(),
            complaints: Complaints::default(),
            unplaced: Mutex::default(),
        }
    }

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
        self.unplaced().extend(numbers(&unplaced));
        self.ledger.assign(known.into_keys());
        // A pause outlives the assignment it was made in: the client would never read these, and nobody would know.
        // Where the budget is used up, the first record that comes has them paused again.
        consumer.resume(list)?;
        if unplaced.count() > 0 { consumer.pause(&unplaced) } else { Ok(()) }
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
    pub(super) fn place(&self, consumer: &BaseConsumer<Self>) -> KafkaResult<()> {
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
