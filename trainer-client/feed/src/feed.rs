//! A topic as the micro-batches of one step after the other: what a trainer, in whatever framework, reads from.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{Bos, ContextPolicy};

use crate::batch::PackedBatch;
use crate::cut::UnequalContexts;
use crate::pack::{BatchShape, Packing};
use crate::plan::{Identity, Plan};
use crate::snapshot::Snapshot;
use crate::stream::{Broker, Contexts, Decoder, DocumentStream, KafkaStream, Shard, Start, StreamError};
use crate::supply::{Agreed, Buffered, Supply};
use crate::turns::Outlook;

/// How the ranks of a group reach agreements.
pub trait Group {
    /// Replaces each value by the smallest that any rank gives in its place. Every rank calls it as often, with as many
    /// values. The error is in words.
    fn minimum(&mut self, values: &mut [i64]) -> Result<(), String>;
}

/// A group of one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Group for Alone {
    fn minimum(&mut self, _values: &mut [i64]) -> Result<(), String> {
        Ok(())
    }
}

/// What comes next.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// The rank's micro-batches, as many as any other rank's.
    Batches(Vec<PackedBatch>),
    /// All lanes of all ranks have ended.
    Ended,
    /// A rank was asked to stop; what was read waits for the next step.
    Stopped,
}

/// A rank's lanes, from their documents to micro-batches.
pub struct Feed {
    stream: Box<dyn DocumentStream>,
    supply: Supply,
    tokenizer: Fingerprint,
}

