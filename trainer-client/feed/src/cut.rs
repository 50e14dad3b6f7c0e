//! Documents to pieces: what a row holds of a document, such that a token is predicted under the context that its
//! reference loss was computed in.
//!
//! The reference reads a document in windows (`context.window`, `context.stride`), each from position 0. A document is
//! cut into the same windows here: what a window repeats is read and not predicted. Only where a window does not fit a
//! row, the contexts cannot be equal. What a token classifier says of a token is no loss, and is compared with none: such a
//! document is cut as one that nobody scored.

use serde::{Deserialize, Serialize};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_schemas::windows::windows;

use crate::document::Document;

/// Fewest tokens that hold a prediction: one to read and one to predict.
pub(crate) const PIECE_TOKENS_MIN: usize = 2;

/// Some tokens of a document, to be read in one go.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The tokens, under their document's id.
    pub document: Document,
    /// Index of the first of them in the document.
    pub start: usize,
    /// Index within the piece of the first token that is predicted in it. The tokens before it are context: they are
    /// predicted in another piece, or not at all.
    pub first_predicted: usize,
    /// The token that the reference saw before these, which is read and not one of the document's.
    pub bos: Option<u32>,
}

impl Piece {
    /// Tokens that the piece takes of a row, that before the document's own included.
    pub fn len(&self) -> usize {
        self.document.tokens().len() + usize::from(self.bos.is_some())
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it was scored and has lost what the reference said of it, because it is read under another context.
    pub fn is_masked(&self) -> bool {
        self.document.compared_context().is_some()
            && self.document.reference().iter().all(|loss| loss.is_nan())
    }

    /// The same tokens, of which the reference says nothing.
    fn without_reference(mut self) -> Self {
        self.document.forget_reference();
        self
    }
}

/// What is done with tokens that cannot be read under the contexts of their reference losses, which is where the
/// reference's windows are longer than a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnequalContexts {
    /// The stream ends with an error at the first document that has such tokens.
    Refuse,
    /// They lose what the reference says of them, so that no score that looks at it can choose them.
    #[default]
    Mask,
    /// They are ranked like all others.
    Allow,
}

/// Whether a document of so many tokens is read in rows of `row` as the reference read it.
pub(crate) fn has_equal_contexts(tokens: usize, policy: ContextPolicy, row: usize) -> bool {
    let places = tokens.saturating_add(usize::from(policy.bos != Bos::None));
    policy.window as usize <= row || places <= row
}

/// The pieces of a document for rows of `row` tokens, in order. Every token that can be predicted is predicted in
/// exactly one of them; a document without such a token has no piece.
pub(crate) fn cut(document: &Document, row: usize, unequal: UnequalContexts) -> Vec<Piece> {
    let Some(policy) = document.compared_context() else { return cut_plain(document, row) };
    let bos_places = usize::from(policy.bos != Bos::None);
    let fits = document.tokens().len() + bos_places <= row;
    let is_allowed = unequal == UnequalContexts::Allow;
    if !fits && row < PIECE_TOKENS_MIN + bos_places {
        // No window with a BOS fits.
        let pieces = cut_plain(document, row).into_iter();
        return pieces.map(|piece| if is_allowed { piece } else { piece.without_reference() }).collect();
    }
    if has_equal_contexts(document.tokens().len(), policy, row) {
        return cut_windows(document, policy);
    }
    // The first piece begins as the reference's first window does, so what it holds has equal contexts.
    let pieces = cut_windows(document, shorter(policy, row)).into_iter().enumerate();
    let is_unequal = |index: usize| index > 0 && !is_allowed;
    pieces.map(|(index, piece)| if is_unequal(index) { piece.without_reference() } else { piece }).collect()
}

/// A policy of the same kind whose windows fit a row, with the same share of overlap.
fn shorter(policy: ContextPolicy, row: usize) -> ContextPolicy {
    let window = u32::try_from(row).unwrap_or(u32::MAX);
    let stride = u64::from(policy.stride) * u64::from(window) / u64::from(policy.window.max(1));
    ContextPolicy { window, stride: stride as u32, ..policy }
}

fn cut_windows(document: &Document, policy: ContextPolicy) -> Vec<Piece> {
    windows(document.tokens(), policy)
        .into_iter()
        .map(|window| Piece {
            document: document.slice(window.span.clone()),
            start: window.span.start,
            first_predicted: window.first_scored - window.span.start,
            bos: window.bos,
        })
        .collect()
}

/// Runs of `row` tokens, each beginning with the last token of the one before it.
fn cut_plain(document: &Document, row: usize) -> Vec<Piece> {
    let length = document.tokens().len();
    let mut pieces = Vec::new();
    let mut start = 0;
    while length - start >= PIECE_TOKENS_MIN {
        let end = length.min(start + row);
        pieces.push(Piece { document: document.slice(start..end), start, first_predicted: 1, bos: None });
        start = if end == length { end } else { end - 1 };
    }
    pieces
}

#[cfg(test)]
#[path = "cut_tests.rs"]
mod tests;
