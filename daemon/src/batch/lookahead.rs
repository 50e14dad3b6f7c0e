//! The look-ahead: windows that wait, sorted by length, and the batches that are cut from them.

use std::ops::Range;

use super::{Batch, Ladder, Window};

/// A row that is shorter than the longest by more than this share begins a batch of its own, …
const WASTE_MAX: f64 = 0.125;
/// … where the one before it is at least this full.
const FILL_MIN: f64 = 0.5;

/// A batch that is less full than this waits for what would fill it, …
const FULL: f64 = 0.75;
/// … unless every other pads by so much more.
const PART_FILLED: f64 = 0.2;

/// A window after which this many times as many tokens came in as wait goes with the next batch, whatever that pads.
const PATIENCE: u64 = 4;

/// Windows that wait for the model.
///
/// Of all batches that what waits can be cut into, the one that pads least goes first. A window that has waited too long
/// takes its batch with it, so none waits for ever.
#[derive(Debug)]
pub struct LookAhead {
    /// Longest first; of the same length, those that came first.
    waiting: Vec<Waiting>,
    /// Tokens that ever came in.
    arrived: u64,
    /// Tokens that wait, without padding.
    tokens: usize,
    tokens_max: usize,
    ladder: Ladder,
}

#[derive(Debug)]
struct Waiting {
    /// Tokens that had come in before it.
    arrival: u64,
    window: Window,
}

impl LookAhead {
    /// An empty look-ahead for batches of at most `tokens_max` padded tokens.
    pub fn new(tokens_max: usize, ladder: Ladder) -> Self {
        Self { waiting: Vec::new(), arrived: 0, tokens: 0, tokens_max, ladder }
    }

    /// Adds a window.
    pub fn push(&mut self, window: Window) {
        let arrival = self.arrived;
        self.arrived += window.len() as u64;
        self.tokens += window.len();
        let at = self.waiting.partition_point(|other| other.window.len() >= window.len());
        self.waiting.insert(at, Waiting { arrival, window });
    }

    /// Takes out what is not to be `kept`.
    pub fn retain(&mut self, kept: impl Fn(&Window) -> bool) {
        self.waiting.retain(|waiting| kept(&waiting.window));
        self.tokens = self.waiting.iter().map(|waiting| waiting.window.len()).sum();
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

    /// Takes the batch that pads least, or the one that holds the window which has waited too long.
    pub fn next_batch(&mut self) -> Option<Batch> {
        let lengths: Vec<usize> = self.waiting.iter().map(|waiting| waiting.window.len()).collect();
        let ranges = cut(&lengths, self.tokens_max, self.ladder);
        let mut range = match self.overdue() {
            Some(index) => ranges.into_iter().find(|range| range.contains(&index))?,
            None => ranges.into_iter().min_by(|a, b| {
                let cost = |range: &Range<usize>| self.cost(&lengths[range.clone()]);
                cost(a).total_cmp(&cost(b))
            })?,
        };
        if range.end == lengths.len() {
            // The shortest windows rarely fill a batch: it takes longer ones in as far as there is room.
            let shortest = lengths[lengths.len() - 1];
            let fits = |start: &usize| {
                (lengths.len() - start) * self.ladder.fit(lengths[*start]) <= self.tokens_max
                    && self.ladder.allows_together(lengths[*start], shortest)
            };
            let start = (0..range.start).rev().take_while(fits).last();
            range.start = start.unwrap_or(range.start);
        }
        let taken: Vec<Window> = self.waiting.drain(range).map(|waiting| waiting.window).collect();
        self.tokens -= taken.iter().map(Window::len).sum::<usize>();
        Some(Batch::new(taken, self.ladder))
    }

    /// The window that has waited longest, where that is too long.
    fn overdue(&self) -> Option<usize> {
        let (index, oldest) = self.waiting.iter().enumerate().min_by_key(|(_, waiting)| waiting.arrival)?;
        (self.arrived - oldest.arrival > PATIENCE * self.tokens as u64).then_some(index)
    }

    /// What a batch of rows of these lengths, longest first, is worth: padded tokens for each real one, and more where
    /// it leaves room, which costs the model a start for little.
    fn cost(&self, lengths: &[usize]) -> f64 {
        let padded = lengths.len() * self.ladder.fit(lengths[0]);
        let real: usize = lengths.iter().sum();
        let is_full = padded as f64 >= self.tokens_max as f64 * FULL;
        padded as f64 / real as f64 + if is_full { 0.0 } else { PART_FILLED }
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
fn cut(lengths: &[usize], tokens_max: usize, ladder: Ladder) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut start = 0;
    for index in 1..lengths.len() {
        let padded_len = ladder.fit(lengths[start]);
        let padded = (index - start) * padded_len;
        let is_full = padded + padded_len > tokens_max;
        let wastes = (ladder.fit(lengths[index]) as f64) < padded_len as f64 * (1.0 - WASTE_MAX);
        let is_apart = !ladder.allows_together(lengths[start], lengths[index]);
        if is_apart || is_full || (wastes && padded as f64 >= tokens_max as f64 * FILL_MIN) {
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
    fn what_waits_comes_out_once_within_the_budget() {
        let mut waiting = LookAhead::new(TOKENS_MAX, ladder());
        for window in some_windows() {
            waiting.push(window);
        }
        let batches: Vec<Batch> = std::iter::from_fn(|| waiting.next_batch()).collect();
        assert!(batches.iter().all(|batch| batch.padded_tokens() <= TOKENS_MAX));
        assert_eq!(sorted(&batches), some_windows());
        assert_eq!((waiting.tokens(), waiting.is_empty()), (0, true));
    }

    #[test]
    fn windows_on_two_sides_of_a_limit_share_no_batch() {
        let ladder = ladder().split_at(Some(20));
        let is_whole = |batch: &Batch| {
            let mut lengths = batch.windows.iter().map(|window| window.len() <= 20);
            let first = lengths.next().unwrap_or(batch.padded_len <= 20);
            first == (batch.padded_len <= 20) && lengths.all(|short| short == first)
        };
        for tokens_max in [64, 128, 1024, 1 << 20] {
            let mut waiting = LookAhead::new(tokens_max, ladder);
            for window in some_windows() {
                waiting.push(window);
            }
            let waited: Vec<Batch> = std::iter::from_fn(|| waiting.next_batch()).collect();
            for batches in [plan(some_windows(), tokens_max, ladder), waited] {
                assert!(batches.iter().all(is_whole), "{tokens_max}");
                assert_eq!(sorted(&batches), some_windows());
            }
        }
    }

    #[test]
    fn no_window_waits_for_ever() {
        // One that fills no batch, in a stream of others that fill them without padding.
        let window = |document: u64, len: usize| {
            let tokens: Arc<[u32]> = vec![0; len].into();
            Window { document, tokens, span: 0..len, bos: None, first_scored: 1 }
        };
        let mut waiting = LookAhead::new(TOKENS_MAX, ladder());
        waiting.push(window(0, 41));
        let (mut arrived, wanted) = (0, 10 * TOKENS_MAX);
        loop {
            while waiting.tokens() < wanted {
                waiting.push(window(1, 64));
                arrived += 64;
            }
            let batch = waiting.next_batch().into_iter().next_back();
            if batch.is_some_and(|batch| batch.windows.iter().any(|window| window.document == 0)) {
                break;
            }
            assert!(arrived <= (PATIENCE as usize + 1) * wanted, "it still waits after {arrived} tokens");
        }
        assert!(arrived > 2 * wanted, "and it has waited for others of its length: {arrived}");
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
        assert!(ratio <= 1.06, "{ratio} padded tokens for each real one");
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
