//! Documents to windows to batches: pure functions, so that no clock and no thread decides what a batch holds.

use std::ops::Range;
use std::sync::Arc;

use sluice_schemas::record::ContextPolicy;

/// A run of a document's tokens that the model sees at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Which document, as an index into whatever list the caller keeps.
    pub document: usize,
    /// The whole document's tokens.
    pub tokens: Arc<[u32]>,
    /// The part that the model sees.
    pub span: Range<usize>,
    /// First token, as an index into the document, whose loss this window gives; the last is `span.end - 1`.
    pub first_scored: usize,
}

impl Window {
    /// Tokens that the model sees.
    pub fn len(&self) -> usize {
        self.span.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.span.is_empty()
    }
}

/// Cuts a document into windows such that every token but the first is scored exactly once, each with as much of
/// what stands before it as the windows have on offer: windows start every `stride` tokens, a token belongs to the
/// first window that can predict it, and the last window is moved back to be full.
///
/// A document of fewer than two tokens has no windows.
pub fn windows(document: usize, tokens: &Arc<[u32]>, policy: ContextPolicy) -> Vec<Window> {
    let (window, stride) = (policy.window as usize, policy.stride as usize);
    let mut windows = Vec::new();
    let mut first_scored = 1;
    let mut start = 0;
    while first_scored < tokens.len() {
        let mut end = start + window;
        if end >= tokens.len() {
            end = tokens.len();
            start = end.saturating_sub(window);
        }
        windows.push(Window { document, tokens: Arc::clone(tokens), span: start..end, first_scored });
        first_scored = end;
        start += stride;
    }
    windows
}

/// What one run of the model sees: rows padded on the right to one length, and the targets asked for.
///
/// Right padding needs no mask in a causal model: no real token can see what stands after it.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The windows, one to a row.
    pub windows: Vec<Window>,
    /// Length of a row in tokens.
    pub padded_len: usize,
    /// Token ids, `rows * padded_len`, padded with 0.
    pub tokens: Vec<i64>,
    /// Flat positions (`row * padded_len + position`) that predict the targets.
    pub target_rows: Vec<i64>,
    /// Token ids to be scored, row by row.
    pub targets: Vec<i64>,
}

impl Batch {
    /// Pads `windows` to one length, a multiple of `padding_multiple`.
    pub fn new(windows: Vec<Window>, padding_multiple: usize) -> Self {
        let longest = windows.iter().map(Window::len).max().unwrap_or(0);
        let padded_len = longest.next_multiple_of(padding_multiple);
        let mut tokens = vec![0; windows.len() * padded_len];
        let (mut target_rows, mut targets) = (Vec::new(), Vec::new());
        for (row, window) in windows.iter().enumerate() {
            let ids = &window.tokens[window.span.clone()];
            let start = row * padded_len;
            for (slot, &id) in tokens[start..].iter_mut().zip(ids) {
                *slot = i64::from(id);
            }
            for (position, &id) in ids.iter().enumerate().skip(window.first_scored - window.span.start) {
                target_rows.push((start + position - 1) as i64);
                targets.push(i64::from(id));
            }
        }
        Self { windows, padded_len, tokens, target_rows, targets }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.windows.len()
    }

    /// Tokens that are real, not padding.
    pub fn real_tokens(&self) -> usize {
        self.windows.iter().map(Window::len).sum()
    }

    /// Tokens that the model computes, padding included.
    pub fn padded_tokens(&self) -> usize {
        self.rows() * self.padded_len
    }

    /// 1 for real tokens, 0 for padding.
    pub fn attention_mask(&self) -> Vec<i64> {
        self.windows
            .iter()
            .flat_map(|window| (0..self.padded_len).map(|position| i64::from(position < window.len())))
            .collect()
    }

    /// Positions counted from 0 in every row.
    pub fn position_ids(&self) -> Vec<i64> {
        (0..self.rows()).flat_map(|_| 0..self.padded_len as i64).collect()
    }
}

/// Sorts `windows` by length and cuts them into batches of at most `tokens_max` padded tokens, longest first.
///
/// A single window longer than `tokens_max` would make a batch of its own; the configuration forbids that.
pub fn plan(mut windows: Vec<Window>, tokens_max: usize, padding_multiple: usize) -> Vec<Batch> {
    windows.sort_by_key(|window| std::cmp::Reverse(window.len()));
    let mut batches = Vec::new();
    let mut rows: Vec<Window> = Vec::new();
    let mut padded_len = 0;
    for window in windows {
        if !rows.is_empty() && (rows.len() + 1) * padded_len > tokens_max {
            batches.push(Batch::new(std::mem::take(&mut rows), padding_multiple));
        }
        if rows.is_empty() {
            padded_len = window.len().next_multiple_of(padding_multiple);
        }
        rows.push(window);
    }
    if !rows.is_empty() {
        batches.push(Batch::new(rows, padding_multiple));
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(len: usize) -> Arc<[u32]> {
        (0..len as u32).collect()
    }

    #[test]
    fn every_token_but_the_first_is_scored_once_with_enough_context() {
        for (window, stride) in [(2, 1), (8, 4), (8, 8 - 1), (64, 32), (64, 1)] {
            let policy = ContextPolicy { window, stride };
            for len in 0..200 {
                let mut scored = Vec::new();
                for part in windows(0, &document(len), policy) {
                    assert!(part.len() <= window as usize);
                    assert!(part.first_scored > part.span.start, "a token needs one before it");
                    let context = part.first_scored - part.span.start;
                    let promised = if part.span.start == 0 { 1 } else { (window - stride) as usize };
                    assert!(
                        context >= promised,
                        "{context} tokens of context where {promised} were promised"
                    );
                    scored.extend(part.first_scored..part.span.end);
                }
                assert_eq!(scored, (1..len.max(1)).collect::<Vec<_>>(), "len {len}, window {window}");
            }
        }
    }

    #[test]
    fn batches_hold_every_window_once_within_the_budget() {
        let policy = ContextPolicy { window: 64, stride: 32 };
        let lengths = [2, 64, 63, 7, 7, 33, 150, 500, 3, 1, 0, 17];
        let all: Vec<_> =
            lengths.iter().enumerate().flat_map(|(i, &len)| windows(i, &document(len), policy)).collect();
        let batches = plan(all.clone(), 128, 8);
        let mut seen: Vec<_> = batches.iter().flat_map(|batch| batch.windows.clone()).collect();
        assert!(batches.iter().all(|batch| batch.padded_tokens() <= 128));
        seen.sort_by_key(|w| (w.document, w.span.start));
        assert_eq!(seen, all);
    }

    #[test]
    fn targets_are_the_tokens_after_their_rows() {
        let policy = ContextPolicy { window: 4, stride: 2 };
        let batch = Batch::new(windows(0, &document(7), policy), 8);
        for (&row, &target) in batch.target_rows.iter().zip(&batch.targets) {
            assert_eq!(batch.tokens[row as usize] + 1, target);
        }
        assert_eq!(batch.targets, [1, 2, 3, 4, 5, 6]);
        assert_eq!(batch.padded_len, 8);
        assert_eq!(batch.attention_mask()[..8], [1, 1, 1, 1, 0, 0, 0, 0]);
        assert_eq!(batch.position_ids()[8..10], [0, 1]);
    }
}
