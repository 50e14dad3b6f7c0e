//! A few documents of the stream with what was thought of each of their tokens.

use serde::{Deserialize, Serialize};
use sluice_feed::batch::PackedBatch;
use sluice_feed::document::Document;
use sluice_feed::pack::{BatchShape, Packer};
use sluice_feed::select::{Objective, Signals, Thresholds, Turn};

use crate::text::TextTokenizer;
use crate::training::learner::{Learner, Measured};

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

/// Chooses documents from the first micro-batches of a run, by order and source alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PictureDocuments {
    chosen: Vec<ChosenDocument>,
    seen: usize,
}

/// A document of the picture, as a checkpoint keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct ChosenDocument {
    id: String,
    source: String,
    tokens: Vec<u32>,
    /// Bits of the reference losses: JSON has no NaN, and decimals need not come back as the same numbers.
    reference_bits: Vec<u32>,
    /// Bits of what a token classifier says; absent where none has scored the document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attribute_bits: Option<Vec<u32>>,
}

impl ChosenDocument {
    fn of(document: &Document) -> Self {
        let tokens = document.tokens().len().min(TOKENS_MAX);
        let bits = |values: &[f32]| values[..tokens].iter().map(|value| value.to_bits()).collect();
        Self {
            id: document.id().to_owned(),
            source: document.source().to_owned(),
            tokens: document.tokens()[..tokens].to_vec(),
            reference_bits: bits(document.reference()),
            attribute_bits: document.attribute().map(bits),
        }
    }

    fn document(&self) -> Document {
        let values = |bits: &[u32]| bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        let Self { id, source, tokens, reference_bits, attribute_bits } = self.clone();
        let scored = Document::scored(id.clone(), source.clone(), tokens.clone(), values(&reference_bits));
        let scored = match attribute_bits {
            Some(bits) => scored.and_then(|document| document.with_attribute(values(&bits))),
            None => scored,
        };
        // Only a damaged file has fewer values than tokens, and a picture can do without.
        scored.unwrap_or_else(|_| Document::plain(id, source, tokens))
    }
}

impl PictureDocuments {
    /// Looks at the documents that begin in a micro-batch.
    pub fn offer(&mut self, packed: &PackedBatch) {
        for piece in packed.rows.iter().flatten().filter(|piece| piece.start == 0) {
            if self.chosen.len() == DOCUMENTS_MAX || self.seen == DOCUMENTS_SEEN_MAX {
                return;
            }
            self.seen += 1;
            let document = &piece.document;
            let same_source = self.chosen.iter().filter(|chosen| chosen.source == document.source()).count();
            if document.tokens().len() >= TOKENS_MIN && same_source < DOCUMENTS_PER_SOURCE_MAX {
                self.chosen.push(ChosenDocument::of(document));
            }
        }
    }

    /// Whether every chosen document has token ids below `vocabulary`.
    pub fn fits(&self, vocabulary: u32) -> bool {
        self.chosen.iter().flat_map(|document| &document.tokens).all(|&token| token < vocabulary)
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
            let document = document.document().truncated(sequence_length);
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
        let choices = self.objective.select(&[signals], row_len, turn, &Thresholds::default());
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
    packer.close();
    let batch = packer.next_batch().map(|row| row.batch).unwrap_or_default();
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
