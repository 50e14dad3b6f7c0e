//! The producer: hands records to librdkafka and collects the broker's word on each.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{DeliveryResult, OwnedHeaders};
use rdkafka::producer::{BaseRecord, ProducerContext, ThreadedProducer};

use super::error::is_queue_full;
use crate::kafka::log_client;

const QUEUE_FULL_WAIT: Duration = Duration::from_millis(10);

/// Collects the records that the broker did not take, each by its index in the group.
#[derive(Debug, Default)]
struct Refusals(Mutex<Vec<(usize, KafkaError)>>);

/// The client's callbacks.
pub struct Context {
    refusals: Arc<Refusals>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_client(level, facility, message);
    }
}

impl ProducerContext for Context {
    /// Index of the record in its group.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        if let Err((error, _)) = result {
            self.refusals.0.lock().unwrap_or_else(PoisonError::into_inner).push((index, error.clone()));
        }
    }
}

/// A producer with a thread of its own that serves its callbacks.
pub struct RecordProducer {
    /// librdkafka's producer.
    pub client: ThreadedProducer<Context>,
    refusals: Arc<Refusals>,
}

impl RecordProducer {
    /// A producer with these settings.
    pub fn new(settings: &ClientConfig) -> KafkaResult<Self> {
        let refusals = Arc::new(Refusals::default());
        let client = settings.create_with_context(Context { refusals: Arc::clone(&refusals) })?;
        Ok(Self { client, refusals })
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

    /// The records refused since the last call.
    pub fn refused(&self) -> Vec<(usize, KafkaError)> {
        std::mem::take(&mut *self.refusals.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
