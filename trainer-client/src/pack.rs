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

/// A batch and where each of its pieces came from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedBatch {
    /// The packed sequences.
    pub batch: Batch,
    /// For each row the source index ([`SourceNames`]) of each of its segments, in order.
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

/// Shape of the batches to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// Sequences in a batch.
    pub rows: usize,
    /// Tokens in a sequence.
    pub len: usize,
}

/// Packs documents into batches; what does not fill a batch waits for the next documents.
#[derive(Debug)]
pub struct Packer {
    shape: BatchShape,
    finished: VecDeque<Row>,
    open: Row,
    sources: SourceNames,
}

impl Packer {
    /// # Panics
    /// When a row could not hold a prediction (fewer than two tokens) or a batch no row.
    pub fn new(shape: BatchShape) -> Self {
        assert!(shape.rows > 0 && shape.len >= PIECE_TOKENS_MIN, "a batch must hold at least one prediction");
        Self { shape, finished: VecDeque::new(), open: Row::default(), sources: SourceNames::default() }
    }

    /// Names of the sources that the batches' source indices stand for.
    pub fn sources(&self) -> &SourceNames {
        &self.sources
    }

    /// Adds a document. One with fewer than two tokens predicts nothing and leaves no trace.
    pub fn push(&mut self, document: &Document) {
        let tokens = document.tokens();
        let source = self.sources.index(document.source());
        let mut start = 0;
        while tokens.len() - start >= PIECE_TOKENS_MIN {
            if self.shape.len - self.open.tokens.len() < PIECE_TOKENS_MIN {
                self.close_row();
            }
            let end = tokens.len().min(start + self.shape.len - self.open.tokens.len());
            self.open.append(&tokens[start..end], &document.reference()[start..end], source);
            // The last token read is read again in the next row, so that it can predict its successor there.
            start = if end == tokens.len() { end } else { end - 1 };
        }
    }

    /// The next full batch, if the documents pushed so far fill one.
    pub fn next_batch(&mut self) -> Option<PackedBatch> {
        if self.shape.len - self.open.tokens.len() < PIECE_TOKENS_MIN {
            self.close_row();
        }
        (self.finished.len() >= self.shape.rows).then(|| self.take_rows(self.shape.rows))
    }

    /// What is left at the end of a stream, in batches of at most the usual number of rows; `None` when empty.
    pub fn flush(&mut self) -> Option<PackedBatch> {
        if !self.open.tokens.is_empty() {
            self.close_row();
        }
        let rows = self.finished.len().min(self.shape.rows);
        (rows > 0).then(|| self.take_rows(rows))
    }

    fn close_row(&mut self) {
        let mut row = std::mem::take(&mut self.open);
        row.pad(self.shape.len);
        self.finished.push_back(row);
    }

    fn take_rows(&mut self, rows: usize) -> PackedBatch {
        let mut packed =
            PackedBatch { batch: Batch { rows, len: self.shape.len, ..Batch::default() }, sources: vec![] };
        for row in self.finished.drain(..rows) {
            packed.batch.tokens.extend(row.tokens);
            packed.batch.segments.extend(row.segments);
            packed.batch.positions.extend(row.positions);
            packed.batch.targets.extend(row.targets);
            packed.batch.reference.extend(row.reference);
            packed.sources.push(row.sources);
        }
        packed
    }
}

/// One sequence under construction.
#[derive(Debug, Default)]
struct Row {
    tokens: Vec<u32>,
    segments: Vec<u32>,
    positions: Vec<u32>,
    targets: Vec<u32>,
    reference: Vec<f32>,
    sources: Vec<u16>,
}

impl Row {
    /// Adds a piece of a document: every token but the last predicts its successor.
    fn append(&mut self, tokens: &[u32], reference: &[f32], source: u16) {
        self.sources.push(source);
        self.tokens.extend_from_slice(tokens);
        self.segments.extend(std::iter::repeat_n(self.sources.len() as u32, tokens.len()));
        self.positions.extend(0..tokens.len() as u32);
        self.targets.extend_from_slice(&tokens[1..]);
        self.targets.push(NO_TARGET);
        self.reference.extend_from_slice(&reference[1..]);
        self.reference.push(f32::NAN);
    }

    fn pad(&mut self, len: usize) {
        self.tokens.resize(len, 0);
        self.segments.resize(len, 0);
        self.positions.resize(len, 0);
        self.targets.resize(len, NO_TARGET);
        self.reference.resize(len, f32::NAN);
    }
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
