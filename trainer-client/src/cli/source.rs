//! Where documents come from: a topic, or files.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use sluice_feed::cut::UnequalContexts;
use sluice_feed::document::Document;
use sluice_feed::feed::Feed;
use sluice_feed::plan::Plan;
use sluice_feed::select::Needs;
use sluice_feed::snapshot::Snapshot;
use sluice_feed::stream::{
    Broker, Decoder, DocumentStream, Extent, KafkaStream, Next, Shard, Start, StreamError, TopicKind,
    first_context,
};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names;
use sluice_schemas::record::ContextPolicy;

use crate::failure::{Classify, Failure};
use crate::text::{Bounds, TextTokenizer};
use crate::training::files::{FileStream, name_of};

/// A longer window than any model's is a slip of whoever wrote the record.
const SEQUENCE_LENGTH_MAX: usize = 1 << 20;
/// More tokens in a micro-batch than most machines hold the activations of.
const MICRO_BATCH_TOKENS_MANY: usize = 1 << 17;

/// A scored topic, or files of what it would hold.
#[derive(Args, Clone, Debug)]
pub(super) struct ScoredArguments {
    /// Topic of scored documents
    #[arg(long, env = "SLUICE_TRAIN_TOPIC", default_value = names::SCORED_TOPIC)]
    pub topic: String,
    /// Read scored documents from these files instead of Kafka, a partition each: lines of `sluiced model score`, as they are
    /// or compressed; in the environment one a line
    #[arg(long, env = "SLUICE_TRAIN_FILES", value_name = "FILE", num_args = 1.., value_delimiter = '\n', conflicts_with = "topic")]
    pub files: Vec<PathBuf>,
    /// The tokenizer.json that the documents were made with
    #[arg(long, env = "SLUICE_TRAIN_TOKENIZER", value_name = "FILE")]
    pub tokenizer: PathBuf,
    /// Fingerprint of a reference model whose losses are accepted; repeatable, in the environment one a line
    /// [default: that of the first record]
    #[arg(
        long = "reference-model",
        env = "SLUICE_TRAIN_REFERENCE_MODEL",
        value_name = "SHA256",
        value_delimiter = '\n'
    )]
    pub reference_models: Vec<Fingerprint>,
}

impl ScoredArguments {
    /// Where these documents come from. One without what is needed of the reference is refused.
    pub fn source(
        &self,
        broker: Broker,
        tokenizer: Arc<TextTokenizer>,
        bounds: Bounds,
        needs: Needs,
        stop: Arc<AtomicBool>,
    ) -> Source {
        let decoder = Decoder::new(TopicKind::Scored, tokenizer.fingerprint(), tokenizer.vocabulary())
            .needing(needs)
            .allowing(&self.reference_models);
        Source {
            broker,
            files: self.files.clone(),
            decoder,
            kind: TopicKind::Scored,
            tokenizer,
            bounds,
            stop,
        }
    }
}

/// A topic, or files where some are named.
pub(super) struct Source {
    pub broker: Broker,
    pub files: Vec<PathBuf>,
    pub decoder: Decoder,
    pub kind: TopicKind,
    pub tokenizer: Arc<TextTokenizer>,
    /// What stands around each text of a file.
    pub bounds: Bounds,
    pub stop: Arc<AtomicBool>,
}

impl Source {
    /// What a run's record calls it.
    pub fn name(&self, topic: &str) -> anyhow::Result<String> {
        if self.files.is_empty() { Ok(topic.to_owned()) } else { name_of(&self.files).or_usage() }
    }

    /// How the reference saw the first document, if there is one.
    pub fn first_context(&self, topic: &str, extent: Extent) -> anyhow::Result<Option<ContextPolicy>> {
        if self.files.is_empty() {
            return Ok(first_context(&self.broker, topic, extent, &self.decoder, &self.stop)?);
        }
        Ok(self.stream(extent, None, self.decoder.clone())?.first_context()?)
    }

