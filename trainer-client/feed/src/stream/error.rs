//! What can go wrong between the broker and a document.

use rdkafka::error::KafkaError;
use sluice_kafka::MadeAnew;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{ContextPolicy, RecordError};

use super::kind::TopicKind;
use super::place::ShardError;
use crate::document::LengthMismatch;
use crate::plan::PlanError;

/// Why a stream could not be opened or had to end.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No broker answered in time.
    #[error(
        "no Kafka broker answered at {servers} within {seconds} s{}; check the address and that the broker is up",
        detail(.reason.as_ref())
    )]
    Unreachable {
        /// The addresses tried.
        servers: String,
        /// How long.
        seconds: u64,
        /// What librdkafka said last.
        reason: Option<String>,
    },
    /// A setting whose value should come from a file and does not.
    #[error("a librdkafka setting: {0}")]
    PropertyFile(sluice_kafka::PropertyError),
    /// The client refused its settings; the words are librdkafka's and hold no property's value.
    #[error("librdkafka refused its settings: {0}")]
    Settings(String),
    /// A setting that does not exist. Its value may be a secret, so nothing here holds it.
    #[error("setting {0} is unknown to librdkafka; check its spelling{hint}", hint = sluice_kafka::hint(.0))]
    UnknownProperty(String),
    /// A setting with a value of the wrong kind, which may be a secret and is not held here.
    #[error(
        "the value of setting {0} is not accepted by librdkafka; see {0} in its CONFIGURATION.md{hint}",
        hint = sluice_kafka::hint(.0)
    )]
    PropertyValue(String),
    /// A setting that the stream's guarantees rest on.
    #[error("setting {0} cannot be set: offsets are kept with checkpoints, and the stream sets this itself")]
    OwnedProperty(String),
    /// There is no such topic.
    #[error("topic {topic:?} does not exist on {servers}; create it, or check its name")]
    NoSuchTopic {
        /// Its name.
        topic: String,
        /// The addresses asked.
        servers: String,
    },
    /// The topic has ended before it began.
    #[error("topic {0:?} holds no documents; fill it first, or follow it to wait for them")]
    EmptyTopic(String),
    /// The broker refused, or lost what was asked for.
    #[error("reading topic {topic:?} failed: {error}{}", detail(.reason.as_ref()))]
    Broker {
        /// The topic being read.
        topic: String,
        /// What failed.
        error: Box<KafkaError>,
        /// What librdkafka said last.
        reason: Option<String>,
    },
    /// A file that cannot be read, or a line that is no document.
    #[error("{path}, line {line}: {why}")]
    File {
        /// The file.
        path: String,
        /// The line, counted from 1; 0 for the file as a whole.
        line: u64,
        /// What is wrong with it.
        why: String,
    },
    /// A record that is not what the topic should hold.
    #[error("record at {origin} is refused: {error}")]
    Record {
        /// Where it was read.
        origin: Origin,
        /// What is wrong with it.
        error: Box<RecordError>,
    },
    /// A record that says itself that it is of the other kind.
    #[error("record at {origin} is {found}: this is a topic of {}", .found.plural())]
    Kind {
        /// Where it was read.
        origin: Origin,
        /// What it is.
        found: TopicKind,
    },
    /// Reference losses or entropies that do not fit their tokens.
    #[error("record at {origin} is refused: {error}")]
    Losses {
        /// Where it was read.
        origin: Origin,
        /// What is wrong with it.
        error: LengthMismatch,
    },
    /// A scored document without the entropies that the run's score looks at.
    #[error(
        "record at {origin} carries no reference entropies, which the score looks at; score the topic with entropies, or \
         choose by another score"
    )]
    NoEntropies {
        /// Where it was read.
        origin: Origin,
    },
    /// A document that a token classifier has scored, where losses are asked for.
    #[error(
        "record at {origin} carries the probability of {class:?} by a token classifier and no reference losses, which the score \
         looks at; score the topic with a causal language model, or choose by the score attribute"
    )]
    NoLosses {
        /// Where it was read.
        origin: Origin,
        /// The classifier's class.
        class: String,
    },
    /// A document that a language model has scored, where the attribute of a token classifier is asked for.
    #[error(
        "record at {origin} carries reference losses and no attribute, which the score looks at; score the topic with a token \
         classifier, or choose by another score"
    )]
    NoAttribute {
        /// Where it was read.
        origin: Origin,
    },
    /// Losses of two reference models cannot be compared with one another.
    #[error(
        "record at {origin} was scored by reference model {found}, but this run began with {expected}; train on a \
         topic that one model scored, or allow both"
    )]
    ForeignReference {
        /// Where it was read.
        origin: Origin,
        /// The record's model.
        found: Fingerprint,
        /// The model of the run's first record.
        expected: Fingerprint,
    },
    /// What was to be read next is no longer there.
    #[error(
        "topic {topic:?}, partition {partition} is to be read from offset {next_offset} on, but retention has removed \
         everything before {low}: documents would be lost; keep records longer, or begin a new run"
    )]
    Removed {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// Offset of the next record to read.
        next_offset: i64,
        /// The first offset there is.
        low: i64,
    },
    /// What was to be read next was never there.
    #[error(
        "topic {topic:?}, partition {partition} ends before offset {high}, but the run stands at {next_offset}: it is not the \
         topic that the run read, or was made anew; begin a new run"
    )]
    Shorter {
        /// The topic.
        topic: String,
        /// The partition.
        partition: i32,
        /// Offset that the run has reached, or is to reach.
        next_offset: i64,
        /// The end that the partition has.
        high: i64,
    },
    /// The topic was deleted and made anew since the run began to read it.
    #[error(
        "topic {topic:?} was deleted and made anew since this run began to read it (id {}, now {}): offsets of one mean nothing \
         in the other; begin a new run",
        .made_anew.earlier, .made_anew.later
    )]
    MadeAnew {
        /// The topic.
        topic: String,
        /// Its ids, before and after.
        made_anew: MadeAnew,
    },
    /// The plan asks for more than any memory holds.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The topic's partitions cannot be dealt to the ranks.
    #[error("topic {topic:?}: {error}")]
    Shard {
        /// The topic.
        topic: String,
        /// Why not.
        error: ShardError,
    },
    /// Losses under two context policies cannot be compared with one another.
    #[error(
        "record at {origin} was scored in windows of {} tokens every {}, but others of its reference model in windows of {} \
         every {}; score the topic anew with one window and one stride",
        .found.window, .found.stride, .expected.window, .expected.stride
    )]
    ForeignContext {
        /// Where it was read.
        origin: Origin,
        /// How the record's document was seen.
        found: ContextPolicy,
        /// How the first one of this reference model was.
        expected: ContextPolicy,
    },
    /// A context policy under which no model can have scored the document.
    #[error(
        "record at {origin} says that its {} tokens were scored in windows of {} every {}, which would leave some out; \
         score the topic anew with windows that overlap",
        .tokens, .context.window, .context.stride
    )]
    Windows {
        /// Where it was read.
        origin: Origin,
        /// Tokens of the document.
        tokens: usize,
        /// How the record says that its document was seen.
        context: ContextPolicy,
    },
    /// Windows that overlap so much that a document would be read more often than anybody means.
    #[error(
        "record at {origin} was scored in windows of {} tokens every {}: each of its tokens would be read {} times over; score \
         the topic anew with a longer stride",
        .context.window, .context.stride, .context.window.div_ceil(.context.stride.max(1))
    )]
    Rereads {
        /// Where it was read.
        origin: Origin,
        /// How the record's document was seen.
        context: ContextPolicy,
    },
    /// The reference saw a BOS token that the run's vocabulary does not have.
    #[error(
        "record at {origin} was scored with BOS token {token} before it, which is beyond the vocabulary of {vocabulary}: the \
         reference model has another tokenizer than this run"
    )]
    ForeignBos {
        /// Where it was read.
        origin: Origin,
        /// The token.
        token: u32,
        /// Ids are below this.
        vocabulary: u32,
    },
    /// A document that does not fit a sequence under the contexts of its reference losses.
    #[error(
        "record at {origin} has {tokens} tokens, which the reference model read in windows of {window}, and a sequence \
         holds {sequence}: the losses of both models would be taken under different contexts; give sequences of \
         {window}, or have such tokens masked or allowed"
    )]
    UnequalContexts {
        /// Where it was read.
        origin: Origin,
        /// Tokens of the document.
        tokens: usize,
        /// Tokens of the reference's windows.
        window: u32,
        /// Tokens of a sequence.
        sequence: usize,
    },
    /// A checkpoint that this stream cannot go on from.
    #[error("the state of the data cannot be gone on from: {0}")]
    Snapshot(String),
    /// Another rank of the group has failed.
    #[error("another rank of the group has failed; see what it says")]
    OtherRank,
    /// Ranks have read what cannot be compared with one another.
    #[error(
        "the ranks of the group read records of different reference models, or of one model under different contexts: their \
         losses cannot be compared; train on a topic that one model scored in one way, or allow all of its models"
    )]
    SeveralReferences,
    /// Ranks could not reach an agreement.
    #[error("the ranks of the group could not agree on a step: {0}")]
    Agreement(String),
    /// A record of a reference model that is not on the run's list.
    #[error(
        "record at {origin} was scored by reference model {found}, which is none of those allowed; add it if its losses are \
         meant to be compared with"
    )]
    NotAllowed {
        /// Where it was read.
        origin: Origin,
        /// The record's model.
        found: Fingerprint,
    },
    /// The thread that reads from the broker is gone.
    #[error("the reader thread of topic {0:?} stopped unexpectedly")]
    ReaderGone(String),
}

