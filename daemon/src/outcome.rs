//! What becomes of a record: scored, or a dead letter, and the dead letter in place of one that is too large. Reading,
//! assembling and publishing all speak of it, and it of none of them.

use bytes::Bytes;

/// Reason for a dead letter, beside the codes of [`sluice_schemas::record::RecordError`]: no broker takes the record.
pub const RECORD_TOO_LARGE: &str = "record_too_large";
/// Reason for a dead letter: the model failed on this document alone.
pub const MODEL_FAILED: &str = "model_failed";

/// Reasons that are more likely ours than a document's where many have them: another model or tokenizer than the documents
/// were made with, or a device that computes nonsense.
const OURS: [&str; 6] = [
    "foreign_tokenizer",
    "token_beyond_vocabulary",
    "non_finite_loss",
    "non_finite_attribute",
    "negative_loss",
    MODEL_FAILED,
];

/// What became of a record.
#[derive(Debug)]
pub enum Outcome {
    /// It was scored.
    Scored(Scored),
    /// It could not be.
    DeadLetter(DeadLetter),
}

/// A record for the scored topic.
#[derive(Debug)]
pub struct Scored {
    /// The key of the record that was read; the document's id where it had none.
    pub key: Bytes,
    /// The encoded [`sluice_schemas::record::ScoredDocument`].
    pub payload: Bytes,
    /// The payload as it was read, for the case that the broker refuses this record.
    pub origin: Bytes,
    /// Number of tokens.
    pub tokens: usize,
}

/// What of a dead letter is too large to be carried along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Omitted {
    /// Nothing.
    Nothing,
    /// The payload.
    Payload,
    /// The payload and the key; the record's origin still says which it is.
    PayloadAndKey,
}

/// Longest reason in words, in bytes: it may quote what it complains of.
const DETAIL_BYTES_MAX: usize = 500;

/// A record for the dead-letter topic.
#[derive(Debug)]
pub struct DeadLetter {
    /// The key of the record that was read.
    pub key: Option<Bytes>,
    /// The payload as it was read; empty for a tombstone.
    pub payload: Bytes,
    /// What was left out, because the broker takes no larger record.
    pub omitted: Omitted,
    /// A short name of the reason.
    pub reason: &'static str,
    /// The reason in words.
    pub detail: String,
}

impl DeadLetter {
    /// A dead letter with all that was read.
    pub fn new(key: Option<Bytes>, payload: Bytes, reason: &'static str, detail: &str) -> Self {
        let end = detail.floor_char_boundary(DETAIL_BYTES_MAX);
        Self { key, payload, omitted: Omitted::Nothing, reason, detail: detail[..end].to_owned() }
    }

    /// The same with less in it; nothing where all that can be is left out already.
    fn shrink(&self) -> Option<Self> {
        let omitted = match self.omitted {
            Omitted::Nothing => Omitted::Payload,
            Omitted::Payload => Omitted::PayloadAndKey,
            Omitted::PayloadAndKey => return None,
        };
        let key = self.key.clone().filter(|_| omitted != Omitted::PayloadAndKey);
        Some(Self { key, payload: Bytes::new(), omitted, reason: self.reason, detail: self.detail.clone() })
    }
}

impl Outcome {
    /// Why the record could not be scored, where that is more likely our fault than its own.
    pub fn our_fault(&self) -> Option<&'static str> {
        match self {
            Self::Scored(_) => None,
            Self::DeadLetter(letter) => OURS.into_iter().find(|reason| *reason == letter.reason),
        }
    }

    /// The dead letter to publish in place of a record that is too large; nothing where it cannot be made smaller.
    pub fn shrink(&self) -> Option<DeadLetter> {
        match self {
            Self::Scored(scored) => Some(DeadLetter::new(
                Some(scored.key.clone()),
                scored.origin.clone(),
                RECORD_TOO_LARGE,
                &format!(
                    "with what the model says of it the record has {} bytes, more than the broker or kafka.record_bytes_max allows",
                    scored.payload.len()
                ),
            )),
            Self::DeadLetter(letter) => letter.shrink(),
        }
    }

    /// The record's key.
    pub fn key(&self) -> Option<&Bytes> {
        match self {
            Self::Scored(scored) => Some(&scored.key),
            Self::DeadLetter(letter) => letter.key.as_ref(),
        }
    }

    /// The record's payload; nothing for a tombstone and where it was left out.
    pub fn payload(&self) -> Option<&Bytes> {
        match self {
            Self::Scored(scored) => Some(&scored.payload),
            Self::DeadLetter(letter) => Some(&letter.payload).filter(|payload| !payload.is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_shrinks_until_nothing_is_left_that_could_be_too_large() {
        let bytes = |len: usize| Bytes::from(vec![b'x'; len]);
        let scored =
            Outcome::Scored(Scored { key: bytes(3), payload: bytes(9), origin: bytes(5), tokens: 1 });
        let mut shapes = Vec::new();
        let mut outcome = scored;
        while let Some(letter) = outcome.shrink() {
            shapes.push((letter.key.clone().map(|key| key.len()), letter.payload.len(), letter.omitted));
            outcome = Outcome::DeadLetter(letter);
        }
        let expected = [
            (Some(3), 5, Omitted::Nothing),
            (Some(3), 0, Omitted::Payload),
            (None, 0, Omitted::PayloadAndKey),
        ];
        assert_eq!(shapes, expected);
    }

    #[test]
    fn reasons_of_ours_are_reasons_that_there_are() {
        let known = sluice_schemas::record::RecordError::CODES;
        for reason in OURS.into_iter().filter(|reason| *reason != MODEL_FAILED) {
            assert!(known.contains(&reason), "{reason}");
            let letter = DeadLetter::new(None, Bytes::new(), reason, "");
            assert_eq!(Outcome::DeadLetter(letter).our_fault(), Some(reason));
        }
        let letter = DeadLetter::new(None, Bytes::new(), "malformed", "");
        assert_eq!(Outcome::DeadLetter(letter).our_fault(), None);
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let letter = DeadLetter::new(None, Bytes::new(), "x", &"é".repeat(400));
        assert_eq!(letter.detail, "é".repeat(250));
    }
}