    /// Tokens of a sequence: as many as the reference's windows hold, which the first record says, and at most as many as a
    /// model reads, if it is known how many. `None` where somebody asked to stop before there was a record.
    pub fn sequence_length(
        &self,
        topic: &str,
        extent: Extent,
        longest: Option<usize>,
        batch_size: usize,
    ) -> anyhow::Result<Option<usize>> {
        let Some(context) = self.first_context(topic, extent)? else {
            return if self.stop.load(Ordering::Relaxed) {
                Ok(None)
            } else {
                Err(StreamError::EmptyTopic(self.name(topic)?).into())
            };
        };
        let window = context.window as usize;
        let len = longest.map_or(window, |longest| window.min(longest));
        if !(2..=SEQUENCE_LENGTH_MAX).contains(&len) {
            let error = format!(
                "the first record of {topic:?} was scored in windows of {window} tokens: give --sequence-length"
            );
            return Err(Failure::Data(error).into());
        }
        let tokens = len * batch_size;
        if tokens > MICRO_BATCH_TOKENS_MANY {
            tracing::warn!(
                "a micro-batch of {batch_size} sequences of {len} tokens, the reference's windows, holds {tokens} tokens: where \
                 memory is short, give a smaller --batch-size or a shorter --sequence-length"
            );
        }
        tracing::info!(
            window,
            "sequences of {len} tokens, by the reference model's windows (--sequence-length)"
        );
        Ok(Some(len))
    }

    /// The micro-batches that `plan` makes of it, from the beginning or from where a snapshot stands.
    pub fn open(&self, plan: Plan, snapshot: Option<&Snapshot>) -> anyhow::Result<Feed> {
        let (decoder, stop) = (self.decoder.clone(), Arc::clone(&self.stop));
        if self.files.is_empty() {
            let broker = self.broker.clone();
            return Ok(Feed::open(broker, plan, Shard::WHOLE, snapshot, decoder, stop)?);
        }
        let decoder = match plan.packing.unequal_contexts {
            UnequalContexts::Refuse => decoder.refusing_unequal_contexts(plan.shape.len),
            UnequalContexts::Mask | UnequalContexts::Allow => decoder,
        };
        let stream = self.stream(plan.extent, snapshot, decoder)?;
        Ok(Feed::over(Box::new(stream), plan, Shard::WHOLE, snapshot, self.tokenizer.fingerprint())?)
    }

    /// The documents of one pass, by partitions.
    pub fn documents(&self, topic: &str) -> anyhow::Result<Box<dyn DocumentStream>> {
        let extent = Extent::UntilEnd { epochs: 1 };
        if !self.files.is_empty() {
            return Ok(Box::new(self.stream(extent, None, self.decoder.clone())?));
        }
        let (broker, decoder, stop) = (self.broker.clone(), self.decoder.clone(), Arc::clone(&self.stop));
        Ok(Box::new(KafkaStream::open(broker, topic, extent, Start::whole(), decoder, stop)?))
    }

    /// All of them, each partition's after the other's.
    pub fn read(&self, topic: &str) -> anyhow::Result<Vec<Document>> {
        let mut stream = self.documents(topic)?;
        let mut documents = Vec::new();
        for lane in 0..stream.lanes() {
            while let Next::Document(document) = stream.next_document(lane)? {
                documents.push(document);
            }
        }
        Ok(documents)
    }

    fn stream(
        &self,
        extent: Extent,
        snapshot: Option<&Snapshot>,
        decoder: Decoder,
    ) -> anyhow::Result<FileStream> {
        let epochs = extent.epochs().unwrap_or(1);
        let (texts, stop) = ((Arc::clone(&self.tokenizer), self.bounds), Arc::clone(&self.stop));
        Ok(FileStream::open(&self.files, epochs, (self.kind, decoder), texts, snapshot, stop)?)
    }
}
