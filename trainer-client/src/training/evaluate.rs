//! Mean loss on held-out text, scored as the daemon scores it: each document by itself, in windows that overlap where it is
//! longer than one. So a loss depends on no neighbour and on no packing, and stands beside the daemon's and transformers'.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};
use sluice_feed::batch::{Batch, NO_TARGET, PackedBatch};
use sluice_feed::cut::Piece;
use sluice_feed::document::Document;
use sluice_feed::pack::{BatchShape, Packer};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_text::{Bounds, Fields, Format, TEXT_BYTES_MAX, TOKENS_MAX, TextReader};

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

/// Held-out documents, tokenized.
#[derive(Clone, Debug)]
pub struct EvalSet {
    /// The set's name.
    pub name: String,
    documents: Vec<WithContext>,
    /// Sequences in a batch.
    rows: usize,
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
#[derive(Clone, Debug)]
struct WithContext {
    document: Document,
    context: usize,
}

/// A batch, and for each prediction in it the position and where its loss goes.
struct Planned {
    batch: Batch,
    places: Vec<(usize, usize)>,
}

impl WithContext {
    /// First token that is predicted under a policy.
    fn first_predicted(&self, policy: ContextPolicy) -> usize {
        let first = usize::from(!policy.predicts_first(self.document.tokens()));
        self.context.max(first)
    }

    /// Tokens that are predicted under a policy.
    fn predictions(&self, policy: ContextPolicy) -> usize {
        self.document.tokens().len().saturating_sub(self.first_predicted(policy))
    }

    /// Tokens on the left that a window has no room for. What is predicted keeps as much context as fits, and at least a
    /// token; a document without context is read in windows and loses nothing.
    fn left_out(&self, policy: ContextPolicy) -> usize {
        let room = policy.window as usize - usize::from(policy.bos != Bos::None);
        let too_many = self.document.tokens().len().saturating_sub(room);
        too_many.min(self.context.saturating_sub(1))
    }

    /// The pieces that it is read in, in rows of their own, and how many tokens on the left are in none.
    fn rows(&self, policy: ContextPolicy) -> (Vec<Vec<Piece>>, usize) {
        let left_out = self.left_out(policy);
        let tokens = self.document.slice(left_out..self.document.tokens().len());
        let policy = match policy.bos {
            // It stands before a document, and this is the middle of one.
            Bos::Document(_) if left_out > 0 => ContextPolicy { bos: Bos::None, ..policy },
            _ => policy,
        };
        (rows_of([tokens.with_context(policy)].iter(), policy), left_out)
    }
}

/// Rows of documents that know their contexts, by best fit.
fn rows_of<'a>(documents: impl Iterator<Item = &'a Document>, policy: ContextPolicy) -> Vec<Vec<Piece>> {
    let mut packer = Packer::new(BatchShape { rows: 1, len: policy.window as usize });
    documents.for_each(|document| packer.push(document));
    packer.close();
    packer.finished().map(<[Piece]>::to_vec).collect()
}

