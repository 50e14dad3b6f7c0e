//! A sample of scored documents: what the reference says of their tokens, and what a model says that is to be trained on them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use serde::Serialize;
use sluice_feed::batch::{NO_TARGET, PackedBatch};
use sluice_feed::document::Document;
use sluice_feed::pack::{BatchShape, Packer};
use sluice_feed::sources::SourceNames;
use sluice_feed::stream::{DocumentStream, Next, StreamError};
use sluice_schemas::fingerprint::Fingerprint;

use crate::failure::Failure;
use crate::training::learner::Learner;

/// Tokens at which a sample ends, for the losses of all are held in memory: 10 bytes each, and 30 while they are ranked.
pub const TOKENS_MAX: usize = 1 << 24;
/// Most sources told apart.
const SOURCES_MAX: u16 = 256;

/// The model that is to be trained, and the sequences that it reads documents in.
#[derive(Clone, Copy)]
pub struct Base<'a> {
    /// The model.
    pub learner: &'a dyn Learner,
    /// Sequences of a micro-batch, and tokens of each.
    pub shape: BatchShape,
}

/// Why a sample holds no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// It holds as many documents as were asked for.
    Full,
    /// There are no more.
    StreamEnded,
    /// It holds [`TOKENS_MAX`] tokens.
    TokensMax,
    /// Somebody asked to stop.
    Stopped,
}

/// Sums over a document's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DocumentSums {
    /// Index of its source.
    pub source: u16,
    /// Tokens that are predicted.
    pub tokens: u64,
    /// Those of them whose reference loss was taken under the context that the base model reads them in; without a base model
    /// all that have a reference loss.
    pub compared: u64,
    /// Reference losses of those that are compared, in nats.
    pub reference: f64,
    /// Losses of the base model on the same, in nats; 0 without one.
    pub base: f64,
}

impl DocumentSums {
    /// Sum of the excess loss in nats over the tokens that are compared, and how many these are.
    pub fn excess(&self) -> (f64, u64) {
        (self.base - self.reference, self.compared)
    }
}

/// Losses in nats of each token that both models predict under the same context; three lists of one length.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compared {
    /// Of the base model.
    pub base: Vec<f32>,
    /// Of the reference.
    pub reference: Vec<f32>,
    /// Index of the token's source.
    pub sources: Vec<u16>,
}

/// What was read.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Names of the sources, by their indices.
    pub names: SourceNames,
    /// Each document that was read.
    pub documents: Vec<DocumentSums>,
    /// Each token that can be compared; empty without a base model.
    pub compared: Compared,
    /// Whether there was a base model.
    pub has_base: bool,
    /// The model that scored the first document.
    pub reference_model: Option<Fingerprint>,
    /// Why it holds no more.
    pub ending: Ending,
}

impl Sample {
    /// The first documents of a stream, at most so many, one of each lane in turn, so that none is left out; `targets` are
    /// sources that are told apart however many others there are. `shown` is told now and then how many documents have been
    /// read, and how many of their tokens looked at.
    ///
    /// After a stop the sample is what has been looked at until then. Fails where the stream does, and where the base model
    /// gives a token a loss that is not finite.
    pub fn read(
        stream: Box<dyn DocumentStream>,
        documents_max: usize,
        targets: &[String],
        base: Option<Base<'_>>,
        stop: &AtomicBool,
        shown: &mut dyn FnMut(u64, u64),
    ) -> anyhow::Result<Self> {
        let mut names = SourceNames::at_most(SOURCES_MAX);
        for target in targets {
            names.index(target);
        }
        let mut sample = Self {
            names,
            documents: vec![],
            compared: Compared::default(),
            has_base: base.is_some(),
            reference_model: None,
            ending: Ending::Full,
        };
        let mut lanes = InTurn::new(stream);
        let mut measuring = base.map(|Base { learner, shape }| (learner, Packer::new(shape)));
        let mut tokens = 0;
        while sample.ending == Ending::Full && sample.documents.len() < documents_max {
            let document = match lanes.next_document()? {
                Next::Document(document) => document,
                Next::Ended => {
                    sample.ending = Ending::StreamEnded;
                    break;
                }
                Next::Stopped => {
                    sample.ending = Ending::Stopped;
                    break;
                }
            };
            let number = sample.begin(&document);
            match &mut measuring {
                None => {
                    sample.add_reference(number, &document);
                    tokens += sample.documents[number].tokens;
                }
                Some((learner, packer)) => {
                    packer.push(&numbered(&document, number)?);
                    while packer.fills(1) && !stop.load(Ordering::Relaxed) {
                        tokens += sample.measure(*learner, packer)?;
                    }
                    if sample.compared.base.len() >= TOKENS_MAX {
                        sample.ending = Ending::TokensMax;
                    }
                }
            }
            shown(sample.documents.len() as u64, tokens);
        }
        if let Some((learner, packer)) = &mut measuring {
            packer.close();
            while packer.batches() > 0 {
                if stop.load(Ordering::Relaxed) {
                    sample.ending = Ending::Stopped;
                    break;
                }
                tokens += sample.measure(*learner, packer)?;
                shown(sample.documents.len() as u64, tokens);
            }
        }
        sample.reference_model = lanes.stream.reference_model();
        Ok(sample)
    }

