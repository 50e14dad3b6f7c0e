//! Mean loss on held-out text, packed as in training, but that documents never look at one another: sets are compared
//! between runs that pack otherwise.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};
use sluice_feed::batch::{Batch, NO_TARGET, PackedBatch};
use sluice_feed::document::Document;
use sluice_feed::pack::{BatchShape, Packer};
use sluice_text::{Fields, Format, TEXT_BYTES_MAX, TOKENS_MAX, TextReader};

use crate::failure::Classify;
use crate::text::TextTokenizer;
use crate::training::learner::Learner;

/// `NAME=FILE` of a command line: a name for an evaluation set and its JSON Lines file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalFile {
    /// The set's name in metrics and reports.
    pub name: String,
    /// JSON Lines with a `text` field.
    pub path: PathBuf,
}

impl std::str::FromStr for EvalFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.to_owned(), path: path.into() })
            }
            _ => Err(format!("{text:?} is not NAME=FILE, such as math=held-out.jsonl")),
        }
    }
}

/// Held-out documents, tokenized and packed.
#[derive(Clone, Debug)]
pub struct EvalSet {
    /// The set's name.
    pub name: String,
    /// Documents in the set.
    pub documents: u64,
    /// Tokens that are predicted: all but each document's first, and its context.
    pub predictions: u64,
    batches: Vec<Batch>,
    /// For each prediction the index of its document, where documents have contexts.
    predicted: Option<Vec<usize>>,
}

/// The loss of one set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalLoss {
    /// The set's name.
    pub set: String,
    /// Mean loss in nats per predicted token.
    pub loss: f64,
    /// Tokens predicted.
    pub predictions: u64,
    /// Share of documents whose every predicted token has a probability above one half; absent where documents have no
    /// context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sure: Option<f64>,
}

/// Tokens of a document, and how many of the first of them are context.
struct WithContext {
    document: Document,
    context: usize,
}

impl EvalSet {
    /// Reads and tokenizes a JSON Lines file, compressed or not; fails where a line has no `text` or nothing is left to
    /// predict.
    pub fn read(file: &EvalFile, tokenizer: &TextTokenizer, shape: BatchShape) -> anyhow::Result<Self> {
        let shown = file.path.display();
        let reader = TextReader {
            format: Format::Jsonl,
            // What stands before the text, to be read and not predicted.
            fields: Fields { context: Some("context".to_owned()), ..Fields::default() },
            text_bytes_max: TEXT_BYTES_MAX,
        };
        let opened = reader.open(&file.path, |raw| raw);
        let mut documents = Vec::new();
        for line in opened.with_context(|| format!("cannot read evaluation set {shown}")).or_usage()? {
            let line = line.or_data()?;
            let encode = |text: &str| {
                let tokens = tokenizer.encode(text, TOKENS_MAX);
                tokens.with_context(|| format!("{shown}, document {}", line.id)).or_data()
            };
            let mut tokens = encode(&line.context)?;
            let context = tokens.len();
            tokens.extend(encode(&line.text)?);
            let document = Document::plain(documents.len().to_string(), file.name.clone(), tokens);
            documents.push(WithContext { document, context });
        }
        let set = Self::pack(&file.name, &documents, shape);
        if set.predictions == 0 {
            return Err(anyhow!("evaluation set {shown} holds no document of two tokens or more")).or_data();
        }
        Ok(set)
    }

    /// Packs documents whose ids are their indices.
    fn pack(name: &str, documents: &[WithContext], shape: BatchShape) -> Self {
        let mut packer = Packer::new(shape);
        for WithContext { document, .. } in documents {
            packer.push(document);
        }
        packer.close();
        let has_contexts = documents.iter().any(|document| document.context > 0);
        let mut predicted = Vec::new();
        let mut batches = Vec::new();
        while let Some(packed) = packer.next_batch() {
            batches.push(without_contexts(packed, documents, &mut predicted));
        }
        let predictions = predicted.len() as u64;
        let predicted = has_contexts.then_some(predicted);
        Self { name: name.to_owned(), documents: documents.len() as u64, predictions, batches, predicted }
    }

    /// Mean loss over the set; `None` if `stop` was set before the last batch. Fails where a loss is not finite.
    pub fn loss(&self, learner: &dyn Learner, stop: &AtomicBool) -> anyhow::Result<Option<EvalLoss>> {
        Ok(self.token_losses(learner, stop)?.map(|losses| self.summary(&losses)))
    }

    /// Loss in nats of each predicted token, in an order that does not change; `None` if `stop` was set before the last
    /// batch. Fails where one is not finite: a mean over the others would be of another set.
    pub fn token_losses(&self, learner: &dyn Learner, stop: &AtomicBool) -> anyhow::Result<Option<Vec<f32>>> {
        let mut all = Vec::with_capacity(self.predictions as usize);
        for batch in &self.batches {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let losses = learner.losses(batch);
            let predicted = batch.targets.iter().zip(losses).filter(|&(&target, _)| target != NO_TARGET);
            all.extend(predicted.map(|(_, loss)| loss));
        }
        let not_finite = all.iter().filter(|loss| !loss.is_finite()).count();
        if not_finite > 0 {
            bail!(
                "the model gives {not_finite} of the {} predicted tokens of evaluation set {} a loss that is not finite: \
                 take an earlier checkpoint, or lower --learning-rate",
                all.len(),
                self.name
            );
        }
        Ok(Some(all))
    }

    /// What the losses of all predicted tokens come to.
    pub fn summary(&self, losses: &[f32]) -> EvalLoss {
        let sum: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
        let sure = self.predicted.as_ref().map(|predicted| {
            let mut is_sure = vec![true; self.documents as usize];
            for (&document, &loss) in predicted.iter().zip(losses) {
                is_sure[document] &= loss < std::f32::consts::LN_2;
            }
            is_sure.iter().filter(|&&is_sure| is_sure).count() as f64 / self.documents as f64
        });
        EvalLoss {
            set: self.name.clone(),
            loss: sum / self.predictions as f64,
            predictions: self.predictions,
            sure,
        }
    }
}

/// A batch that predicts nothing of its documents' contexts; adds the index of each prediction's document to `predicted`.
fn without_contexts(packed: PackedBatch, documents: &[WithContext], predicted: &mut Vec<usize>) -> Batch {
    let mut batch = packed.batch;
    for (row, pieces) in packed.rows.iter().enumerate() {
        let mut at = row * batch.len;
        for piece in pieces {
            // The ids of these documents are their indices.
            let index: usize = piece.document.id().parse().unwrap_or_default();
            for offset in 0..piece.document.tokens().len() {
                let target = &mut batch.targets[at + offset];
                if piece.start + offset + 1 < documents[index].context {
                    *target = NO_TARGET;
                } else if *target != NO_TARGET {
                    predicted.push(index);
                }
            }
            at += piece.document.tokens().len();
        }
    }
    batch
}

/// Reads several sets; a name given twice is an error.
pub fn read_sets(
    files: &[EvalFile],
    tokenizer: &TextTokenizer,
    shape: BatchShape,
) -> anyhow::Result<Vec<EvalSet>> {
    for (index, file) in files.iter().enumerate() {
        if files[..index].iter().any(|earlier| earlier.name == file.name) {
            let error = anyhow!("two evaluation sets are named {:?}; give each its own name", file.name);
            return Err(error).or_usage();
        }
    }
    files.iter().map(|file| EvalSet::read(file, tokenizer, shape)).collect()
}
