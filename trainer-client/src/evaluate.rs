//! Mean loss on held-out text, packed as in training, but that documents never look at one another: sets are compared
//! between runs that pack otherwise.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};

use crate::batch::Batch;
use crate::document::Document;
use crate::failure::Classify;
use crate::learner::Learner;
use crate::pack::{BatchShape, Packer};
use crate::text::TextTokenizer;

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
    /// Tokens that are predicted: all but each document's first.
    pub predictions: u64,
    batches: Vec<Batch>,
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
}

#[derive(Deserialize)]
struct Line {
    text: String,
}

impl EvalSet {
    /// Reads and tokenizes a JSON Lines file; fails where a line has no `text` or nothing is left to predict.
    pub fn read(file: &EvalFile, tokenizer: &TextTokenizer, shape: BatchShape) -> anyhow::Result<Self> {
        let shown = file.path.display();
        let opened = std::fs::File::open(&file.path);
        let opened = opened.with_context(|| format!("cannot read evaluation set {shown}")).or_usage()?;
        let mut documents = Vec::new();
        for (number, line) in (1..).zip(BufReader::new(opened).lines()) {
            let line = line.with_context(|| format!("cannot read {shown}, line {number}")).or_data()?;
            if line.trim().is_empty() {
                continue;
            }
            let Line { text } = serde_json::from_str(&line)
                .with_context(|| format!("{shown}, line {number} is not a JSON object with a \"text\" field"))
                .or_data()?;
            documents.push(Document::plain(format!("{number}"), file.name.clone(), tokenizer.encode(&text)?));
        }
        let set = Self::pack(&file.name, &documents, shape);
        if set.predictions == 0 {
            return Err(anyhow!("evaluation set {shown} holds no document of two tokens or more")).or_data();
        }
        Ok(set)
    }

    /// Packs tokenized documents.
    pub fn pack(name: &str, documents: &[Document], shape: BatchShape) -> Self {
        let mut packer = Packer::new(shape);
        for document in documents {
            packer.push(document);
        }
        let batches: Vec<Batch> = std::iter::from_fn(|| packer.flush()).map(|packed| packed.batch).collect();
        let predictions = batches.iter().map(|batch| batch.predictions() as u64).sum();
        Self { name: name.to_owned(), documents: documents.len() as u64, predictions, batches }
    }

    /// Mean loss over the set; `None` if `stop` was set before the last batch.
    pub fn loss(&self, learner: &dyn Learner, stop: &AtomicBool) -> Option<EvalLoss> {
        let mut sum = 0.0;
        for batch in &self.batches {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            let losses = learner.losses(batch);
            sum += losses.iter().filter(|loss| !loss.is_nan()).map(|&loss| f64::from(loss)).sum::<f64>();
        }
        Some(EvalLoss {
            set: self.name.clone(),
            loss: sum / self.predictions as f64,
            predictions: self.predictions,
        })
    }
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
