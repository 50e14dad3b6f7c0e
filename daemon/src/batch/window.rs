//! Documents to windows: what the model sees at once, and which tokens it scores there.

use std::ops::Range;
use std::sync::Arc;

use sluice_schemas::record::ContextPolicy;
use sluice_schemas::{ClassifiedSpan, WindowSpan};

/// A class of a token classifier, whose probability at each token is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenClass {
    /// Its index among the model's classes.
    pub index: u32,
    /// What the model calls it.
    pub name: String,
    /// Whether the model sees what follows a token, too, as most encoders do.
    pub both_sides: bool,
}

/// A run of a document's tokens that the model sees at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Which document, as a number that the caller chose.
    pub document: u64,
    /// The whole document's tokens.
    pub tokens: Arc<[u32]>,
    /// The part that the model sees.
    pub span: Range<usize>,
    /// What stands before that part.
    pub bos: Option<u32>,
    /// First token, as an index into the document, of which this window gives a loss.
    pub first_scored: usize,
    /// The index after the last of them.
    pub scored_end: usize,
    /// The class whose loss is asked for at each token; without one it is the loss of the token itself, under those before it.
    pub class: Option<u32>,
}

impl Window {
    /// All of `tokens` at once, with nothing before them. Of `class` every token has a loss; without one all but the first have.
    pub fn whole(document: u64, tokens: Arc<[u32]>, class: Option<u32>) -> Self {
        let len = tokens.len();
        let first_scored = usize::from(class.is_none());
        Self { document, tokens, span: 0..len, bos: None, first_scored, scored_end: len, class }
    }

    /// Tokens that the model sees, the one before the document's own included.
    pub fn len(&self) -> usize {
        self.span.len() + usize::from(self.bos.is_some())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The token ids that the model sees, in order.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.bos.into_iter().chain(self.tokens[self.span.clone()].iter().copied())
    }

    /// The tokens, as indices into the document, whose losses this window gives.
    pub fn scored(&self) -> Range<usize> {
        self.first_scored..self.scored_end
    }

    /// Index of the first of them among the ids that the model sees.
    pub fn first_position(&self) -> usize {
        self.first_scored - self.span.start + usize::from(self.bos.is_some())
    }
}

/// Cuts a document into the windows that `policy` asks for, as [`sluice_schemas::windows()`] has it.
pub fn windows(document: u64, tokens: &Arc<[u32]>, policy: ContextPolicy) -> Vec<Window> {
    let spans = sluice_schemas::windows(tokens, policy).into_iter();
    spans
        .map(|WindowSpan { span, bos, first_scored }| Window {
            document,
            tokens: Arc::clone(tokens),
            scored_end: span.end,
            span,
            bos,
            first_scored,
            class: None,
        })
        .collect()
}

/// The same for what is asked of each token: the probability of `class`, as [`sluice_schemas::classified_windows()`] has it, or
/// without one its loss.
pub fn windows_of(
    document: u64,
    tokens: &Arc<[u32]>,
    policy: ContextPolicy,
    class: Option<&TokenClass>,
) -> Vec<Window> {
    let Some(class) = class else { return windows(document, tokens, policy) };
    let spans = sluice_schemas::classified_windows(tokens, policy, class.both_sides).into_iter();
    spans
        .map(|ClassifiedSpan { span, bos, scored }| Window {
            document,
            tokens: Arc::clone(tokens),
            span,
            bos,
            first_scored: scored.start,
            scored_end: scored.end,
            class: Some(class.index),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use sluice_schemas::record::Bos;

    use super::*;

    #[test]
    fn a_window_holds_the_ids_that_the_model_sees() {
        let document: Arc<[u32]> = (0..6).collect();
        let policy = ContextPolicy { window: 4, stride: 2, bos: Bos::Window(9) };
        let cut = windows(5, &document, policy);
        assert!(cut.iter().all(|window| window.document == 5 && window.len() == window.ids().count()));
        let ids: Vec<Vec<u32>> = cut.iter().map(|window| window.ids().collect()).collect();
        assert_eq!(ids, [[9, 0, 1, 2], [9, 2, 3, 4], [9, 3, 4, 5]]);
        assert_eq!(cut[1].scored(), 3..5);
    }
}
