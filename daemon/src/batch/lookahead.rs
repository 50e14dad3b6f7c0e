//! The look-ahead: windows that wait, sorted by length, and the batches that are cut from them.

use super::{Batch, Ladder, Window};

/// A row that is shorter than the longest by more than this share begins a batch of its own, …
const WASTE_MAX: f64 = 0.125;
/// … where the one before it is at least this full.
const FILL_MIN: f64 = 0.5;

/// Windows that wait for the model.
///
/// Each batch holds the window that has waited longest, so none waits for ever, and beside it those nearest to it in
/// length, so that little is padded.
#[derive(Debug)]
pub struct LookAhead {
    /// Longest first; of the same length, those that came first.
    waiting: Vec<(u64, Window)>,
    arrivals: u64,
    tokens: usize,
    tokens_max: usize,
    ladder: Ladder,
}

impl LookAhead {
    /// An empty look-ahead for batches of at most `tokens_max` padded tokens.
    pub fn new(tokens_max: usize, ladder: Ladder) -> Self {
        Self { waiting: Vec::new(), arrivals: 0, tokens: 0, tokens_max, ladder }
    }

    /// Adds a window.
    pub fn push(&mut self, window: Window) {
        let arrival = self.arrivals;
        self.arrivals += 1;
        self.tokens += window.len();
        let at = self.waiting.partition_point(|(_, other)| other.len() >= window.len());
        self.waiting.insert(at, (arrival, window));
    }

    /// Tokens that wait, without padding.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether no window waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether enough waits to fill a batch.
    pub fn fills_a_batch(&self) -> bool {
        self.tokens >= self.tokens_max
    }

    /// Takes the batch that holds the window which has waited longest.
    pub fn next_batch(&mut self) -> Option<Batch> {
        let oldest = (0..self.waiting.len()).min_by_key(|&index| self.waiting[index].0)?;
        let lengths: Vec<usize> = self.waiting.iter().map(|(_, window)| window.len()).collect();
        let mut range = cut(&lengths, self.tokens_max, self.ladder)
            .into_iter()
            .find(|range| range.contains(&oldest))
            .unwrap_or(oldest..oldest + 1);
        if range.end == lengths.len() {
            // The shortest windows rarely fill a batch: it takes longer ones in as far as there is room.
            let fits =
                |start: &usize| (lengths.len() - start) * self.ladder.fit(lengths[*start]) <= self.tokens_max;
            let start = (0..range.start).rev().take_while(fits).last();
            range.start = start.unwrap_or(range.start);
        }
        let taken: Vec<Window> = self.waiting.drain(range).map(|(_, window)| window).collect();
        self.tokens -= taken.iter().map(Window::len).sum::<usize>();
        Some(Batch::new(taken, self.ladder))
    }
}

/// Cuts all of `windows` into batches of at most `tokens_max` padded tokens, longest first.
///
/// A single window longer than `tokens_max` makes a batch of its own; the configuration forbids that.
pub fn plan(mut windows: Vec<Window>, tokens_max: usize, ladder: Ladder) -> Vec<Batch> {
    windows.sort_by_key(|window| std::cmp::Reverse(window.len()));
    let lengths: Vec<usize> = windows.iter().map(Window::len).collect();
    let mut rest = windows.into_iter();
    cut(&lengths, tokens_max, ladder)
        .into_iter()
        .map(|range| Batch::new(rest.by_ref().take(range.len()).collect(), ladder))
        .collect()
}

