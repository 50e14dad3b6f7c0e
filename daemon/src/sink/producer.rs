//! The producer: hands records to librdkafka and collects the broker's word on each.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use rdkafka::ClientConfig;
use rdkafka::consumer::ConsumerGroupMetadata;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{DeliveryResult, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use rdkafka::topic_partition_list::TopicPartitionList;
use sluice_kafka::TopicIds;

use super::error::is_queue_full;
use crate::kafka::{self, Hooks};

const QUEUE_FULL_WAIT: Duration = Duration::from_millis(10);
/// How often the client is asked whether everything is delivered.
const DELIVERY_TURN: Duration = Duration::from_millis(1);
/// How long after its timeout a call into librdkafka is taken never to return.
const OVERDUE: Duration = Duration::from_secs(5);
/// How often the caller of a call that takes long is asked whether it is still waited for.
const TURN: Duration = Duration::from_secs(1);

/// Why a call into librdkafka is waited for no more; its producer is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// It has not returned long after its timeout.
    Stuck,
    /// Whoever made it does not want the answer any more.
    GivenUp,
}

/// librdkafka's producer.
pub type Client = ThreadedProducer<Context>;

/// What the client hears from the brokers, and what it waits for in vain.
#[derive(Debug, Default)]
pub struct Answers {
    /// The records that the broker did not take, each by its index in the group.
    refused: Mutex<Vec<(usize, KafkaError)>>,
    /// A request may still be under way that nobody waits for any more.
    unanswered: AtomicBool,
    /// Which topics it writes to. Producers that follow on each other share them.
    topics: Arc<TopicIds>,
}

impl Hooks for Answers {
    fn log(&self, facility: &str, message: &str) {
        self.topics.hear(facility, message);
        if leaves_unanswered(facility, message) {
            self.unanswered.store(true, Ordering::SeqCst);
        }
    }
}

/// Whether a line of librdkafka's log (2.12: `rd_kafka_broker_set_error`, `rd_kafka_broker_timeout_scan`) says that
/// requests have lost their connection, or that their time is up. It sends them once more by itself and says so nowhere
/// else. A connection that was never made has carried none, and the first one to a broker, which is closed once all brokers
/// are known, none of a transaction.
fn leaves_unanswered(facility: &str, message: &str) -> bool {
    const FIRST: &str = "/bootstrap: ";
    const MADE: [&str; 2] = ["in state UP", "in state REAUTH"];
    match facility {
        _ if message.contains(FIRST) => false,
        "REQTMOUT" => true,
        // A long line has lost its end, with the state.
        "FAIL" => !message.contains("in state ") || MADE.iter().any(|state| message.contains(state)),
        _ => false,
    }
}

/// The client's callbacks.
pub type Context = kafka::Context<Answers>;

impl ProducerContext for Context {
    /// Index of the record in its group.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        if let Err((error, _)) = result {
            let mut refused = self.hooks().refused.lock().unwrap_or_else(PoisonError::into_inner);
            refused.push((index, error.clone()));
        }
    }
}

/// A producer with a thread of its own that serves its callbacks.
pub struct RecordProducer {
    /// librdkafka's producer.
    pub client: Client,
}

impl RecordProducer {
    /// A producer with these settings, which tells of the ids of `topics`.
    pub fn new(settings: &ClientConfig, topics: &Arc<TopicIds>) -> KafkaResult<Self> {
        let answers = Answers { topics: Arc::clone(topics), ..Answers::default() };
        Ok(Self { client: settings.create_with_context(Context::new(answers))? })
    }

    /// Hands a record over, waiting while the client's queue is full.
    pub fn send(
        &self,
        topic: &str,
        index: usize,
        key: Option<&[u8]>,
        payload: Option<&[u8]>,
        headers: OwnedHeaders,
    ) -> KafkaResult<()> {
        let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(topic, index).headers(headers);
        record.key = key;
        record.payload = payload;
        loop {
            match self.client.send(record) {
                Ok(()) => return Ok(()),
                Err((error, returned)) if is_queue_full(&error) => {
                    record = returned;
                    std::thread::sleep(QUEUE_FULL_WAIT);
                }
                Err((error, _)) => return Err(error),
            }
        }
    }

    /// Makes a call of a transaction, which should take no longer than `timeout`. Every second meanwhile, `goes_on` hears
    /// for how long it has been waited for, and says whether to wait on.
    ///
    /// On a thread of its own, because librdkafka may wait without end for a group coordinator that was restarted,
    /// whatever the timeout (confluentinc/librdkafka issues 5456 and 5511), and because a stop is not to wait for a
    /// coordinator that is gone. The producer can be left alone then: the next one of its transactional id fences it.
    pub fn call(
        &self,
        timeout: Duration,
        goes_on: impl Fn(Duration) -> bool,
        call: impl FnOnce(&Client, Duration) -> KafkaResult<()> + Send + 'static,
    ) -> Result<KafkaResult<()>, Unanswered> {
        let (answer, answered) = bounded(1);
        let client = self.client.clone();
        std::thread::spawn(move || {
            // Nobody listens any more where the answer came too late.
            let _ = answer.send(call(&client, timeout));
        });
        let begun = Instant::now();
        let deadline = begun + timeout + OVERDUE;
        loop {
            match answered.recv_deadline(deadline.min(Instant::now() + TURN)) {
                Ok(result) => return Ok(result),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {
                    if !goes_on(begun.elapsed()) {
                        return Err(Unanswered::GivenUp);
                    }
                }
                Err(_) => return Err(Unanswered::Stuck),
            }
        }
    }

