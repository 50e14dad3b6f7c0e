//! A consumer that keeps no offsets at the broker: those belong to the trainer's checkpoints.

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::client::{ClientContext, OAuthToken};
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::metadata::{MetadataPartition, MetadataTopic};
use rdkafka::statistics::Statistics;
use rdkafka::types::{RDKafkaConfRes, RDKafkaErrorCode};
use sluice_kafka::TopicIds;

use super::error::StreamError;
use super::place::Extent;
use crate::observer::{SharedObserver, Unobserved};

/// How long a broker may take to answer the first question.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Ample time to go through the events that came meanwhile.
const QUEUE_SERVED: Duration = Duration::from_millis(100);

/// Bytes librdkafka may fetch ahead of us over all partitions, in KiB.
const FETCHED_AHEAD_KBYTES: &str = "16384";

/// Longest time in milliseconds that the broker holds back an answer without a record, where a topic is followed.
const FETCH_WAIT_FOLLOWED_MS: &str = "100";
/// The same where it is read to its end. Nothing new is waited for there, and one question is about all partitions: one that
/// begins its next pass waits for as long if the others are at their ends.
const FETCH_WAIT_BOUNDED_MS: &str = "10";

/// Settings that the stream's order and offsets rest on; a user cannot override them.
pub const PROPERTIES_OWNED: [&str; 8] = [
    "bootstrap.servers",
    "metadata.broker.list",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.partition.eof",
    "auto.offset.reset",
    "isolation.level",
    "statistics.interval.ms",
];

/// How to reach a broker.
#[derive(Clone)]
pub struct Broker {
    servers: String,
    properties: Vec<(String, String)>,
    observer: SharedObserver,
}

impl Broker {
    /// Brokers at `servers` (`host:port,...`), with further librdkafka settings, of which `NAME.from_file` reads the
    /// value of `NAME` from a file.
    pub fn new(servers: String, properties: Vec<(String, String)>) -> Result<Self, StreamError> {
        if servers.trim().is_empty() {
            return Err(StreamError::Settings("no address of a broker is given".to_owned()));
        }
        let properties: Vec<_> = sluice_kafka::resolve(&properties.into_iter().collect())
            .map_err(StreamError::PropertyFile)?
            .into_iter()
            .collect();
        if let Some((key, _)) = properties.iter().find(|(key, _)| PROPERTIES_OWNED.contains(&key.as_str())) {
            return Err(StreamError::OwnedProperty(key.clone()));
        }
        // Tried here as well, so that a wrong one is found before anything else is done.
        let tried: ClientConfig = properties.iter().cloned().collect();
        tried.create_native_config().map_err(refused)?;
        Ok(Self { servers, properties, observer: Arc::new(Unobserved) })
    }

    /// The same brokers, whose readers tell `observer` what they do.
    #[must_use]
    pub fn observed(self, observer: SharedObserver) -> Self {
        Self { observer, ..self }
    }

    /// Who is told what readers do.
    pub(super) fn observer(&self) -> &SharedObserver {
        &self.observer
    }

    /// The addresses, as given.
    pub fn servers(&self) -> &str {
        &self.servers
    }

    /// A consumer that has heard from a broker, and the partitions of `topic`, ascending.
    pub(super) fn connect(
        &self,
        topic: &str,
        extent: Extent,
    ) -> Result<(BaseConsumer<Listener>, Vec<i32>), StreamError> {
        let mut config = ClientConfig::new();
        // Manual assignment needs a group id in librdkafka, but no group is joined and nothing is committed.
        config.set("group.id", "sluice-train").set("client.id", "sluice-train");
        config.set("queued.max.messages.kbytes", FETCHED_AHEAD_KBYTES);
        let is_followed = extent == Extent::Follow;
        let fetch_wait = if is_followed { FETCH_WAIT_FOLLOWED_MS } else { FETCH_WAIT_BOUNDED_MS };
        config.set("fetch.wait.max.ms", fetch_wait);
        for (key, value) in &self.properties {
            config.set(key, value);
        }
        config
            .set("bootstrap.servers", &self.servers)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            // A record that retention has removed must be an error, never a silent jump.
            .set("auto.offset.reset", "error")
            .set("isolation.level", "read_committed")
            // How often the lag is worked out.
            .set("statistics.interval.ms", "1000");
        sluice_kafka::listen(&mut config, sluice_kafka::DEBUG_METADATA);
        let listener = Listener::new(Arc::clone(&self.observer));
        let consumer: BaseConsumer<Listener> = config.create_with_context(listener).map_err(refused)?;
        let metadata = consumer.fetch_metadata(Some(topic), CONNECT_TIMEOUT).map_err(|error| {
            // What the broker threads had to say is in the queue among statistics, and nobody has polled it yet.
            let served = Instant::now() + QUEUE_SERVED;
            while Instant::now() < served {
                let _ = consumer.poll(QUEUE_SERVED);
            }
            self.failed(topic, error, consumer.context().last_error())
        })?;
        let refusal = metadata.topics().iter().find_map(MetadataTopic::error).map(RDKafkaErrorCode::from);
        match refusal {
            None | Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {}
            Some(code) => {
                let error = KafkaError::MetadataFetch(code);
                return Err(self.failed(topic, error, consumer.context().last_error()));
            }
        }
        let mut partitions: Vec<i32> =
            metadata.topics().iter().flat_map(MetadataTopic::partitions).map(MetadataPartition::id).collect();
        partitions.sort_unstable();
        if partitions.is_empty() {
            return Err(StreamError::NoSuchTopic { topic: topic.to_owned(), servers: self.servers.clone() });
        }
        Ok((consumer, partitions))
    }