/// Ranges of `lengths`, longest first, that make batches of at most `tokens_max` padded tokens.
fn cut(lengths: &[usize], tokens_max: usize, ladder: Ladder) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let mut start = 0;
    for index in 1..lengths.len() {
        let padded_len = ladder.fit(lengths[start]);
        let padded = (index - start) * padded_len;
        let is_full = padded + padded_len > tokens_max;
        let wastes = (ladder.fit(lengths[index]) as f64) < padded_len as f64 * (1.0 - WASTE_MAX);
        if is_full || (wastes && padded as f64 >= tokens_max as f64 * FILL_MIN) {
            ranges.push(start..index);
            start = index;
        }
    }
    if start < lengths.len() {
        ranges.push(start..lengths.len());
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::windows;
    use super::*;
    use sluice_schemas::record::{Bos, ContextPolicy};

    const POLICY: ContextPolicy = ContextPolicy { window: 64, stride: 32, bos: Bos::None };
    const TOKENS_MAX: usize = 128;

    fn ladder() -> Ladder {
        Ladder::new(64, 16)
    }

    fn some_windows() -> Vec<Window> {
        let lengths = [2, 64, 63, 7, 7, 33, 150, 500, 3, 1, 0, 17, 40, 41, 8, 9];
        let document = |len: u32| (0..len).collect::<Arc<[u32]>>();
        (0..).zip(lengths).flat_map(|(id, len)| windows(id, &document(len), POLICY)).collect()
    }

    fn sorted(batches: &[Batch]) -> Vec<Window> {
        let mut seen: Vec<_> = batches.iter().flat_map(|batch| batch.windows.clone()).collect();
        seen.sort_by_key(|window| (window.document, window.span.start));
        seen
    }

    #[test]
    fn batches_hold_every_window_once_within_the_budget() {
        let batches = plan(some_windows(), TOKENS_MAX, ladder());
        assert!(batches.iter().all(|batch| batch.padded_tokens() <= TOKENS_MAX));
        assert_eq!(sorted(&batches), some_windows());
    }

    #[test]
    fn the_window_that_waited_longest_is_in_the_next_batch() {
        let mut waiting = LookAhead::new(TOKENS_MAX, ladder());
        let all = some_windows();
        for window in &all {
            waiting.push(window.clone());
        }
        let mut batches = Vec::new();
        while !waiting.is_empty() {
            let left = sorted(&batches);
            let oldest = all.iter().find(|window| !left.contains(window)).cloned();
            let batch = waiting.next_batch().into_iter().next_back();
            assert!(
                batch.as_ref().is_some_and(|batch| batch.windows.iter().any(|w| Some(w) == oldest.as_ref()))
            );
            assert!(batch.as_ref().is_some_and(|batch| batch.padded_tokens() <= TOKENS_MAX));
            batches.extend(batch);
        }
        assert_eq!(sorted(&batches), all);
        assert_eq!(waiting.tokens(), 0);
        assert!(waiting.next_batch().is_none());
    }

    #[test]
    fn little_is_padded_of_a_long_stream() {
        let mut random = fastrand::Rng::with_seed(5);
        let policy = ContextPolicy { window: 2048, stride: 1024, bos: Bos::None };
        let (mut waiting, mut real, mut padded) = (LookAhead::new(4096, Ladder::new(2048, 16)), 0, 0);
        for id in 0..5000 {
            // Lognormal, by Box and Muller: median 400 tokens, sigma 1.
            let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
            let len = 400.0 * (radius * (std::f64::consts::TAU * random.f64()).cos()).exp();
            let document: Arc<[u32]> = vec![0; (len as usize).clamp(2, 2048)].into();
            for window in windows(id, &document, policy) {
                waiting.push(window);
            }
            while waiting.tokens() >= 65_536 {
                if let Some(batch) = waiting.next_batch() {
                    real += batch.real_tokens();
                    padded += batch.padded_tokens();
                }
            }
        }
        let ratio = padded as f64 / real as f64;
        assert!(ratio <= 1.08, "{ratio} padded tokens for each real one");
    }

    #[test]
    fn short_windows_do_not_go_alone_where_longer_ones_fit() {
        let mut waiting = LookAhead::new(TOKENS_MAX, ladder());
        let document: Arc<[u32]> = (0..8).collect();
        for len in [3, 4, 5, 6, 7, 8] {
            waiting.push(Window {
                document: len,
                tokens: Arc::clone(&document),
                span: 0..len as usize,
                bos: None,
                first_scored: 1,
            });
        }
        assert_eq!(waiting.next_batch().map(|batch| batch.rows()), Some(6));
    }
}
