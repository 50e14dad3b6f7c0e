//! Documents to windows: what the model sees at once, and which tokens it scores there.

use std::ops::Range;
use std::sync::Arc;

use sluice_schemas::record::{Bos, ContextPolicy};

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
    /// First token, as an index into the document, whose loss this window gives; the last is `span.end - 1`.
    pub first_scored: usize,
}

impl Window {
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
        self.first_scored..self.span.end
    }
}

/// Cuts a document into windows such that every token that can be predicted is scored exactly once, each with as much
/// of what stands before it as the windows have on offer: windows start every `stride` tokens, a token belongs to the
/// first window that can predict it, and the last window is moved back to be full.
///
/// A BOS token takes one of a window's places. A document that begins with that token gets no second one, and like a
/// document without BOS its first token is not scored; one of a single token then has no windows.
pub fn windows(document: u64, tokens: &Arc<[u32]>, policy: ContextPolicy) -> Vec<Window> {
    let (window, stride) = (policy.window as usize, policy.stride as usize);
    let begins_with = |token: u32| tokens.first() == Some(&token);
    let bos_at = |start: usize| match policy.bos {
        Bos::Document(token) if start == 0 && !begins_with(token) => Some(token),
        Bos::Window(token) if start > 0 || !begins_with(token) => Some(token),
        _ => None,
    };
    // Places for the document's own tokens.
    let room = |start: usize| window - usize::from(bos_at(start).is_some());

    let mut windows = Vec::new();
    let mut first_scored = usize::from(bos_at(0).is_none());
    let mut start = 0;
    while first_scored < tokens.len() {
        let mut end = start + room(start);
        if end >= tokens.len() {
            end = tokens.len();
            // The first window cannot be moved; a later one never back to the beginning, where the first stands.
            start = if start == 0 { 0 } else { end.saturating_sub(room(start)).max(1) };
        }
        let span = start..end;
        windows.push(Window { document, tokens: Arc::clone(tokens), span, bos: bos_at(start), first_scored });
        first_scored = end;
        start += stride;
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOS: u32 = 7777;

    fn policies() -> impl Iterator<Item = ContextPolicy> {
        let sizes = [(2, 1), (3, 1), (8, 4), (8, 6), (9, 3), (64, 32), (64, 1), (64, 62)];
        sizes.into_iter().flat_map(|(window, stride)| {
            [Bos::None, Bos::Document(BOS), Bos::Window(BOS)]
                .into_iter()
                // A BOS takes a place, and windows must still overlap.
                .filter(move |&bos| bos == Bos::None || stride + 1 < window)
                .map(move |bos| ContextPolicy { window, stride, bos })
        })
    }

    #[test]
    fn every_token_is_scored_once_with_enough_context() {
        for policy in policies() {
            for len in 0..200 {
                let document: Arc<[u32]> = (0..len).collect();
                let mut scored = Vec::new();
                for part in windows(0, &document, policy) {
                    assert!(part.len() <= policy.window as usize);
                    let context = part.first_scored - part.span.start;
                    assert!(context + usize::from(part.bos.is_some()) > 0, "a token needs one before it");
                    let promised = if part.span.start == 0 {
                        usize::from(part.bos.is_none())
                    } else {
                        (policy.window - policy.stride) as usize - usize::from(policy.bos != Bos::None)
                    };
                    assert!(
                        context >= promised,
                        "{context} tokens of context, {promised} promised: {policy:?}"
                    );
                    scored.extend(part.scored());
                }
                let first = usize::from(policy.bos == Bos::None);
                assert_eq!(
                    scored,
                    (first..(len as usize).max(first)).collect::<Vec<_>>(),
                    "{policy:?} {len}"
                );
            }
        }
    }

    #[test]
    fn a_bos_token_stands_where_the_policy_says() {
        let document: Arc<[u32]> = (0..20).collect();
        let at = |bos| {
            let policy = ContextPolicy { window: 8, stride: 4, bos };
            windows(0, &document, policy).iter().map(|w| w.bos == Some(BOS)).collect::<Vec<_>>()
        };
        assert!(at(Bos::None).iter().all(|bos| !bos));
        assert!(at(Bos::Document(BOS))[0] && at(Bos::Document(BOS))[1..].iter().all(|bos| !bos));
        assert!(at(Bos::Window(BOS)).iter().all(|bos| *bos));
    }

    #[test]
    fn a_document_that_begins_with_bos_gets_no_second_one() {
        for bos in [Bos::Document(BOS), Bos::Window(BOS)] {
            let policy = ContextPolicy { window: 8, stride: 4, bos };
            let document: Arc<[u32]> = [BOS, 1, 2].into();
            let cut = windows(0, &document, policy);
            assert_eq!((cut.len(), cut[0].bos, cut[0].first_scored), (1, None, 1));
            assert_eq!(windows(0, &[BOS].into(), policy), []);
            assert_eq!(windows(0, &[1].into(), policy).len(), 1, "one token can be predicted from BOS");
        }
    }
}
