//! Where documents come from: a topic, or files.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use sluice_feed::cut::UnequalContexts;
use sluice_feed::document::Document;
use sluice_feed::feed::Feed;
use sluice_feed::plan::Plan;
use sluice_feed::snapshot::Snapshot;
use sluice_feed::stream::{
    Broker, Decoder, DocumentStream, Extent, KafkaStream, Next, Shard, Start, TopicKind, first_context,
};
use sluice_schemas::record::ContextPolicy;

use crate::failure::Classify;
use crate::text::{Bounds, TextTokenizer};
use crate::training::files::{FileStream, name_of};

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

    /// All documents of one pass, each partition's after the other's.
    pub fn read(&self, topic: &str) -> anyhow::Result<Vec<Document>> {
        let extent = Extent::UntilEnd { epochs: 1 };
        let mut stream: Box<dyn DocumentStream> = if self.files.is_empty() {
            let (broker, decoder, stop) = (self.broker.clone(), self.decoder.clone(), Arc::clone(&self.stop));
            Box::new(KafkaStream::open(broker, topic, extent, Start::whole(), decoder, stop)?)
        } else {
            Box::new(self.stream(extent, None, self.decoder.clone())?)
        };
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