    /// Enters offsets into the open transaction; see [`Self::call`].
    pub fn send_offsets(
        &self,
        offsets: &TopicPartitionList,
        membership: &Arc<ConsumerGroupMetadata>,
        timeout: Duration,
        goes_on: impl Fn(Duration) -> bool,
    ) -> Result<KafkaResult<()>, Unanswered> {
        let (offsets, membership) = (offsets.clone(), Arc::clone(membership));
        self.call(timeout, goes_on, move |client, timeout| {
            client.send_offsets_to_transaction(&offsets, &membership, timeout)
        })
    }

    /// The records refused since the last call.
    pub fn refused(&self) -> Vec<(usize, KafkaError)> {
        let answers = self.client.context().hooks();
        std::mem::take(&mut *answers.refused.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes that a request may still be under way.
    pub fn doubt(&self) {
        self.client.context().hooks().unanswered.store(true, Ordering::SeqCst);
    }

    /// Whether a request may have been under way since this was asked last that nobody waited for.
    pub fn take_doubt(&self) -> bool {
        self.client.context().hooks().unanswered.swap(false, Ordering::SeqCst)
    }
}

/// Waits until the broker's word on every record has come.
///
/// Before [`Producer::flush`] and a commit, which wait in steps of a tenth of a second where the client's own thread serves
/// the deliveries: as long as all the rest of a transaction takes.
pub fn wait_delivered(client: &Client, timeout: Duration) {
    let deadline = Instant::now() + timeout;
    while client.in_flight_count() > 0 && Instant::now() < deadline {
        std::thread::sleep(DELIVERY_TURN);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use rdkafka::consumer::{BaseConsumer, Consumer as _};
    use rdkafka::mocking::{MockCluster, MockCoordinator};
    use rdkafka::topic_partition_list::Offset;

    use super::*;

    const CALL: Duration = Duration::from_secs(1);
    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn a_connection_that_was_never_made_leaves_nothing_unanswered() {
        let lines = [
            ("FAIL", "Disconnected (after 2012ms in state UP) (_TRANSPORT)", true),
            ("FAIL", "1 request(s) timed out: disconnect (after 9ms in state REAUTH) (_TIMED_OUT)", true),
            ("REQTMOUT", "Timed out EndTxnRequest in flight (after 2003ms, timeout #0)", true),
            ("FAIL", "[thrd:a:9/bootstrap]: a:9/bootstrap: Decommissioning (after 7ms in state UP)", false),
            ("FAIL", "Connect to ipv4#127.0.0.1:9 failed: refused (after 0ms in state CONNECT)", false),
            ("STATE", "Broker changed state TRY_CONNECT -> CONNECT", false),
        ];
        for (facility, line, expected) in lines {
            assert_eq!(leaves_unanswered(facility, line), expected, "{line}");
        }
    }

    /// What made a soak of 300 faults stop: the group's coordinator is down, and the call knows no end.
    #[test]
    #[allow(clippy::unwrap_used)]
    fn a_call_that_never_returns_is_given_up_and_another_producer_goes_on() {
        let cluster = MockCluster::new(2).unwrap();
        cluster.create_topic("documents", 1, 1).unwrap();
        cluster.coordinator(MockCoordinator::Transaction("group-0".to_owned()), 1).unwrap();
        cluster.coordinator(MockCoordinator::Group("group".to_owned()), 2).unwrap();
        let mut settings = ClientConfig::new();
        settings.set("bootstrap.servers", cluster.bootstrap_servers());
        let consumer: BaseConsumer = settings.clone().set("group.id", "group").create().unwrap();
        let membership = Arc::new(consumer.group_metadata().unwrap());
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset("documents", 0, Offset::Offset(1)).unwrap();
        settings.set("transactional.id", "group-0");

        let first = RecordProducer::new(&settings, &Arc::default()).unwrap();
        first.client.init_transactions(PATIENCE).unwrap();
        first.client.begin_transaction().unwrap();
        cluster.broker_down(2).unwrap();
        let turns = Cell::new(0);
        let outcome = first.send_offsets(&offsets, &membership, CALL, |_| {
            turns.set(turns.get() + 1);
            true
        });
        assert!(matches!(outcome, Err(Unanswered::Stuck) | Ok(Err(_))), "{outcome:?}");
        assert!(turns.get() > 0, "its caller shows signs of life meanwhile");
        drop(first);

        let second = RecordProducer::new(&settings, &Arc::default()).unwrap();
        second.client.init_transactions(PATIENCE).unwrap();
        second.client.begin_transaction().unwrap();
        cluster.broker_up(2).unwrap();
        second.send_offsets(&offsets, &membership, PATIENCE, |_| true).unwrap().unwrap();
        second.client.commit_transaction(PATIENCE).unwrap();
    }
}