    /// First and past-the-last offset of a partition, as a reader of committed records sees them now.
    pub(super) fn watermarks(
        &self,
        consumer: &BaseConsumer<Listener>,
        topic: &str,
        partition: i32,
    ) -> Result<(i64, i64), StreamError> {
        consumer
            .fetch_watermarks(topic, partition, CONNECT_TIMEOUT)
            .map_err(|error| self.failed(topic, error, consumer.context().last_error()))
    }

    /// What an error of the client means for a reader of `topic`.
    pub(super) fn failed(&self, topic: &str, error: KafkaError, reason: Option<String>) -> StreamError {
        let unreachable = matches!(
            error.rdkafka_error_code(),
            Some(
                RDKafkaErrorCode::BrokerTransportFailure
                    | RDKafkaErrorCode::OperationTimedOut
                    | RDKafkaErrorCode::AllBrokersDown
                    | RDKafkaErrorCode::Resolve
            )
        );
        if is_unknown_topic(&error) {
            StreamError::NoSuchTopic { topic: topic.to_owned(), servers: self.servers.clone() }
        } else if unreachable {
            let seconds = CONNECT_TIMEOUT.as_secs();
            StreamError::Unreachable { servers: self.servers.clone(), seconds, reason }
        } else {
            StreamError::Broker { topic: topic.to_owned(), error: Box::new(error), reason }
        }
    }
}

/// Whether the broker said that it has no such topic.
fn is_unknown_topic(error: &KafkaError) -> bool {
    let code = error.rdkafka_error_code();
    // A topic that was deleted has partitions that are not known any more.
    matches!(
        code,
        Some(
            RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::UnknownPartition
        )
    )
}

/// Errors that librdkafka recovers from by itself.
pub(super) fn is_transient(error: &KafkaError) -> bool {
    !matches!(error, KafkaError::MessageConsumptionFatal(_))
        && !matches!(
            error.rdkafka_error_code(),
            Some(
                RDKafkaErrorCode::AutoOffsetReset
                    | RDKafkaErrorCode::OffsetOutOfRange
                    | RDKafkaErrorCode::UnknownTopic
                    | RDKafkaErrorCode::UnknownTopicOrPartition
                    | RDKafkaErrorCode::UnknownPartition
                    | RDKafkaErrorCode::TopicAuthorizationFailed
                    | RDKafkaErrorCode::Authentication
                    | RDKafkaErrorCode::SaslAuthenticationFailed
            )
        )
}

/// Why a client was not made. The words of [`KafkaError::ClientConfig`] hold the property's value, which may be a
/// secret (a mistyped `sasl.password` is one), so only its name is taken over.
fn refused(error: KafkaError) -> StreamError {
    match error {
        KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, _, key, _) => {
            StreamError::UnknownProperty(key)
        }
        KafkaError::ClientConfig(_, _, key, _) => StreamError::PropertyValue(key),
        KafkaError::ClientCreation(reason) => StreamError::Settings(reason),
        other => StreamError::Settings(other.to_string()),
    }
}

/// Remembers the last complaint of librdkafka, which its error codes leave out, and which topic is read, and works out the
/// lag.
#[derive(Debug)]
pub(super) struct Listener {
    last_error: Mutex<Option<String>>,
    /// Which topic is read.
    topics: Arc<TopicIds>,
    observer: SharedObserver,
    /// Records not read yet, as this reader last entered them.
    lag: Mutex<i64>,
}

impl Listener {
    fn new(observer: SharedObserver) -> Self {
        Self { last_error: Mutex::default(), observer, lag: Mutex::default(), topics: Arc::default() }
    }

    /// Which topics the client has heard of.
    pub(super) fn topics(&self) -> &Arc<TopicIds> {
        &self.topics
    }

    /// Fails where `topic` is not the one any more that was read.
    pub(super) fn check_topic(&self, topic: &str) -> Result<(), StreamError> {
        match self.topics.made_anew(topic) {
            Some(made_anew) => Err(StreamError::MadeAnew { topic: topic.to_owned(), made_anew }),
            None => Ok(()),
        }
    }

    pub(super) fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn enter_lag(&self, lag: i64) {
        let mut entered = self.lag.lock().unwrap_or_else(PoisonError::into_inner);
        self.observer.lag(lag - std::mem::replace(&mut *entered, lag));
    }

    fn remember(&self, message: &str) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(message.to_owned());
    }
}

impl ClientContext for Listener {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, config: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        Ok(sluice_kafka::oauth_token(config)?)
    }

    fn stats(&self, statistics: Statistics) {
        let partitions = statistics.topics.values().flat_map(|topic| topic.partitions.values());
        let unread = partitions
            .filter(|partition| partition.app_offset >= 0 || partition.next_offset >= 0)
            .map(|partition| {
                // What was fetched and filtered, such as the marks of transactions, is never handed out.
                let is_drained = partition.fetchq_cnt == 0 && partition.fetch_state == "active";
                let fetched = if is_drained { partition.next_offset } else { 0 };
                (partition.ls_offset - partition.app_offset.max(fetched)).max(0)
            });
        self.enter_lag(unread.sum());
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.topics.hear(facility, message);
        // What it says for the topics' sake would drown the rest.
        if level as i32 >= RDKafkaLogLevel::Debug as i32 {
            return;
        }
        tracing::debug!(facility, ?level, "librdkafka: {message}");
        if level as i32 <= RDKafkaLogLevel::Error as i32 {
            self.remember(message);
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, "librdkafka: {reason}");
        // "1/1 brokers are down" says less than what came before it.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            self.remember(reason);
        }
    }
}

impl ConsumerContext for Listener {}

impl Drop for Listener {
    fn drop(&mut self) {
        self.enter_lag(0);
    }
}