impl EvalSet {
    /// Reads and tokenizes a JSON Lines file, compressed or not, to be measured in batches of `rows`; fails where a line has
    /// no `text` or nothing is left to predict. `bounds` stand around each document, before its context if it has one.
    pub fn read(
        file: &EvalFile,
        tokenizer: &TextTokenizer,
        bounds: Bounds,
        rows: usize,
    ) -> anyhow::Result<Self> {
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
            let mut context = tokens.len();
            tokens.extend(encode(&line.text)?);
            if context > 0 {
                context += usize::from(bounds.begin.is_some());
            }
            let tokens = bounds.around(tokens);
            let document = Document::plain(documents.len().to_string(), file.name.clone(), tokens);
            documents.push(WithContext { document, context });
        }
        let set = Self { name: file.name.clone(), documents, rows };
        if set.predictions() == 0 {
            return Err(anyhow!("evaluation set {shown} holds no document of two tokens or more")).or_data();
        }
        Ok(set)
    }

    /// Documents in the set.
    pub fn documents(&self) -> u64 {
        self.documents.len() as u64
    }

    /// Tokens that are predicted where no BOS stands before a document: all but each document's first, and its context.
    pub fn predictions(&self) -> u64 {
        self.predictions_by_document().map(|count| count as u64).sum()
    }

    /// The same by document, in the order of the file: how many of the values of [`Self::token_losses`] are each one's.
    pub fn predictions_by_document(&self) -> impl Iterator<Item = usize> {
        let policy = ContextPolicy { window: 2, stride: 1, bos: Bos::None };
        self.documents.iter().map(move |document| document.predictions(policy))
    }

    /// The batches that all documents are read in. A document with a context has rows of its own, and loses its left end
    /// where it is longer than a window; all others are read in windows, several to a row.
    fn plan(&self, policy: ContextPolicy) -> Vec<Planned> {
        let mut first_place = Vec::with_capacity(self.documents.len());
        let mut predictions = 0;
        let mut left_out = vec![0; self.documents.len()];
        let mut rows = Vec::new();
        for (index, document) in self.documents.iter().enumerate() {
            first_place.push(predictions);
            predictions += document.predictions(policy);
            if document.context > 0 {
                let (own, left) = document.rows(policy);
                left_out[index] = left;
                rows.extend(own);
            }
        }
        let plain: Vec<Document> = self
            .documents
            .iter()
            .filter(|document| document.context == 0)
            .map(|WithContext { document, .. }| document.clone().with_context(policy))
            .collect();
        rows.extend(rows_of(plain.iter(), policy));
        let mut planned = Vec::new();
        for rows in rows.chunks(self.rows) {
            // As long as the longest: rows of one short document each are mostly empty.
            let len = rows.iter().map(|row| row.iter().map(Piece::len).sum()).max().unwrap_or(0);
            let shape = BatchShape { rows: rows.len(), len };
            let packed = Packer::new(shape).holding(rows.to_vec(), vec![]).next_batch();
            planned.extend(packed.map(|packed| {
                place(packed, |index, token| {
                    let document = &self.documents[index];
                    let of_document = (token + left_out[index]).checked_sub(document.first_predicted(policy));
                    of_document.map(|number| first_place[index] + number)
                })
            }));
        }
        planned
    }

    /// Mean loss over the set; `None` if `stop` was set before the last batch. Fails where a loss is not finite.
    pub fn loss(
        &self,
        learner: &dyn Learner,
        policy: ContextPolicy,
        stop: &AtomicBool,
    ) -> anyhow::Result<Option<EvalLoss>> {
        Ok(self.token_losses(learner, policy, stop)?.map(|losses| self.summary(policy, &losses)))
    }

    /// Loss in nats of each predicted token, in the order of the file; `None` if `stop` was set before the last batch. Fails
    /// where one is not finite: a mean over the others would be of another set. `policy` says what a token is read with;
    /// its windows are at least two tokens and a BOS long.
    pub fn token_losses(
        &self,
        learner: &dyn Learner,
        policy: ContextPolicy,
        stop: &AtomicBool,
    ) -> anyhow::Result<Option<Vec<f32>>> {
        let count: usize = self.documents.iter().map(|document| document.predictions(policy)).sum();
        let mut all = vec![f32::NAN; count];
        for Planned { batch, places } in self.plan(policy) {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let losses = learner.losses(&batch);
            for (position, place) in places {
                all[place] = losses[position];
            }
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

    /// What the losses of all predicted tokens under a policy come to.
    pub fn summary(&self, policy: ContextPolicy, losses: &[f32]) -> EvalLoss {
        let sum: f64 = losses.iter().map(|&loss| f64::from(loss)).sum();
        let sure = self.documents.iter().any(|document| document.context > 0).then(|| {
            let mut rest = losses;
            let is_sure = |document: &&WithContext| {
                let (own, others) = rest.split_at(document.predictions(policy).min(rest.len()));
                rest = others;
                own.iter().all(|&loss| loss < std::f32::consts::LN_2)
            };
            self.documents.iter().filter(is_sure).count() as f64 / self.documents.len() as f64
        });
        EvalLoss {
            set: self.name.clone(),
            loss: sum / losses.len() as f64,
            predictions: losses.len() as u64,
            sure,
        }
    }
}

/// A batch in which only that is predicted which has a place, by the index of its document and the number of its token there.
fn place(packed: PackedBatch, place_of: impl Fn(usize, usize) -> Option<usize>) -> Planned {
    let mut batch = packed.batch;
    let mut places = Vec::new();
    for (row, pieces) in packed.rows.iter().enumerate() {
        let mut at = row * batch.len;
        for piece in pieces {
            // The ids of these documents are their indices.
            let index: usize = piece.document.id().parse().unwrap_or_default();
            // What a position predicts is the token after it; before the first stands a BOS, if any.
            let first_target = usize::from(piece.bos.is_none());
            for token in first_target..piece.document.tokens().len() {
                let position = at + token - first_target;
                if batch.targets[position] == NO_TARGET {
                    continue;
                }
                match place_of(index, piece.start + token) {
                    Some(place) => places.push((position, place)),
                    None => batch.targets[position] = NO_TARGET,
                }
            }
            at += piece.len();
        }
    }
    Planned { batch, places }
}

/// The policy of a model that reads at most `window` tokens, where no reference says another: windows that overlap by half,
/// as the daemon's do.
pub fn policy_of(window: usize) -> ContextPolicy {
    ContextPolicy { window: window as u32, stride: (window as u32 / 2).max(1), bos: Bos::None }
}

/// Reads several sets; a name given twice is an error.
pub fn read_sets(
    files: &[EvalFile],
    tokenizer: &TextTokenizer,
    bounds: Bounds,
    rows: usize,
) -> anyhow::Result<Vec<EvalSet>> {
    for (index, file) in files.iter().enumerate() {
        if files[..index].iter().any(|earlier| earlier.name == file.name) {
            let error = anyhow!("two evaluation sets are named {:?}; give each its own name", file.name);
            return Err(error).or_usage();
        }
    }
    files.iter().map(|file| EvalSet::read(file, tokenizer, bounds, rows)).collect()
}
