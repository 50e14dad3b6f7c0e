//! Exactly once: records and offsets in one transaction, and what becomes of one that does not come to its end.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::anyhow;
use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::producer::Producer as _;

use super::error::{Failure, Verdict, classify, is_fenced, is_fenced_by_group};
use super::producer::{Client, Unanswered, wait_delivered};
use super::{CALL, Sink, Suspects, new_producer};
use crate::exit::{ExitError, FENCED};
use crate::health::Loop;
use crate::kafka;
use crate::ledger::{Group, Ledger};
use crate::metrics::{FENCED_BY_GROUP, FENCED_BY_PRODUCER};
use crate::outcome::Outcome;

/// How long a call may take that waits for the broker's word: each resumed one is a chance for the client to lose its
/// place.
const TRANSACTION_CALL: Duration = Duration::from_secs(30);
/// How long it may take before its silence is worth a word.
const SILENCE: Duration = Duration::from_secs(10);
/// Aborts in a row for the same reason that pass for an accident.
const ABORTS_MAX: usize = 10;
const STUCK: &str = "the Kafka client does not return from a call";
/// Wait between an aborted transaction and the next try.
const ABORT_WAIT: Duration = Duration::from_millis(200);

/// Aborted transactions in a row that have the same reason.
#[derive(Debug, Default)]
struct Aborts {
    /// The client's word for it; none where it was not the brokers that refused.
    reason: Option<RDKafkaErrorCode>,
    in_a_row: usize,
}

impl Aborts {
    /// Counts one more; how many of its kind there have been.
    fn count(&mut self, error: &anyhow::Error) -> usize {
        let reason = error.downcast_ref().and_then(KafkaError::rdkafka_error_code);
        if reason != self.reason {
            *self = Self { reason, in_a_row: 0 };
        }
        self.in_a_row += 1;
        self.in_a_row
    }
}

