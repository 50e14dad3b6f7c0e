//! Documents to packed sequences: no token is predicted twice and none is left out.
//!
//! Documents fill rows in stream order. One that does not fit goes on in the next row, after a repeat of the last
//! token read, which is context there and not predicted again. What else a token may look at, and whether a document's
//! first token is predicted, says [`Packing`].

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::batch::{Batch, NO_TARGET};
use crate::document::Document;

/// Fewest tokens that hold a prediction: one to read and one to predict.
const PIECE_TOKENS_MIN: usize = 2;

/// A micro-batch and what it was made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedBatch {
    /// The packed sequences.
    pub batch: Batch,
    /// For each row its pieces, a segment each, in order.
    pub rows: Vec<Vec<Piece>>,
    /// Which of the run's data streams it was read from.
    pub rank: usize,
}

impl PackedBatch {
    /// The piece that the token at a flat position belongs to; `None` in padding.
    pub fn piece_at(&self, index: usize) -> Option<&Piece> {
        let mut column = index % self.batch.len;
        self.rows.get(index / self.batch.len)?.iter().find(|piece| {
            let is_here = column < piece.document.tokens().len();
            column = column.saturating_sub(piece.document.tokens().len());
            is_here
        })
    }
}

/// Shape of the micro-batches to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// Sequences in a micro-batch.
    pub rows: usize,
    /// Tokens in a sequence.
    pub len: usize,
}

/// What is done where one document ends and the next begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packing {
    /// Whether tokens attend to the documents before theirs in a row, and positions run on. Otherwise each piece is a
    /// segment of its own, as the reference model saw it.
    pub attend_across_documents: bool,
    /// What happens to the first token of a document.
    pub first_token: FirstToken,
}

/// What happens to the first token of a document, which no reference loss is known of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FirstToken {
    /// It is read and not predicted
    #[default]
    Skip,
    /// It is predicted from the document before it in its sequence, if there is one; a score that needs a reference
    /// cannot choose it
    Predict,
}

/// Some tokens of a document, to be read in one go.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The tokens, under their document's id.
    pub document: Document,
    /// Index of the first of them in the document.
    pub start: usize,
}

/// Packs documents into micro-batches; what does not fill one waits for the next documents.
#[derive(Debug)]
pub struct Packer {
    shape: BatchShape,
    packing: Packing,
    /// Rows that are full, or will not grow.
    finished: VecDeque<Vec<Piece>>,
    open: Vec<Piece>,
}

impl Packer {
    /// # Panics
    /// When a row could not hold a prediction (fewer than two tokens) or a batch no row.
    pub fn new(shape: BatchShape) -> Self {
        assert!(shape.rows > 0 && shape.len >= PIECE_TOKENS_MIN, "a batch must hold at least one prediction");
        Self { shape, packing: Packing::default(), finished: VecDeque::new(), open: vec![] }
    }

    /// The same packer with another rule for where documents meet.
    #[must_use]
    pub fn packing(self, packing: Packing) -> Self {
        Self { packing, ..self }
    }

    /// The same packer with rows that an earlier one has left: those that will not grow, and the open one.
    #[must_use]
    pub fn holding(self, finished: Vec<Vec<Piece>>, open: Vec<Piece>) -> Self {
        Self { finished: finished.into(), open, ..self }
    }

    /// Rows that will not grow, and wait for enough of them.
    pub fn finished(&self) -> impl Iterator<Item = &[Piece]> {
        self.finished.iter().map(Vec::as_slice)
    }

    /// The row that the next document goes into.
    pub fn open(&self) -> &[Piece] {
        &self.open
    }

    /// Adds a document. One with fewer than two tokens predicts nothing and leaves no trace.
    pub fn push(&mut self, document: &Document) {
        let length = document.tokens().len();
        let mut start = 0;
        while length - start >= PIECE_TOKENS_MIN {
            if self.room() < PIECE_TOKENS_MIN {
                self.close_row();
            }
            let end = length.min(start + self.room());
            self.open.push(Piece { document: document.slice(start..end), start });
            // The last token read is read again in the next row, so that it can predict its successor there.
            start = if end == length { end } else { end - 1 };
        }
    }

    /// The next full batch, if the documents pushed so far fill one.
    pub fn next_batch(&mut self) -> Option<PackedBatch> {
        self.fills(1).then(|| self.take_rows(self.shape.rows))
    }

    /// Whether the documents pushed so far fill `count` batches.
    pub fn fills(&mut self, count: usize) -> bool {
        if self.room() < PIECE_TOKENS_MIN {
            self.close_row();
        }
        self.finished.len() >= count * self.shape.rows
    }

    /// What is left at the end of a stream, in batches of at most the usual number of rows; `None` when empty.
    pub fn flush(&mut self) -> Option<PackedBatch> {
        if !self.open.is_empty() {
            self.close_row();
        }
        let rows = self.finished.len().min(self.shape.rows);
        (rows > 0).then(|| self.take_rows(rows))
    }

    /// Takes back the batch that was given out last: it will be given out again.
    pub fn put_back(&mut self, packed: PackedBatch) {
        packed.rows.into_iter().rev().for_each(|row| self.finished.push_front(row));
    }

    /// Tokens that the open row has room for.
    fn room(&self) -> usize {
        self.shape.len - self.open.iter().map(|piece| piece.document.tokens().len()).sum::<usize>()
    }

    fn close_row(&mut self) {
        self.finished.push_back(std::mem::take(&mut self.open));
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

/// Adds a row's piece (counted from 1): every token but the last predicts its successor.
fn append(batch: &mut Batch, piece: &Piece, number: u32, packing: Packing) {
    let Piece { document, start } = piece;
    let tokens = document.tokens();
    let before = (batch.tokens.len() % batch.len) as u32;
    // A piece that goes on with a document begins with a token that has been predicted already.
    if packing.first_token == FirstToken::Predict && number > 1 && *start == 0 {
        let last = batch.targets.len() - 1;
        batch.targets[last] = tokens[0];
    }
    let (segment, position) = if packing.attend_across_documents { (1, before) } else { (number, 0) };
    batch.tokens.extend_from_slice(tokens);
    batch.segments.extend(std::iter::repeat_n(segment, tokens.len()));
    batch.positions.extend(position..position + tokens.len() as u32);
    batch.targets.extend_from_slice(&tokens[1..]);
    batch.targets.push(NO_TARGET);
    batch.reference.extend_from_slice(&document.reference()[1..]);
    batch.reference.push(f32::NAN);
    batch.reference_entropy.extend_from_slice(&document.reference_entropy()[1..]);
    batch.reference_entropy.push(f32::NAN);
}

fn pad(batch: &mut Batch, len: usize) {
    batch.tokens.resize(len, 0);
    batch.segments.resize(len, 0);
    batch.positions.resize(len, 0);
    batch.targets.resize(len, NO_TARGET);
    batch.reference.resize(len, f32::NAN);
    batch.reference_entropy.resize(len, f32::NAN);
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
