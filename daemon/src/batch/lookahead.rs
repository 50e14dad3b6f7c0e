//! The look-ahead: windows that wait, by length, and the batches that are cut from them.

use std::collections::{BTreeMap, VecDeque};
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
/// A batch begins with the windows of one length and goes on with shorter ones. Of those that what waits can be cut into, the
/// one that pads least goes first. A window that has waited too long takes its batch with it, so none waits for ever.
#[derive(Debug)]
pub struct LookAhead {
    /// By the length that they are padded to; of each, those that came first stand first.
    waiting: BTreeMap<usize, VecDeque<Waiting>>,
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

/// So many of the first windows of each length.
type Taken = Vec<(usize, usize)>;

impl LookAhead {
    /// An empty look-ahead for batches of at most `tokens_max` padded tokens.
    pub fn new(tokens_max: usize, ladder: Ladder) -> Self {
        Self { waiting: BTreeMap::new(), arrived: 0, tokens: 0, tokens_max, ladder }
    }

    /// Adds a window.
    pub fn push(&mut self, window: Window) {
        let arrival = self.arrived;
        self.arrived += window.len() as u64;
        self.tokens += window.len();
        self.waiting.entry(self.ladder.fit(window.len())).or_default().push_back(Waiting { arrival, window });
    }

    /// Takes out what is not to be `kept`.
    pub fn retain(&mut self, kept: impl Fn(&Window) -> bool) {
        for queue in self.waiting.values_mut() {
            queue.retain(|waiting| kept(&waiting.window));
        }
        self.waiting.retain(|_, queue| !queue.is_empty());
        self.tokens = self.waiting.values().flatten().map(|waiting| waiting.window.len()).sum();
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

    /// Takes the batch that pads least, or the one that begins with the window which has waited too long.
    pub fn next_batch(&mut self) -> Option<Batch> {
        let begin = match self.overdue() {
            Some(len) => len,
            None => self.waiting.keys().copied().min_by(|&a, &b| {
                // Of two that pad alike, the longer.
                self.cost(&self.from(a)).total_cmp(&self.cost(&self.from(b))).then(b.cmp(&a))
            })?,
        };
        let taken = self.filled_up(self.from(begin));
        let windows: Vec<Window> = taken.into_iter().flat_map(|(len, count)| self.take(len, count)).collect();
        self.tokens -= windows.iter().map(Window::len).sum::<usize>();
        Some(Batch::new(windows, self.ladder))
    }

    /// The first `count` windows of a length.
    fn take(&mut self, len: usize, count: usize) -> Vec<Window> {
        let Some(queue) = self.waiting.get_mut(&len) else { return vec![] };
        let taken = queue.drain(..count).map(|waiting| waiting.window).collect();
        if queue.is_empty() {
            self.waiting.remove(&len);
        }
        taken
    }

    /// Length of the window that has waited longest, where that is too long.
    fn overdue(&self) -> Option<usize> {
        let first = |(len, queue): (&usize, &VecDeque<Waiting>)| Some((queue.front()?.arrival, *len));
        let (arrival, len) = self.waiting.iter().filter_map(first).min()?;
        (self.arrived - arrival > PATIENCE * self.tokens as u64).then_some(len)
    }

    /// Rows of a length that a batch has room for; one where not even that fits, which the configuration forbids.
    fn room(&self, len: usize) -> usize {
        (self.tokens_max / len).max(1)
    }

    /// The batch whose longest windows are padded to `longest`.
    fn from(&self, longest: usize) -> Taken {
        let (room, mut rows, mut taken) = (self.room(longest), 0, Taken::new());
        for (&len, queue) in self.waiting.range(..=longest).rev() {
            let wastes = (len as f64) < longest as f64 * (1.0 - WASTE_MAX);
            let half_full = (rows * longest) as f64 >= self.tokens_max as f64 * FILL_MIN;
            let is_apart = !self.ladder.allows_together(longest, len);
            if is_apart || rows == room || (wastes && half_full) {
                break;
            }
            let count = queue.len().min(room - rows);
            taken.push((len, count));
            rows += count;
        }
        taken
    }

    /// The same, where it ends with the shortest windows, with longer ones as far as there is room: the shortest rarely fill
    /// a batch.
    fn filled_up(&self, mut taken: Taken) -> Taken {
        let is_last = taken.last().map(|(len, _)| len) == self.waiting.keys().next();
        let (Some(&(longest, _)), true) = (taken.first(), is_last) else { return taken };
        let mut rows: usize = taken.iter().map(|(_, count)| count).sum();
        for (&len, queue) in self.waiting.range(longest + 1..) {
            let room = if self.ladder.allows_together(longest, len) { self.room(len) } else { 0 };
            let count = queue.len().min(room.saturating_sub(rows));
            if count > 0 {
                taken.insert(0, (len, count));
                rows += count;
            }
            if count < queue.len() {
                break;
            }
        }
        taken
    }

    /// What a batch is worth: padded tokens for each real one, and more where it leaves room, which costs the model a start
    /// for little.
    fn cost(&self, taken: &Taken) -> f64 {
        let Some(&(longest, _)) = taken.first() else { return f64::INFINITY };
        let rows: usize = taken.iter().map(|(_, count)| count).sum();
        let padded = self.ladder.fit_rows(rows, longest) * longest;
        let of_length = |(len, count): &(usize, usize)| -> usize {
            self.waiting[len].iter().take(*count).map(|waiting| waiting.window.len()).sum()
        };
        let real: usize = taken.iter().map(of_length).sum();
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
            Window::whole(document, tokens, None)
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

    /// Padded tokens for each real one of a long stream of documents.
    fn padding(tokens_max: usize, lookahead: usize, ladder: Ladder) -> f64 {
        let mut random = fastrand::Rng::with_seed(5);
        let policy = ContextPolicy { window: 2048, stride: 1024, bos: Bos::None };
        let (mut waiting, mut real, mut padded) = (LookAhead::new(tokens_max, ladder), 0, 0);
        let mut arrived = 0;
        for id in 0.. {
            // Lognormal, by Box and Muller: median 400 tokens, sigma 1.
            let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
            let len = 400.0 * (radius * (std::f64::consts::TAU * random.f64()).cos()).exp();
            let document: Arc<[u32]> = vec![0; (len as usize).clamp(2, 2048)].into();
            arrived += document.len();
            for window in windows(id, &document, policy) {
                waiting.push(window);
            }
            while waiting.tokens() >= lookahead {
                if let Some(batch) = waiting.next_batch() {
                    real += batch.real_tokens();
                    padded += batch.padded_tokens();
                }
            }
            if arrived > 30 * lookahead {
                break;
            }
        }
        padded as f64 / real as f64
    }

    #[test]
    fn little_is_padded_of_a_long_stream() {
        let cpu = padding(4096, 65_536, Ladder::new(2048, 16));
        assert!(cpu <= 1.06, "{cpu} padded tokens for each real one");
        let gpu = padding(65_536, 1 << 20, Ladder::new(2048, 8).with_few_rows(65_536));
        assert!(gpu <= 1.08, "{gpu} padded tokens for each real one, of few shapes");
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
                scored_end: len as usize,
                class: None,
            });
        }
        assert_eq!(waiting.next_batch().map(|batch| batch.rows()), Some(6));
    }
}
