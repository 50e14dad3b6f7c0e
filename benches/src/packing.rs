//! How well documents fill rows: what is cut, what is padding, what a row teaches, and what is held meanwhile.

use std::collections::HashMap;

use serde::Serialize;
use sluice_feed::cut::Piece;
use sluice_feed::document::Document;
use sluice_feed::pack::{BatchShape, Packer};

use crate::process::cpu_seconds;

/// Shorter times than this say little on a clock of hundredths of a second.
const TIMED_SECONDS_MIN: f64 = 1.0;

/// What documents come to in rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Filled {
    /// Documents that fit a window of the reference, and so a row, and were cut all the same.
    pub documents_cut: usize,
    /// Rows that they filled.
    pub rows: usize,
    /// Places in those rows that hold no token.
    pub padding: usize,
    /// Tokens that are predicted in them.
    pub predictions: usize,
    /// The rows that were made before the end of the stream was known, and
    pub rows_before_end: usize,
    /// the places in them that hold no token.
    pub padding_before_end: usize,
    /// Most tokens that one lane held in pieces at one time, a row that was just made included.
    pub tokens_held_max: usize,
}

impl Filled {
    /// Adds what another lane's documents come to.
    fn add(&mut self, other: &Self) {
        self.documents_cut += other.documents_cut;
        self.rows += other.rows;
        self.padding += other.padding;
        self.predictions += other.predictions;
        self.rows_before_end += other.rows_before_end;
        self.padding_before_end += other.padding_before_end;
        self.tokens_held_max = self.tokens_held_max.max(other.tokens_held_max);
    }
}

/// Deals documents to lanes in turn, in order: what a topic of so many partitions gives.
pub fn dealt(documents: Vec<Document>, lanes: usize) -> Vec<Vec<Document>> {
    let mut dealt = vec![Vec::new(); lanes];
    for (number, document) in documents.into_iter().enumerate() {
        dealt[number % lanes].push(document);
    }
    dealt
}

/// What the packer makes of each lane's documents in rows of `len`, looking so many rows ahead.
pub fn by_best_fit(lanes: &[Vec<Document>], len: usize, rows_ahead: usize) -> Filled {
    let mut filled = Filled::default();
    for documents in lanes {
        filled.add(&lane_by_best_fit(documents, len, rows_ahead));
    }
    filled
}

fn lane_by_best_fit(documents: &[Document], len: usize, rows_ahead: usize) -> Filled {
    let mut packer = Packer::new(BatchShape { rows: 1, len }).looking_ahead(rows_ahead);
    let mut filled = Filled::default();
    let mut pieces: HashMap<String, usize> = HashMap::new();
    for document in documents {
        packer.push(document);
        let held: usize = packer.waiting().chain(packer.finished().flatten()).map(Piece::len).sum();
        filled.tokens_held_max = filled.tokens_held_max.max(held);
        take_rows(&mut packer, &mut filled, &mut pieces);
    }
    (filled.rows_before_end, filled.padding_before_end) = (filled.rows, filled.padding);
    packer.close();
    take_rows(&mut packer, &mut filled, &mut pieces);
    let is_cut = |document: &&Document| {
        let fits =
            document.context().is_none_or(|context| document.tokens().len() <= context.window as usize);
        fits && pieces.get(document.id()).is_some_and(|&count| count > 1)
    };
    filled.documents_cut = documents.iter().filter(is_cut).count();
    filled
}

fn take_rows(packer: &mut Packer, filled: &mut Filled, pieces: &mut HashMap<String, usize>) {
    while let Some(packed) = packer.next_batch() {
        filled.rows += packed.batch.rows;
        filled.padding += packed.batch.segments.iter().filter(|&&segment| segment == 0).count();
        filled.predictions += packed.batch.predictions();
        for piece in packed.rows.iter().flatten() {
            *pieces.entry(piece.document.id().to_owned()).or_default() += 1;
        }
    }
}

/// Tokens of documents that the packer makes rows of in a second of CPU time.
pub fn tokens_a_cpu_second(lanes: &[Vec<Document>], len: usize, rows_ahead: usize) -> anyhow::Result<f64> {
    let me = std::process::id();
    let started = cpu_seconds(me)?;
    let mut tokens = 0;
    loop {
        for documents in lanes {
            let mut packer = Packer::new(BatchShape { rows: 1, len }).looking_ahead(rows_ahead);
            for document in documents {
                packer.push(document);
                tokens += document.tokens().len();
                while packer.next_batch().is_some() {}
            }
            packer.close();
            while packer.next_batch().is_some() {}
        }
        let seconds = cpu_seconds(me)? - started;
        if seconds >= TIMED_SECONDS_MIN {
            return Ok(tokens as f64 / seconds);
        }
    }
}

/// What came of documents of these lengths, lane by lane, before: they filled rows of `len` in the order of the stream and
/// were cut wherever a row ended, to go on in the next one after a repeat of the last token. `window` says which of them
/// count as cut for nothing.
pub fn in_stream_order(lanes: &[Vec<Document>], len: usize, window: usize) -> Filled {
    let mut filled = Filled::default();
    for documents in lanes {
        let lengths = documents.iter().map(|document| document.tokens().len());
        filled.add(&lane_in_stream_order(lengths, len, window));
    }
    filled
}

