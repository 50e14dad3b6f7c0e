//! Documents to packed sequences, by best fit: no document that fits a row is cut (Ding et al., "Fewer Truncations
//! Improve Language Modeling", arXiv 2404.10830, whose best-fit-decreasing runs here over a window of the stream).
//!
//! Documents are cut into pieces that fit a row (`cut`). A piece that fills one is a row at once. The others wait until as
//! many tokens do as [`ROWS_AHEAD`] rows hold; then a row is made of the piece that has waited longest, and of the longest piece
//! that still fits, again and again. So no piece is passed over by more such rows than there are pieces before it, and rows
//! depend on the order of the documents alone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::batch::{Batch, NO_TARGET, PackedBatch};
use crate::cut::{PIECE_TOKENS_MIN, Piece, UnequalContexts, cut};
use crate::document::Document;

/// Rows' worth of tokens that wait to be packed, in each lane. More of them pad less and hold more in memory: see
/// `benches/README.md`.
pub const ROWS_AHEAD: usize = 16;

/// Shape of the micro-batches to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchShape {
    /// Sequences in a micro-batch.
    pub rows: usize,
    /// Tokens in a sequence.
    pub len: usize,
}

/// What a token may look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packing {
    /// Whether tokens attend to the documents before theirs in a row, and positions run on. Otherwise each piece is a
    /// segment of its own, as the reference model saw it.
    pub attend_across_documents: bool,
    /// What happens to the first token of a document.
    pub first_token: FirstToken,
    /// What happens to tokens that a row cannot hold the reference's context of.
    pub unequal_contexts: UnequalContexts,
}

/// What happens to the first token of a document before which the reference saw nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FirstToken {
    /// It is read and not predicted.
    #[default]
    Skip,
    /// It is predicted from the document before it in its sequence, if there is one; it keeps its reference loss, if it
    /// has one, and otherwise a score that needs a reference cannot choose it.
    Predict,
}

/// Packs documents into micro-batches; what does not fill one waits for the next documents.
#[derive(Clone, Debug)]
pub struct Packer {
    shape: BatchShape,
    packing: Packing,
    /// Rows that are made, and wait for enough of them.
    finished: VecDeque<Vec<Piece>>,
    waiting: Waiting,
    rows_ahead: usize,
}

impl Packer {
    /// # Panics
    /// When a row could not hold a prediction (fewer than two tokens) or a batch no row.
    pub fn new(shape: BatchShape) -> Self {
        assert!(shape.rows > 0 && shape.len >= PIECE_TOKENS_MIN, "a batch must hold at least one prediction");
        Self {
            shape,
            packing: Packing::default(),
            finished: VecDeque::new(),
            waiting: Waiting::default(),
            rows_ahead: ROWS_AHEAD,
        }
    }

    /// The same packer that has so many rows' worth of tokens wait instead of [`ROWS_AHEAD`].
    #[must_use]
    pub fn looking_ahead(self, rows_ahead: usize) -> Self {
        Self { rows_ahead, ..self }
    }

    /// The same packer with another rule for what a token may look at.
    #[must_use]
    pub fn packing(self, packing: Packing) -> Self {
        Self { packing, ..self }
    }

    /// The same packer with what an earlier one has left: rows, and pieces in the order of their arrival.
    #[must_use]
    pub fn holding(mut self, finished: Vec<Vec<Piece>>, waiting: Vec<Piece>) -> Self {
        self.finished = finished.into();
        self.waiting = Waiting::default();
        for piece in waiting {
            self.waiting.push(piece);
        }
        self
    }

    /// Rows that are made, and wait for enough of them.
    pub fn finished(&self) -> impl ExactSizeIterator<Item = &[Piece]> {
        self.finished.iter().map(Vec::as_slice)
    }

    /// Pieces that are in no row yet, in the order of their arrival.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &Piece> {
        self.waiting.pieces.values()
    }

    /// Adds a document. One without a token to predict leaves no trace.
    pub fn push(&mut self, document: &Document) {
        for piece in cut(document, self.shape.len, self.packing.unequal_contexts) {
            // Nothing fits beside it, so it need not wait, nor take up the look-ahead.
            if piece.len() + PIECE_TOKENS_MIN > self.shape.len {
                self.finished.push_back(vec![piece]);
                continue;
            }
            self.waiting.push(piece);
            while self.waiting.tokens > self.rows_ahead * self.shape.len {
                self.finished.push_back(self.waiting.row(self.shape.len));
            }
        }
    }

    /// Makes rows of all that waits, because no document follows.
    pub fn close(&mut self) {
        while self.waiting.tokens > 0 {
            self.finished.push_back(self.waiting.row(self.shape.len));
        }
    }

    /// Whether the rows that are made fill `count` batches.
    pub fn fills(&self, count: usize) -> bool {
        self.finished.len() >= count * self.shape.rows
    }

    /// Batches that the rows which are made come to, the last one perhaps with fewer rows.
    pub fn batches(&self) -> usize {
        self.finished.len().div_ceil(self.shape.rows)
    }

    /// The next batch, of as many rows as there are if they are too few for a whole one; `None` if there is none.
    pub fn next_batch(&mut self) -> Option<PackedBatch> {
        let rows = self.finished.len().min(self.shape.rows);
        (rows > 0).then(|| self.take_rows(rows))
    }

    /// Takes back the batch that was given out last: it will be given out again.
    pub fn put_back(&mut self, packed: PackedBatch) {
        packed.rows.into_iter().rev().for_each(|row| self.finished.push_front(row));
    }

    fn take_rows(&mut self, rows: usize) -> PackedBatch {
        let BatchShape { len, .. } = self.shape;
        let batch = Batch { rows, len, ..Batch::default() };
        let mut packed = PackedBatch { batch, ..PackedBatch::default() };
        for (number, pieces) in (1..).zip(self.finished.drain(..rows)) {
            for (number, piece) in (1..).zip(&pieces) {
                append(&mut packed.batch, piece, number, self.packing);
            }
            pad(&mut packed.batch, number * len);
            packed.rows.push(pieces);
        }
        packed
    }
}