impl Sink<'_> {
    /// Takes over the transactional id: what an earlier producer with the same one left open is aborted, and what it has
    /// sent and nobody has heard of since is refused.
    pub(super) fn resolve_open_transaction(&self) -> Result<(), Failure> {
        self.ask_coordinator(Client::init_transactions).map_err(|failure| match failure {
            Failure::GivenUp => failure,
            failure => Failure::Fatal(failure.into_error().context("cannot begin with transactions")),
        })?;
        self.fences_itself.set(self.producer.take_doubt());
        Ok(())
    }

    /// Goes on with a new producer. What the old one has left open is aborted.
    fn replace_producer(&mut self, reason: &str) -> Result<(), Failure> {
        if let Some(others) = self.notices.due("producer") {
            tracing::warn!(others_since_last_warning = others, "{reason}; going on with a new producer");
        }
        self.metrics.producers_replaced.inc();
        self.producer = new_producer(self.config, &self.topics)?;
        self.resolve_open_transaction()
    }

    /// Begins no transaction under the epoch of one of which a request may still be under way: a commit that arrives so
    /// late would be taken for that of the new one (ADR 25).
    fn settle_doubts(&mut self) -> Result<(), Failure> {
        if self.producer.take_doubt() {
            self.replace_producer("a request of an earlier transaction may still be under way")?;
        }
        Ok(())
    }

    /// Records and offsets in one transaction, begun only now that everything is scored. After an abort the same
    /// outcomes go into another, less those whose partition was taken away meanwhile.
    pub(super) fn deliver_exactly_once(&mut self, group: &mut Group<Outcome>) -> Result<(), Failure> {
        let mut suspects = HashSet::new();
        let mut aborts = Aborts::default();
        loop {
            self.ledger.drop_revoked(group);
            if group.is_empty() {
                return Ok(());
            }
            if self.is_futile() {
                return Err(Failure::GivenUp);
            }
            self.settle_doubts()?;
            match self.transaction(group, &suspects) {
                Ok(()) => {
                    self.metrics.commits.inc();
                    if self.publishing.set_down(false) {
                        tracing::info!("what is published is taken again");
                    }
                    return Ok(());
                }
                Err(Failure::Aborted(error)) => {
                    self.metrics.aborts.inc();
                    self.complain_of(&error, aborts.count(&error));
                    match self.ask_coordinator(Client::abort_transaction) {
                        Err(Failure::Stuck) => self.replace_producer(STUCK)?,
                        Err(failure) => self.outlive(failure)?,
                        Ok(()) => {}
                    }
                    self.sort_out_refused(group, &mut suspects)?;
                    std::thread::sleep(ABORT_WAIT);
                }
                Err(Failure::Stuck) => self.replace_producer(STUCK)?,
                Err(failure) => self.outlive(failure)?,
            }
        }
    }

    /// Goes on with a new producer where the brokers have given up a transaction, and nobody knows of a commit. After one
    /// that was asked for, the group's offsets alone say what came of it, and they are read at the start.
    fn outlive(&mut self, failure: Failure) -> Result<(), Failure> {
        match failure {
            Failure::Outlived(error) if !self.commit_asked.get() => {
                self.metrics.aborts.inc();
                self.replace_producer(&format!("{error:#}"))
            }
            failure => Err(failure),
        }
    }

    /// Says that a transaction was aborted, for the same reason as those before it where there are more than one.
    fn complain_of(&self, error: &anyhow::Error, in_a_row: usize) {
        let error = format!("{error:#}");
        if in_a_row < ABORTS_MAX {
            tracing::info!(error, in_a_row, "transaction aborted; trying again");
            return;
        }
        self.publishing.set_down(true);
        if let Some(others) = self.notices.due("aborts") {
            tracing::error!(
                error,
                in_a_row,
                others_since_last_warning = others,
                "transactions are aborted again and again for the same reason; nothing is published until it is gone"
            );
        }
    }

    fn transaction(&self, group: &mut Group<Outcome>, suspects: &Suspects) -> Result<(), Failure> {
        self.begin()?;
        for index in 0..group.len() {
            self.send(group, index, suspects)?;
        }
        let id = self.topic_id();
        let offsets = self.offsets(&Ledger::commit_points(group), id);
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
        let goes_on = |waited| self.waits_on(waited);
        self.insist(|| self.producer.send_offsets(&offsets, &membership, TRANSACTION_CALL, goes_on))?;
        wait_delivered(&self.producer.client, CALL);
        self.check_scored_topic()?;
        self.commit_asked.set(true);
        let committed = self.ask_coordinator(|client, timeout| {
            wait_delivered(client, CALL);
            client.commit_transaction(timeout)
        });
        committed.map_err(|failure| match failure {
            // Nobody knows whether it was committed, but for the group's offsets after the next start.
            Failure::Stuck => Failure::Fatal(failure.into_error().context("a commit has no answer")),
            failure => failure,
        })
    }

    /// Begins a transaction. No broker is asked, and yet it has been seen never to return after the client had failed for
    /// good (confluentinc/librdkafka issue 4420).
    fn begin(&self) -> Result<(), Failure> {
        if let Some((code, reason)) = self.producer.client.client().fatal_error() {
            return Err(self.judge_fatal(is_fenced(code), anyhow!("{code}; {reason}")));
        }
        self.begun.set(Some(SystemTime::now()));
        self.commit_asked.set(false);
        self.insist(|| self.producer.call(CALL, |_| self.goes_on(), |client, _| client.begin_transaction()))
    }

    /// Makes a call that the transactions coordinator must answer, until it does.
    fn ask_coordinator(
        &self,
        call: impl FnOnce(&Client, Duration) -> KafkaResult<()> + Copy + Send + 'static,
    ) -> Result<(), Failure> {
        let goes_on = |waited| self.waits_on(waited);
        let begun = Instant::now();
        self.insist(|| self.producer.call(TRANSACTION_CALL, goes_on, call))?;
        if begun.elapsed() > kafka::request_timeout(&self.config.kafka) {
            self.producer.doubt();
        }
        if self.coordinator.set_down(false) {
            tracing::info!("the transactions coordinator answers");
        }
        Ok(())
    }

    /// Makes one call again and again while its error is one that passes, and somebody waits for its outcome.
    pub(super) fn insist(
        &self,
        call: impl Fn() -> Result<KafkaResult<()>, Unanswered>,
    ) -> Result<(), Failure> {
        loop {
            self.health.beat(Loop::Sink);
            let answer = call().map_err(|unanswered| match unanswered {
                Unanswered::Stuck => Failure::Stuck,
                Unanswered::GivenUp => Failure::GivenUp,
            })?;
            let Err(error) = answer else { return Ok(()) };
            if classify(&error) != Verdict::Retry {
                return Err(self.judge(error));
            }
            if self.is_futile() {
                return Err(Failure::GivenUp);
            }
            self.producer.doubt();
            if let Some(others) = self.notices.due("publishing") {
                tracing::warn!(
                    %error,
                    others_since_last_warning = others,
                    "the brokers do not confirm what is published; trying again"
                );
            }
        }
    }

    /// Whether a call is waited for any longer.
    fn goes_on(&self) -> bool {
        self.health.beat(Loop::Sink);
        !self.is_futile()
    }

    /// The same of one that has had no answer of the coordinator for so long.
    fn waits_on(&self, waited: Duration) -> bool {
        if waited >= SILENCE {
            self.coordinator.set_down(true);
            if let Some(others) = self.notices.due("coordinator") {
                tracing::warn!(
                    others_since_last_warning = others,
                    "the transactions coordinator does not answer; waiting for it"
                );
            }
        }
        self.goes_on()
    }

    /// Whether nothing that is published now would be of use.
    fn is_futile(&self) -> bool {
        self.health.is_aborted() || self.ledger.is_finished()
    }

    pub(super) fn judge(&self, error: KafkaError) -> Failure {
        if is_fenced_by_group(&error) {
            self.metrics.fences.with_label_values(&[FENCED_BY_GROUP]).inc();
        }
        match classify(&error) {
            Verdict::Abort | Verdict::Retry => Failure::Aborted(error.into()),
            Verdict::Fatal => self.judge_fatal(false, error.into()),
            Verdict::Fenced => self.judge_fatal(true, error.into()),
        }
    }

    /// What an error means after which the producer is of no more use.
    ///
    /// Brokers fence a producer off when another one has its transactional id, and they give up a transaction that was open
    /// for too long, with its producer: that of a daemon that was suspended, or cut off from its coordinator. There another
    /// producer helps. Against another daemon of the same name nothing helps but a person.
    fn judge_fatal(&self, fenced: bool, error: anyhow::Error) -> Failure {
        if fenced {
            self.metrics.fences.with_label_values(&[FENCED_BY_PRODUCER]).inc();
        }
        let timeout = kafka::transaction_timeout(&self.config.kafka).unwrap_or_default();
        let open = self.begun.get().and_then(|begun| begun.elapsed().ok()).unwrap_or_default();
        if open >= timeout {
            let open = open.as_secs();
            return Failure::Outlived(
                error.context(format!("the brokers have given up a transaction that was open for {open} s")),
            );
        }
        if !fenced {
            return Failure::Fatal(error.context("the producer failed for good"));
        }
        Failure::Fatal(self.fenced(error))
    }

    /// A new start helps where this daemon's own request for its transactional id was made twice and arrived a second time.
    fn fenced(&self, error: anyhow::Error) -> anyhow::Error {
        let id = kafka::transactional_id(&self.config.kafka);
        if self.fences_itself.get() {
            return error.context(format!(
                "the brokers take this daemon's producer for an older one: its request for the transactional id `{id}` was \
                 repeated, and may have arrived once more; the next start reads again what was not committed"
            ));
        }
        let error = error.context(format!(
            "another daemon has taken over the transactional id `{id}`; give every daemon its own kafka.instance"
        ));
        ExitError { code: FENCED, error }.into()
    }
}
