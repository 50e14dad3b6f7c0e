//! A few documents of the stream with what was thought of each of their tokens.

use serde::{Deserialize, Serialize};

use crate::document::Document;
use crate::learner::{Learner, Measured};
use crate::pack::{BatchShape, Packer};
use crate::select::{Objective, Signals, Thresholds, Turn};
use crate::text::TextTokenizer;

/// Documents in a picture.
const DOCUMENTS_MAX: usize = 6;
/// Documents in a picture from one source, so that each source has its turn.
const DOCUMENTS_PER_SOURCE_MAX: usize = 2;
/// Documents looked at for a picture.
const DOCUMENTS_SEEN_MAX: usize = 500;
/// A shorter document shows little.
const TOKENS_MIN: usize = 24;
/// A longer document is cut.
const TOKENS_MAX: usize = 160;

/// The content of a run's `tokens.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenPicture {
    /// Step after which the current losses were taken.
    pub step: u64,
    /// Lowest score that the last step kept, which decides here too; absent where something else decides.
    pub threshold: Option<f32>,
    /// The documents, in stream order.
    pub documents: Vec<PictureDocument>,
}

/// One document of a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PictureDocument {
    /// Its id.
    pub id: String,
    /// Its source.
    pub source: String,
    /// Its tokens, in order.
    pub tokens: Vec<PictureToken>,
}

/// One token of a picture; losses in nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PictureToken {
    /// The text it adds; empty where its character is completed by a later token.
    pub text: String,
    /// Reference loss; absent at a document's first token.
    pub reference: Option<f32>,
    /// Loss of the model in training, when the picture was made; absent at a document's first token.
    pub current: Option<f32>,
    /// `current - reference`.
    pub excess: Option<f32>,
    /// Whether a step would learn from it.
    pub kept: bool,
}

/// Chooses documents from the start of a stream, by order and source alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PictureDocuments {
    chosen: Vec<Document>,
    seen: usize,
}

impl PictureDocuments {
    /// What an earlier run has chosen, after looking at `seen` documents.
    pub fn resumed(chosen: Vec<Document>, seen: usize) -> Self {
        Self { chosen, seen }
    }

    /// The documents chosen so far.
    pub fn chosen(&self) -> &[Document] {
        &self.chosen
    }

    /// Documents looked at so far.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Looks at the next document of the stream.
    pub fn offer(&mut self, document: &Document) {
        if self.chosen.len() == DOCUMENTS_MAX || self.seen == DOCUMENTS_SEEN_MAX {
            return;
        }
        self.seen += 1;
        let same_source = self.chosen.iter().filter(|chosen| chosen.source() == document.source()).count();
        if document.tokens().len() >= TOKENS_MIN && same_source < DOCUMENTS_PER_SOURCE_MAX {
            self.chosen.push(document.clone().truncated(TOKENS_MAX));
        }
    }

    /// The picture under the model as it is now; documents longer than a training sequence are cut to one.
    pub fn draw(
        &self,
        learner: &dyn Learner,
        tokenizer: &TextTokenizer,
        rule: &PictureRule,
        sequence_length: usize,
    ) -> TokenPicture {
        let documents = (0..).zip(&self.chosen).map(|(index, document)| {
            let document = document.clone().truncated(sequence_length);
            draw_document(&document, learner, tokenizer, rule, index)
        });
        TokenPicture { step: rule.turn.step, threshold: rule.threshold, documents: documents.collect() }
    }
}

/// What decides whether a token of a picture counts as kept.
#[derive(Clone, Debug)]
pub struct PictureRule {
    /// The run's objective.
    pub objective: Objective,
    /// Lowest score that the last step kept, where a score decides.
    pub threshold: Option<f32>,
    /// The last step.
    pub turn: Turn,
}

impl PictureRule {
    fn kept(&self, signals: Signals<'_>, document: u64) -> Vec<u32> {
        // Each document has draws of its own.
        let turn = Turn { micro_batch: document, ..self.turn };
        let row_len = signals.loss.len().max(1);
        let mut thresholds = Thresholds::default();
        let choices = self.objective.select(&[signals], row_len, turn, &mut thresholds);
        let Some(choice) = choices.into_iter().next() else { return vec![] };
        match self.threshold {
            // A document alone has no batch to compete in, so the last batch's threshold stands in for it.
            Some(threshold) => {
                let kept = (0..).zip(choice.scores).filter(|&(_, score)| score >= threshold);
                kept.map(|(index, _)| index).collect()
            }
            None => choice.kept,
        }
    }
}

fn draw_document(
    document: &Document,
    learner: &dyn Learner,
    tokenizer: &TextTokenizer,
    rule: &PictureRule,
    index: u64,
) -> PictureDocument {
    let mut packer = Packer::new(BatchShape { rows: 1, len: document.tokens().len() });
    packer.push(document);
    let batch = packer.flush().map(|row| row.batch).unwrap_or_default();
    let measured = match batch.rows {
        0 => Measured::default(),
        _ => learner.measure(&batch, rule.objective.needs()),
    };
    let mut kept = vec![false; batch.tokens.len() + 1];
    for position in rule.kept(measured.signals(&batch), index) {
        // Position i of a batch is about the token after it.
        kept[position as usize + 1] = true;
    }
    let (current, reference) = (measured.losses, batch.reference);
    let finite = |losses: &[f32], position: usize| {
        position.checked_sub(1).and_then(|before| losses.get(before)).copied().filter(|loss| loss.is_finite())
    };
    let tokens = tokenizer.pieces(document.tokens()).into_iter().enumerate().map(|(position, text)| {
        let (reference, current) = (finite(&reference, position), finite(&current, position));
        let excess = current.zip(reference).map(|(current, reference)| current - reference);
        PictureToken { text, reference, current, excess, kept: kept[position] }
    });
    PictureDocument {
        id: document.id().to_owned(),
        source: document.source().to_owned(),
        tokens: tokens.collect(),
    }
}
