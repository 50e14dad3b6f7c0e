//! Documents to packed sequences: no token is predicted twice and none is left out.
//!
//! Documents fill rows in stream order. One that does not fit goes on in the next row, after a repeat of the last
//! token read, which is context there and not predicted again. Positions restart at 0 in each piece, and tokens
//! of different pieces never attend to each other.

use std::collections::VecDeque;

use crate::batch::{Batch, NO_TARGET};
use crate::document::Document;
use crate::sources::SourceNames;

/// Fewest tokens that hold a prediction: one to read and one to predict.
const PIECE_TOKENS_MIN: usize = 2;

/// A micro-batch and what it was made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedBatch {
    /// The packed sequences.
    pub batch: Batch,
    /// For each row its pieces, a segment each, in order.
    pub rows: Vec<Vec<Piece>>,
    /// For each row the source index ([`SourceNames`]) of each of its segments.
    pub sources: Vec<Vec<u16>>,
}

impl PackedBatch {
    /// Source index of the token at a flat position; `None` in padding.
    pub fn source_at(&self, index: usize) -> Option<u16> {
        let row = index / self.batch.len;
        let segment = *self.batch.segments.get(index)? as usize;
        self.sources.get(row)?.get(segment.checked_sub(1)?).copied()
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
    /// Rows that are full, or will not grow.
    finished: VecDeque<Vec<Piece>>,
    open: Vec<Piece>,
    sources: SourceNames,
}

impl Packer {
    /// # Panics
    /// When a row could not hold a prediction (fewer than two tokens) or a batch no row.
    pub fn new(shape: BatchShape) -> Self {
        assert!(shape.rows > 0 && shape.len >= PIECE_TOKENS_MIN, "a batch must hold at least one prediction");
        Self { shape, finished: VecDeque::new(), open: vec![], sources: SourceNames::default() }
    }

    /// Names of the sources that the batches' source indices stand for.
    pub fn sources(&self) -> &SourceNames {
        &self.sources
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
        self.next_batches(1).and_then(|mut batches| batches.pop())
    }

    /// The next `count` full batches, if the documents pushed so far fill all of them.
    pub fn next_batches(&mut self, count: usize) -> Option<Vec<PackedBatch>> {
        if self.room() < PIECE_TOKENS_MIN {
            self.close_row();
        }
        let is_filled = self.finished.len() >= count * self.shape.rows;
        is_filled.then(|| (0..count).map(|_| self.take_rows(self.shape.rows)).collect())
    }

    /// What is left at the end of a stream, in batches of at most the usual number of rows; `None` when empty.
    pub fn flush(&mut self) -> Option<PackedBatch> {
        if !self.open.is_empty() {
            self.close_row();
        }
        let rows = self.finished.len().min(self.shape.rows);
        (rows > 0).then(|| self.take_rows(rows))
    }

    /// Takes back batches that were given out last, in their order: they will be given out again.
    pub fn put_back(&mut self, batches: Vec<PackedBatch>) {
        let rows = batches.into_iter().flat_map(|packed| packed.rows).collect::<Vec<_>>();
        rows.into_iter().rev().for_each(|row| self.finished.push_front(row));
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
            for (segment, piece) in (1..).zip(&pieces) {
                append(&mut packed.batch, &piece.document, segment);
            }
            pad(&mut packed.batch, number * len);
            let index = |piece: &Piece| self.sources.index(piece.document.source());
            packed.sources.push(pieces.iter().map(index).collect());
            packed.rows.push(pieces);
        }
        packed
    }
}

/// Adds a piece of a document: every token but the last predicts its successor.
fn append(batch: &mut Batch, document: &Document, segment: u32) {
    let tokens = document.tokens();
    batch.tokens.extend_from_slice(tokens);
    batch.segments.extend(std::iter::repeat_n(segment, tokens.len()));
    batch.positions.extend(0..tokens.len() as u32);
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