/// A batch of padding alone.
pub fn empty_batch(shape: BatchShape) -> PackedBatch {
    let BatchShape { rows, len } = shape;
    let mut batch = Batch { rows, len, ..Batch::default() };
    pad(&mut batch, rows * len);
    PackedBatch { batch, rows: vec![vec![]; rows], ..PackedBatch::default() }
}

/// Pieces that are in no row yet, by arrival and by length.
#[derive(Clone, Debug, Default)]
struct Waiting {
    pieces: BTreeMap<u64, Piece>,
    /// Length and number of arrival of each.
    lengths: BTreeSet<(usize, u64)>,
    arrivals: u64,
    tokens: usize,
}

impl Waiting {
    fn push(&mut self, piece: Piece) {
        self.tokens += piece.len();
        self.lengths.insert((piece.len(), self.arrivals));
        self.pieces.insert(self.arrivals, piece);
        self.arrivals += 1;
    }

    /// A row of `room` tokens: the piece that has waited longest, and the longest that fit beside it, the one that has
    /// waited longer first.
    fn row(&mut self, room: usize) -> Vec<Piece> {
        let mut row = Vec::new();
        let mut left = room;
        let mut next = self.pieces.keys().next().copied();
        while let Some(piece) = next.and_then(|number| self.take(number)) {
            left = left.saturating_sub(piece.len());
            row.push(piece);
            next = self.longest(left);
        }
        row
    }

    /// The longest piece of at most `length` tokens; of several, the one that has waited longest.
    fn longest(&self, length: usize) -> Option<u64> {
        let (longest, _) = self.lengths.range(..=(length, u64::MAX)).next_back()?;
        self.lengths.range((*longest, 0)..).next().map(|&(_, number)| number)
    }

    fn take(&mut self, number: u64) -> Option<Piece> {
        let piece = self.pieces.remove(&number)?;
        self.lengths.remove(&(piece.len(), number));
        self.tokens -= piece.len();
        Some(piece)
    }
}

/// Adds a row's piece (counted from 1): every token before one that is predicted in this piece predicts it.
fn append(batch: &mut Batch, piece: &Piece, number: u32, packing: Packing) {
    let Piece { document, start, first_predicted, bos } = piece;
    let tokens = document.tokens();
    let before = (batch.tokens.len() % batch.len) as u32;
    let begins_unpredicted = *start == 0 && bos.is_none();
    if packing.first_token == FirstToken::Predict && number > 1 && begins_unpredicted {
        let last = batch.targets.len() - 1;
        batch.targets[last] = tokens[0];
        batch.reference[last] = document.reference()[0];
        batch.reference_entropy[last] = document.reference_entropy()[0];
        batch.attribute[last] = document.attribute().map_or(f32::NAN, |values| values[0]);
    }
    let (segment, position) = if packing.attend_across_documents { (1, before) } else { (number, 0) };
    batch.tokens.extend(bos);
    batch.tokens.extend_from_slice(tokens);
    batch.segments.extend(std::iter::repeat_n(segment, piece.len()));
    batch.positions.extend(position..position + piece.len() as u32);
    // What a position predicts is the token after it; before the document's first stands a BOS, if any.
    let first_target = usize::from(bos.is_none());
    let (losses, entropies, attribute) =
        (document.reference(), document.reference_entropy(), document.attribute());
    for (index, &token) in tokens.iter().enumerate().skip(first_target) {
        let is_predicted = index >= *first_predicted;
        batch.targets.push(if is_predicted { token } else { NO_TARGET });
        batch.reference.push(if is_predicted { losses[index] } else { f32::NAN });
        batch.reference_entropy.push(if is_predicted { entropies[index] } else { f32::NAN });
        let attribute = attribute.filter(|_| is_predicted);
        batch.attribute.push(attribute.map_or(f32::NAN, |values| values[index]));
    }
    batch.targets.push(NO_TARGET);
    batch.reference.push(f32::NAN);
    batch.reference_entropy.push(f32::NAN);
    batch.attribute.push(f32::NAN);
}

fn pad(batch: &mut Batch, len: usize) {
    batch.tokens.resize(len, 0);
    batch.segments.resize(len, 0);
    batch.positions.resize(len, 0);
    batch.targets.resize(len, NO_TARGET);
    batch.reference.resize(len, f32::NAN);
    batch.reference_entropy.resize(len, f32::NAN);
    batch.attribute.resize(len, f32::NAN);
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