impl Feed {
    /// Reads a rank's part of the topic that `plan` names, from the start of the run, or from where a snapshot of the
    /// whole (or of the rank's part) stands. Ends early once `stop` is set.
    ///
    /// Fails as [`KafkaStream::open`] does, and where the topic's partitions or the step's micro-batches cannot be dealt
    /// to the ranks in equal numbers.
    pub fn open(
        broker: Broker,
        plan: Plan,
        shard: Shard,
        snapshot: Option<&Snapshot>,
        decoder: Decoder,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, StreamError> {
        plan.check()?;
        let start = match snapshot {
            Some(snapshot) => {
                // Where several were allowed, the identity names none; of one that was seen it is known all the same.
                let only = snapshot.contexts.keys().next().filter(|_| snapshot.contexts.len() == 1).copied();
                Start {
                    shard,
                    topic_id: snapshot.topic_id.clone(),
                    places: snapshot.positions(),
                    reference_model: snapshot.identity.reference_model.or(only),
                    contexts: snapshot.contexts.clone(),
                }
            }
            None => Start::of(shard),
        };
        let decoder = match plan.packing.unequal_contexts {
            UnequalContexts::Refuse => decoder.refusing_unequal_contexts(plan.shape.len),
            UnequalContexts::Mask | UnequalContexts::Allow => decoder,
        };
        let tokenizer = decoder.tokenizer();
        let topic = plan.topic.clone();
        let stream = KafkaStream::open(broker, &topic, plan.extent, start, decoder, stop)?;
        let lanes = stream.lanes();
        shard
            .check(lanes, plan.micro_batches)
            .map_err(|error| StreamError::Shard { topic: topic.clone(), error })?;
        if let Some(snapshot) = snapshot.filter(|snapshot| snapshot.lanes < lanes) {
            let before = snapshot.lanes;
            tracing::info!(
                topic,
                "{lanes} partitions where there were {before}: the new ones are read from their first record"
            );
        }
        Self::over(Box::new(stream), plan, shard, snapshot, tokenizer)
    }

    /// A feed over any stream, which stands where the snapshot does. Fails where the snapshot is of another run, or lacks a
    /// lane.
    pub fn over(
        stream: Box<dyn DocumentStream>,
        plan: Plan,
        shard: Shard,
        snapshot: Option<&Snapshot>,
        tokenizer: Fingerprint,
    ) -> Result<Self, StreamError> {
        plan.check()?;
        if let Some(snapshot) = snapshot {
            let identity = Identity { tokenizer, reference_model: None, plan: plan.clone() };
            let checked = snapshot.check_for(&identity, shard, stream.lanes());
            checked.map_err(|error| StreamError::Snapshot(error.to_string()))?;
        }
        let supply = Supply::new(plan, shard, stream.lanes(), snapshot);
        Ok(Self { stream, supply, tokenizer })
    }

    /// The micro-batches of the next step, agreed on with the other ranks.
    pub fn next_step(&mut self, group: &mut dyn Group) -> Result<Step, StreamError> {
        loop {
            let filled = self.fill();
            let mut values = match &filled {
                Ok(outlook) => outlook.values(),
                // The others must hear of it, or they would wait for ever.
                Err(_) => Outlook::failed(self.supply.lanes()).values(),
            };
            let agreed = group.minimum(&mut values).map_err(StreamError::Agreement);
            filled?;
            agreed?;
            match self.agree(&Outlook::from_values(&values)) {
                Agreed::Ready => return Ok(Step::Batches(self.take())),
                Agreed::Again => {}
                Agreed::Ended => return Ok(Step::Ended),
                Agreed::Stopped => return Ok(Step::Stopped),
                Agreed::Failed => return Err(StreamError::OtherRank),
                Agreed::SeveralReferences => return Err(StreamError::SeveralReferences),
            }
        }
    }

    /// As [`Supply::fill`]; the outlook shows which reference the documents have, so that ranks refuse together what one
    /// of them would have refused alone.
    pub fn fill(&mut self) -> Result<Outlook, StreamError> {
        let outlook = self.supply.fill(&mut *self.stream)?;
        Ok(outlook.showing(self.reference_shown()))
    }

    /// A digest of the only reference model and its contexts; none where several are taken.
    fn reference_shown(&self) -> Option<Fingerprint> {
        let contexts = self.stream.contexts();
        let is_only = !self.stream.takes_several_models() && !contexts.is_empty();
        // Names and numbers can always be encoded.
        is_only.then(|| Fingerprint::of_bytes(&serde_json::to_vec(&contexts).unwrap_or_default()))
    }

    /// As [`Supply::agree`].
    pub fn agree(&mut self, outlook: &Outlook) -> Agreed {
        self.supply.agree(outlook)
    }

    /// As [`Supply::take`].
    pub fn take(&mut self) -> Vec<PackedBatch> {
        self.supply.take()
    }

    /// Takes back the micro-batches of a step that was not learnt from.
    pub fn put_back(&mut self, batches: Vec<PackedBatch>) {
        self.supply.put_back(batches);
    }

    /// Fingerprint of the model that made the reference losses: of the first document, where there are several.
    pub fn reference_model(&self) -> Option<Fingerprint> {
        self.stream.reference_model()
    }

    /// How each reference model saw the documents read so far.
    pub fn contexts(&self) -> Contexts {
        self.stream.contexts()
    }

    /// What must be the same on all ranks, and in a checkpoint that is gone on from.
    pub fn identity(&self) -> Identity {
        Identity {
            tokenizer: self.tokenizer,
            // Of several models each rank may have seen another one, first or alone.
            reference_model: self.stream.reference_model().filter(|_| !self.stream.takes_several_models()),
            plan: self.supply.plan().clone(),
        }
    }

    /// Shape of its micro-batches.
    pub fn shape(&self) -> BatchShape {
        self.supply.plan().shape
    }

    /// What people should know of how this plan meets the contexts that the reference model saw so far, a sentence each.
    pub fn notices(&self) -> Vec<String> {
        let Plan { shape, packing, .. } = self.supply.plan();
        let contexts = self.stream.contexts();
        let notices = contexts.values().flat_map(|context| notices_of(*context, shape.len, *packing));
        notices.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Lanes of the whole stream.
    pub fn lanes(&self) -> usize {
        self.supply.lanes()
    }

    /// Steps whose micro-batches were given out since the start of the run.
    pub fn step(&self) -> u64 {
        self.supply.step()
    }

    /// Documents taken from the rank's lanes since the start of the run.
    pub fn documents(&self) -> u64 {
        self.supply.documents(&*self.stream)
    }

    /// Documents that wait between the stream and the next step.
    pub fn buffered(&self) -> Buffered {
        self.supply.buffered()
    }

    /// The rank's part of a checkpoint, which stands before the micro-batches that come next.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            identity: self.identity(),
            topic_id: self.stream.topic_id(),
            step: self.supply.step(),
            lanes: self.supply.lanes(),
            turn: self.supply.turn(),
            contexts: self.stream.contexts(),
            held: self.supply.snapshot(&*self.stream),
        }
    }
}

fn notices_of(context: ContextPolicy, sequence: usize, packing: Packing) -> Vec<String> {
    let mut notices = Vec::new();
    let window = context.window as usize;
    if packing.attend_across_documents {
        notices.push(
            "tokens attend to the documents before theirs, which the reference model has not seen: the losses of both models \
             are taken under different contexts"
                .to_owned(),
        );
    } else if window > sequence {
        let what = match packing.unequal_contexts {
            UnequalContexts::Refuse => "a document with such tokens ends the run",
            UnequalContexts::Mask => "they cannot be chosen by a score that looks at the reference",
            UnequalContexts::Allow => "they are ranked like all others",
        };
        notices.push(format!(
            "the reference model read windows of {window} tokens, and a sequence holds {sequence}: tokens after the first \
             {sequence} of a document have less context than their reference losses had, and {what}"
        ));
    } else if window < sequence {
        notices.push(format!(
            "the reference model read windows of {window} tokens, and a sequence holds {sequence}: longer documents are cut \
             into the reference's windows, so that no token has more than {window} tokens of context"
        ));
    }
    match context.bos {
        Bos::None => {}
        Bos::Document(token) => notices.push(format!(
            "the reference model saw BOS token {token} before each document, and so does the model in training"
        )),
        Bos::Window(token) => notices.push(format!(
            "the reference model saw BOS token {token} before each window, and so does the model in training"
        )),
    }
    notices
}