impl StreamError {
    /// Every reason that [`Self::rejection`] may give.
    pub const REJECTIONS: [&'static str; 13] = [
        "record",
        "kind",
        "losses",
        "no_entropies",
        "no_losses",
        "no_attribute",
        "foreign_reference_model",
        "reference_model_not_allowed",
        "foreign_context",
        "windows",
        "rereads",
        "foreign_bos",
        "unequal_contexts",
    ];

    /// Why a record was refused, in a word; `None` where it is not a record that is at fault.
    pub fn rejection(&self) -> Option<&'static str> {
        match self {
            Self::Record { .. } => Some("record"),
            Self::Kind { .. } => Some("kind"),
            Self::Losses { .. } => Some("losses"),
            Self::NoEntropies { .. } => Some("no_entropies"),
            Self::NoLosses { .. } => Some("no_losses"),
            Self::NoAttribute { .. } => Some("no_attribute"),
            Self::ForeignReference { .. } => Some("foreign_reference_model"),
            Self::NotAllowed { .. } => Some("reference_model_not_allowed"),
            Self::ForeignContext { .. } => Some("foreign_context"),
            Self::Windows { .. } => Some("windows"),
            Self::Rereads { .. } => Some("rereads"),
            Self::ForeignBos { .. } => Some("foreign_bos"),
            Self::UnequalContexts { .. } => Some("unequal_contexts"),
            _ => None,
        }
    }
}

/// Where a record was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Topic name.
    pub topic: String,
    /// Partition number.
    pub partition: i32,
    /// Offset in the partition.
    pub offset: i64,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "topic {:?}, partition {}, offset {}", self.topic, self.partition, self.offset)
    }
}

fn detail(reason: Option<&String>) -> String {
    reason.map(|reason| format!(" ({reason})")).unwrap_or_default()
}
