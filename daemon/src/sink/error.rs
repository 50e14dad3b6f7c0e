//! The one place that says what an error of the producer means.

use anyhow::anyhow;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

/// What to do about an error of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Make the same call again, with the same arguments.
    Retry,
    /// Abort the transaction and begin anew.
    Abort,
    /// Another producer has taken our transactional id: end the process.
    Fenced,
    /// Nothing helps: end the process, so that the next start resolves what is open.
    Fatal,
}

/// What `error`, of whichever call, means.
///
/// Flags come before codes: the same code can be retriable in one call and fatal in another.
pub fn classify(error: &KafkaError) -> Verdict {
    match error {
        KafkaError::Transaction(error) if error.is_fatal() && is_fenced(error.code()) => Verdict::Fenced,
        KafkaError::Transaction(error) if error.is_fatal() => Verdict::Fatal,
        KafkaError::Transaction(error) if error.txn_requires_abort() => Verdict::Abort,
        KafkaError::Transaction(error) if error.is_retriable() => Verdict::Retry,
        KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut) => Verdict::Retry,
        // A record that cannot be handed over while the transaction waits for its abort.
        KafkaError::MessageProduction(RDKafkaErrorCode::State | RDKafkaErrorCode::PurgeQueue) => {
            Verdict::Abort
        }
        _ => Verdict::Fatal,
    }
}

/// Whether an error that is fatal says that the brokers know a later producer of the same transactional id.
pub fn is_fenced(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::Fenced | RDKafkaErrorCode::ProducerFenced | RDKafkaErrorCode::InvalidProducerEpoch
    )
}

/// Whether the group has thrown this daemon out, or gone on without it, so that its partitions are another's.
pub fn is_fenced_by_group(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::IllegalGeneration
                | RDKafkaErrorCode::UnknownMemberId
                | RDKafkaErrorCode::FencedInstanceId
        )
    )
}

/// Whether a record was refused for its size.
pub fn is_too_large(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge)
}

/// Whether the client's own queue is full.
pub fn is_queue_full(error: &KafkaError) -> bool {
    error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull)
}

/// Why a transaction was not committed.
pub enum Failure {
    /// It was or must be aborted; its outcomes can be published in another.
    Aborted(anyhow::Error),
    /// The producer answers no more; its outcomes can be published by another, which aborts this transaction.
    Stuck,
    /// The brokers have given the transaction up, which was open for too long, and its producer with it. Its outcomes can
    /// be published by another, unless its commit was asked for.
    Outlived(anyhow::Error),
    /// Nobody waits for the answer any more: the daemon ends.
    GivenUp,
    /// The process must end.
    Fatal(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Fatal(error)
    }
}

impl Failure {
    /// What the process ends with where nothing else helps.
    pub fn into_error(self) -> anyhow::Error {
        match self {
            Self::Aborted(error) | Self::Outlived(error) | Self::Fatal(error) => error,
            Self::Stuck => anyhow!("the Kafka client does not return from a call"),
            Self::GivenUp => anyhow!("nobody waits for the brokers' answer any more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_errors_end_the_process() {
        assert_eq!(
            classify(&KafkaError::MessageProduction(RDKafkaErrorCode::TopicAuthorizationFailed)),
            Verdict::Fatal
        );
        assert_eq!(classify(&KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut)), Verdict::Retry);
        assert_eq!(classify(&KafkaError::MessageProduction(RDKafkaErrorCode::State)), Verdict::Abort);
    }

    #[test]
    fn a_record_that_is_too_large_is_told_from_a_full_queue() {
        let large = KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge);
        let full = KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull);
        assert!(is_too_large(&large) && !is_too_large(&full));
        assert!(is_queue_full(&full) && !is_queue_full(&large));
    }
}
