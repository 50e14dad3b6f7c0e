//! How a document is cut into what a model sees at once. The daemon cuts by it, and so does a trainer that is to
//! compare its own losses with the daemon's.

use std::ops::Range;

use crate::record::{Bos, ContextPolicy};

/// A part of a document that the model sees at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowSpan {
    /// The document's tokens that the model sees.
    pub span: Range<usize>,
    /// The BOS token that stands before them, where one does.
    pub bos: Option<u32>,
    /// First token, as an index into the document, whose loss this window gives; the last is `span.end - 1`.
    pub first_scored: usize,
}

impl WindowSpan {
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
///
/// A policy that would leave a window no place for a token and the one before it is taken as the nearest that does. The
/// daemon refuses such settings, and a record from elsewhere may say anything.
pub fn windows(tokens: &[u32], policy: ContextPolicy) -> Vec<WindowSpan> {
    let layout = Layout::new(tokens, policy);
    let mut windows = Vec::new();
    let mut first_scored = usize::from(layout.bos_at(0).is_none());
    let mut start = 0;
    while first_scored < tokens.len() {
        let span = layout.span(start);
        let end = span.end;
        windows.push(WindowSpan { bos: layout.bos_at(span.start), span, first_scored });
        first_scored = end;
        start += layout.stride;
    }
    windows
}

/// A part of a document that a token classifier sees at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassifiedSpan {
    /// The document's tokens that the model sees.
    pub span: Range<usize>,
    /// The BOS token that stands before them, where one does.
    pub bos: Option<u32>,
    /// The tokens, as indices into the document, whose class this window gives.
    pub scored: Range<usize>,
}

/// Cuts a document into windows for a token classifier, which says of a token what it is where it stands: every token is
/// scored exactly once, the first included. The windows are those of [`windows`], one of a single token among them.
///
/// A classifier that sees both sides of a token gives it a value in the window in whose middle it is nearest, so that the
/// shorter of its two contexts is as long as the windows have on offer: two windows share what they both hold at its middle,
/// and the earlier has one token more where it is odd. One that sees only what stands before a token gives it a value in the
/// first window that holds it, as a causal language model does.
pub fn classified_windows(tokens: &[u32], policy: ContextPolicy, both_sides: bool) -> Vec<ClassifiedSpan> {
    let layout = Layout::new(tokens, policy);
    let mut windows: Vec<ClassifiedSpan> = Vec::new();
    let mut start = 0;
    let mut scored = 0;
    while scored < tokens.len() {
        let span = layout.span(start);
        if let Some(before) = windows.last_mut().filter(|_| both_sides) {
            scored = (before.span.end + span.start).div_ceil(2);
            before.scored.end = scored;
        }
        let end = span.end;
        windows.push(ClassifiedSpan { bos: layout.bos_at(span.start), span, scored: scored..end });
        scored = end;
        start += layout.stride;
    }
    windows
}

/// Where the windows of a document lie.
struct Layout<'a> {
    tokens: &'a [u32],
    window: usize,
    stride: usize,
    bos: Bos,
}

impl<'a> Layout<'a> {
    fn new(tokens: &'a [u32], policy: ContextPolicy) -> Self {
        let bos_places = usize::from(policy.bos != Bos::None);
        let window = (policy.window as usize).max(bos_places + 2);
        let stride = (policy.stride as usize).clamp(1, window - bos_places - 1);
        Self { tokens, window, stride, bos: policy.bos }
    }

    fn bos_at(&self, start: usize) -> Option<u32> {
        let begins_with = |token: u32| self.tokens.first() == Some(&token);
        match self.bos {
            Bos::Document(token) if start == 0 && !begins_with(token) => Some(token),
            Bos::Window(token) if start > 0 || !begins_with(token) => Some(token),
            _ => None,
        }
    }

    /// Places for the document's own tokens.
    fn room(&self, start: usize) -> usize {
        self.window - usize::from(self.bos_at(start).is_some())
    }