fn lane_in_stream_order(lengths: impl Iterator<Item = usize>, len: usize, window: usize) -> Filled {
    let mut filled = Filled::default();
    // Of the row that is being filled.
    let mut room = len;
    for length in lengths {
        let (mut start, mut pieces) = (0, 0);
        while length - start >= 2 {
            if room < 2 {
                filled.rows += 1;
                filled.padding += room;
                room = len;
            }
            let end = length.min(start + room);
            room -= end - start;
            filled.predictions += end - start - 1;
            pieces += 1;
            start = if end == length { end } else { end - 1 };
        }
        filled.documents_cut += usize::from(pieces > 1 && length <= window);
        filled.tokens_held_max = filled.tokens_held_max.max(len - room);
    }
    (filled.rows_before_end, filled.padding_before_end) = (filled.rows, filled.padding);
    if room < len {
        filled.rows += 1;
        filled.padding += room;
    }
    filled
}

/// Fewest rows of `len` that pieces of these lengths can be put into whole, by any packing that knows them all: no packing
/// needs fewer, and there may be none that needs so few (the bound L2 of Martello and Toth for bin packing).
pub fn rows_min(pieces: &[usize], len: usize) -> usize {
    let bound = |small: usize| {
        let (mut rows, mut room, mut rest) = (0, 0, 0);
        for &piece in pieces {
            if piece > len - small {
                // Nothing that counts fits beside it.
                rows += 1;
            } else if piece > len / 2 {
                rows += 1;
                room += len - piece;
            } else if piece >= small {
                rest += piece;
            }
        }
        rows + rest.saturating_sub(room).div_ceil(len)
    };
    (0..=len / 2).map(bound).max().unwrap_or(0)
}

/// Lengths of the pieces that rows of `len` are made of.
pub fn piece_lengths(lanes: &[Vec<Document>], len: usize) -> Vec<usize> {
    let mut lengths = Vec::new();
    for documents in lanes {
        // A look-ahead that never ends gives the pieces themselves.
        let mut packer = Packer::new(BatchShape { rows: 1, len }).looking_ahead(usize::MAX / len);
        for document in documents {
            packer.push(document);
        }
        lengths.extend(packer.waiting().map(Piece::len));
    }
    lengths
}

#[cfg(test)]
mod tests {
    use sluice_schemas::record::{Bos, ContextPolicy};

    use super::*;

    fn documents(lengths: &[usize], window: usize) -> Vec<Document> {
        let context = ContextPolicy { window: window as u32, stride: window as u32 * 3 / 4, bos: Bos::None };
        let document = |(number, &length): (usize, &usize)| {
            Document::plain(format!("{number}"), String::new(), vec![1; length]).with_context(context)
        };
        lengths.iter().enumerate().map(document).collect()
    }

    #[test]
    fn in_the_order_of_the_stream_a_document_is_cut_where_a_row_ends() {
        let lanes = [documents(&[5, 6, 1, 4, 12], 8)];
        // Rows: 5 + 3 of 6, whose last 4 follow with the whole of 4, and then 8 of 12 and their last 5.
        let expected = Filled {
            documents_cut: 1,
            rows: 4,
            padding: 3,
            predictions: 4 + 5 + 3 + 11,
            rows_before_end: 3,
            padding_before_end: 0,
            tokens_held_max: 8,
        };
        assert_eq!(in_stream_order(&lanes, 8, 8), expected);
    }

    #[test]
    fn by_best_fit_nothing_that_fits_is_cut_and_what_is_longer_is_read_in_windows() {
        // Windows of 12 tokens: 0..8 and 4..12.
        let lanes = [documents(&[5, 6, 1, 4, 12, 3, 2], 8)];
        let filled = by_best_fit(&lanes, 8, 16);
        let expected = Filled {
            documents_cut: 0,
            rows: 5,
            padding: 4,
            predictions: 4 + 5 + 3 + 11 + 2 + 1,
            rows_before_end: 2,
            padding_before_end: 0,
            tokens_held_max: 31,
        };
        assert_eq!(filled, expected);
        assert_eq!(piece_lengths(&lanes, 8), [5, 6, 4, 8, 8, 3, 2]);
    }

    #[test]
    fn no_packing_needs_fewer_rows_than_the_bound() {
        // No two of these share a row.
        assert_eq!(rows_min(&[5, 5, 5], 8), 3);
        // The places beside them hold two of the small ones.
        assert_eq!(rows_min(&[6, 6, 3, 2, 2], 8), 3);
        assert_eq!(rows_min(&[4, 4, 8], 8), 2);
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..200 {
            let lengths: Vec<usize> = (0..random.usize(1..60)).map(|_| random.usize(2..=32)).collect();
            let lanes = [documents(&lengths, 32)];
            for rows_ahead in [1, 4, 64] {
                let filled = by_best_fit(&lanes, 32, rows_ahead);
                assert!(rows_min(&lengths, 32) <= filled.rows && filled.documents_cut == 0);
                let tokens: usize = lengths.iter().sum();
                assert_eq!(
                    (filled.rows * 32 - filled.padding, filled.predictions),
                    (tokens, tokens - lengths.len())
                );
            }
        }
    }
}