    /// Enters a document; its number.
    fn begin(&mut self, document: &Document) -> usize {
        let source = self.names.index(document.source());
        self.documents.push(DocumentSums { source, ..DocumentSums::default() });
        self.documents.len() - 1
    }

    /// Adds what the reference says of a document.
    fn add_reference(&mut self, number: usize, document: &Document) {
        let sums = &mut self.documents[number];
        for loss in document.reference().iter().filter(|loss| !loss.is_nan()) {
            sums.tokens += 1;
            sums.compared += 1;
            sums.reference += f64::from(*loss);
        }
    }

    /// Adds what both models say of the next micro-batch; how many of its tokens are predicted.
    fn measure(&mut self, learner: &dyn Learner, packer: &mut Packer) -> anyhow::Result<u64> {
        let Some(PackedBatch { batch, rows, .. }) = packer.next_batch() else { return Ok(0) };
        let losses = learner.losses(&batch);
        for (row, pieces) in rows.iter().enumerate() {
            let mut at = row * batch.len;
            for piece in pieces {
                let number: usize =
                    piece.document.id().parse().context("documents are named by their numbers")?;
                let own = at..at + piece.len();
                let of_models = losses[own.clone()].iter().zip(&batch.reference[own.clone()]);
                for (&target, (&base, &reference)) in batch.targets[own.clone()].iter().zip(of_models) {
                    if target != NO_TARGET {
                        self.add(number, base, reference)?;
                    }
                }
                at = own.end;
            }
        }
        Ok(batch.predictions() as u64)
    }

    /// Adds a token of a document.
    fn add(&mut self, number: usize, base: f32, reference: f32) -> anyhow::Result<()> {
        if !base.is_finite() {
            let error = format!(
                "the model of --init gives a token of document {} of the sample a loss that is not finite: nothing can be \
                 learnt from there; give an earlier checkpoint",
                number + 1
            );
            return Err(Failure::Data(error).into());
        }
        let sums = &mut self.documents[number];
        sums.tokens += 1;
        // Masked, for the base model reads it with less context than the reference did.
        if reference.is_nan() {
            return Ok(());
        }
        sums.compared += 1;
        sums.reference += f64::from(reference);
        sums.base += f64::from(base);
        self.compared.base.push(base);
        self.compared.reference.push(reference);
        self.compared.sources.push(sums.source);
        Ok(())
    }
}

/// The document under its number, so that two of one id stay apart.
fn numbered(document: &Document, number: usize) -> anyhow::Result<Document> {
    let (tokens, reference) = (document.tokens().to_vec(), document.reference().to_vec());
    let numbered = Document::scored(number.to_string(), String::new(), tokens, reference)?;
    Ok(match document.context() {
        Some(context) => numbered.with_context(context),
        None => numbered,
    })
}

/// A stream's lanes, of which those that have not ended give a document each in turn.
struct InTurn {
    stream: Box<dyn DocumentStream>,
    lanes: VecDeque<usize>,
}

impl InTurn {
    fn new(stream: Box<dyn DocumentStream>) -> Self {
        let lanes = (0..stream.lanes()).collect();
        Self { stream, lanes }
    }

    fn next_document(&mut self) -> Result<Next, StreamError> {
        while let Some(&lane) = self.lanes.front() {
            match self.stream.next_document(lane)? {
                Next::Ended => {
                    self.lanes.pop_front();
                }
                next => {
                    self.lanes.rotate_left(1);
                    return Ok(next);
                }
            }
        }
        Ok(Next::Ended)
    }
}