    /// The window from `start` on; the last is moved back to be full.
    fn span(&self, start: usize) -> Range<usize> {
        let (end, len) = (start + self.room(start), self.tokens.len());
        if end < len {
            return start..end;
        }
        // The first window cannot be moved; a later one never back to the beginning, where the first stands.
        let start = if start == 0 { 0 } else { len.saturating_sub(self.room(start)).max(1) };
        start..len
    }
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
                let document: Vec<u32> = (0..len).collect();
                let mut scored = Vec::new();
                for part in windows(&document, policy) {
                    assert!(
                        part.span.len() + usize::from(part.bos.is_some()) <= policy.window as usize,
                        "{part:?} {policy:?}"
                    );
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
                assert_eq!(policy.predicts_first(&document), first == 0 && len > 0);
                assert_eq!(
                    scored,
                    (first..(len as usize).max(first)).collect::<Vec<_>>(),
                    "{policy:?} {len}"
                );
            }
        }
    }

    #[test]
    fn the_last_window_is_full() {
        let document: Vec<u32> = (0..11).collect();
        let spans = |bos| {
            windows(&document, ContextPolicy { window: 8, stride: 4, bos })
                .into_iter()
                .map(|part| (part.span, part.first_scored))
                .collect::<Vec<_>>()
        };
        assert_eq!(spans(Bos::None), [(0..8, 1), (3..11, 8)]);
        assert_eq!(spans(Bos::Document(BOS)), [(0..7, 0), (3..11, 7)]);
        assert_eq!(spans(Bos::Window(BOS)), [(0..7, 0), (4..11, 7)]);
    }

    #[test]
    fn a_bos_token_stands_where_the_policy_says() {
        let document: Vec<u32> = (0..20).collect();
        let at = |bos| {
            let policy = ContextPolicy { window: 8, stride: 4, bos };
            windows(&document, policy).iter().map(|part| part.bos == Some(BOS)).collect::<Vec<_>>()
        };
        assert!(at(Bos::None).iter().all(|bos| !bos));
        assert!(at(Bos::Document(BOS))[0] && at(Bos::Document(BOS))[1..].iter().all(|bos| !bos));
        assert!(at(Bos::Window(BOS)).iter().all(|bos| *bos));
    }

    #[test]
    fn a_document_that_begins_with_bos_gets_no_second_one() {
        for bos in [Bos::Document(BOS), Bos::Window(BOS)] {
            let policy = ContextPolicy { window: 8, stride: 4, bos };
            let cut = windows(&[BOS, 1, 2], policy);
            assert_eq!((cut.len(), cut[0].bos, cut[0].first_scored), (1, None, 1));
            assert_eq!(windows(&[BOS], policy), []);
            assert_eq!(windows(&[1], policy).len(), 1, "one token can be predicted from BOS");
        }
    }

    #[test]
    fn a_policy_without_room_still_gives_every_token_one_before_it() {
        let document: Vec<u32> = (0..20).collect();
        for bos in [Bos::None, Bos::Document(BOS), Bos::Window(BOS)] {
            for (window, stride) in [(0, 0), (1, 1), (2, 2), (4, 0), (4, 100), (u32::MAX, u32::MAX)] {
                let cut = windows(&document, ContextPolicy { window, stride, bos });
                let scored: Vec<usize> = cut.iter().flat_map(WindowSpan::scored).collect();
                assert_eq!(scored, (usize::from(bos == Bos::None)..20).collect::<Vec<_>>());
                assert!(cut.iter().all(|part| part.bos.is_some() || part.first_scored > part.span.start));
            }
        }
    }

    #[test]
    fn a_classifier_gives_every_token_one_value_where_it_has_most_context() {
        for policy in policies() {
            for len in 0..200 {
                let document: Vec<u32> = (0..len).collect();
                for both_sides in [true, false] {
                    let cut = classified_windows(&document, policy, both_sides);
                    let scored: Vec<usize> = cut.iter().flat_map(|part| part.scored.clone()).collect();
                    assert_eq!(scored, (0..len as usize).collect::<Vec<_>>(), "{policy:?} {len}");
                    // Beyond the ends of the document there is nothing to see.
                    let before = |span: &Range<usize>, at: usize| {
                        if span.start == 0 { usize::MAX } else { at - span.start }
                    };
                    let after = |span: &Range<usize>, at: usize| {
                        if span.end == document.len() { usize::MAX } else { span.end - 1 - at }
                    };
                    let context = |span: &Range<usize>, at: usize| {
                        if both_sides { before(span, at).min(after(span, at)) } else { before(span, at) }
                    };
                    for part in &cut {
                        assert!(part.span.len() + usize::from(part.bos.is_some()) <= policy.window as usize);
                        assert!(!part.scored.is_empty(), "{policy:?} {len}: {part:?} is run for nothing");
                        for at in part.scored.clone() {
                            let most = cut.iter().filter(|other| other.span.contains(&at));
                            let most = most.map(|other| context(&other.span, at)).max();
                            assert_eq!(Some(context(&part.span, at)), most, "{policy:?} {len} {at} {cut:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn windows_of_a_classifier_meet_in_the_middle_of_what_they_share() {
        let document: Vec<u32> = (0..11).collect();
        let policy = ContextPolicy { window: 8, stride: 4, bos: Bos::None };
        let scored = |both_sides| -> Vec<_> {
            classified_windows(&document, policy, both_sides)
                .into_iter()
                .map(|part| (part.span, part.scored))
                .collect()
        };
        assert_eq!(scored(true), [(0..8, 0..6), (3..11, 6..11)]);
        assert_eq!(scored(false), [(0..8, 0..8), (3..11, 8..11)]);
    }
}
