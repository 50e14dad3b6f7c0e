//! The callbacks that every client of the daemon answers alike, and the hooks by which one does more.

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use rdkafka::client::{ClientContext, OAuthToken};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::ProducerContext;
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::TopicPartitionList;
use rdkafka::types::RDKafkaRespErr;

/// What one client does when librdkafka calls back, beside what all do.
pub trait Hooks: Send + Sync {
    /// Takes the client's figures, where `statistics.interval.ms` asks for them.
    fn statistics(&self, _statistics: &Statistics) {}

    /// Takes a line of the client's log, of whichever level; most clients have nothing to look for in it.
    fn log(&self, _facility: &str, _message: &str) {}

    /// Takes an error first; true where there is nothing more to say about it.
    fn error(&self, _error: &KafkaError, _reason: &str) -> bool {
        false
    }
}

/// Nothing more than all do.
impl Hooks for () {}

impl<H: Hooks + ?Sized> Hooks for Arc<H> {
    fn statistics(&self, statistics: &Statistics) {
        (**self).statistics(statistics);
    }

    fn log(&self, facility: &str, message: &str) {
        (**self).log(facility, message);
    }

    fn error(&self, error: &KafkaError, reason: &str) -> bool {
        (**self).error(error, reason)
    }
}

/// What becomes of partitions that the group gives to its member and takes from it.
pub trait GroupHooks: Hooks {
    /// Takes up, or gives up, the partitions of `list`.
    fn rebalance(&self, consumer: &DocumentsConsumer, kind: RDKafkaRespErr, list: &mut TopicPartitionList);

    /// The id of the topic whose records are read, where the brokers tell one. Offsets are committed with it.
    fn topic_id(&self) -> Option<String>;

    /// A partition below whose committed offset everything was published to another scored topic than that of this id; and
    /// that one's id.
    fn published_elsewhere(&self, scored: &str) -> Option<(i32, String)>;
}

/// A client's callbacks: log lines, complaints and tokens, then its hooks.
#[derive(Debug, Default)]
pub struct Context<H> {
    hooks: H,
    complaints: Complaints,
}

/// Of clients that only ask or create.
pub type PlainContext = Context<()>;

/// The consumer of the documents topic. Reading polls it, and publishing commits through it.
pub type DocumentsConsumer = BaseConsumer<Context<Arc<dyn GroupHooks>>>;

impl<H> Context<H> {
    /// The callbacks of a client with these hooks.
    pub fn new(hooks: H) -> Self {
        Self { hooks, complaints: Complaints::default() }
    }

    /// Whether broker and client have been found not to accept each other.
    pub fn has_complained(&self) -> bool {
        self.complaints.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// What this client does beside what all do.
    pub fn hooks(&self) -> &H {
        &self.hooks
    }
}

impl<H: Hooks> ClientContext for Context<H> {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, config: Option<&str>) -> Result<OAuthToken, Box<dyn Error>> {
        Ok(sluice_kafka::oauth_token(config)?)
    }

    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.hooks.log(facility, message);
        log(level, facility, message);
    }

    fn stats(&self, statistics: Statistics) {
        self.hooks.statistics(&statistics);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        if !self.hooks.error(&error, reason) {
            self.complaints.hear(&error, reason);
        }
    }
}

impl ConsumerContext for PlainContext {}

impl ProducerContext for PlainContext {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

impl ConsumerContext for Context<Arc<dyn GroupHooks>> {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, kind: RDKafkaRespErr, list: &mut TopicPartitionList) {
        self.hooks.rebalance(consumer, kind, list);
    }
}

/// What a client complains of, said once: it tries again and again.
#[derive(Debug, Default)]
struct Complaints(Mutex<Option<String>>);

impl Complaints {
    /// Logs what a person must mend; the rest is for the client to recover from.
    fn hear(&self, error: &KafkaError, reason: &str) {
        let refused = matches!(
            error.rdkafka_error_code(),
            Some(
                RDKafkaErrorCode::Authentication
                    | RDKafkaErrorCode::SaslAuthenticationFailed
                    | RDKafkaErrorCode::SSL
            )
        );
        if !refused {
            tracing::debug!(%error, reason, "kafka client error");
            return;
        }
        // Without the time it took, which differs each time.
        let said = reason.split(" (after").next().unwrap_or(reason);
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_deref() != Some(said) {
            tracing::error!(reason = said, "the broker and this client do not accept each other");
            *last = Some(said.to_owned());
        }
    }
}

/// Passes a line of librdkafka's log on to ours.
fn log(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            tracing::error!(facility, "{message}");
        }
        // librdkafka calls a refused connection an error and tries again; what matters arrives as an event.
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning | RDKafkaLogLevel::Notice => {
            tracing::debug!(facility, "{message}");
        }
        _ => tracing::trace!(facility, "{message}"),
    }
}
