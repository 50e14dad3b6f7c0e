//! The shapes that batches are padded to: few enough to run each once before the daemon is ready.

/// Lengths up to a longest one, evenly spaced between one power of two and the next; and for each the numbers of rows, where
/// those are few too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ladder {
    longest: usize,
    steps: usize,
    /// Most tokens of a batch, where its rows are one of few numbers.
    few_rows_of: Option<usize>,
    /// Length beyond which a model computes rows in another way.
    limit: Option<usize>,
}

/// No two lengths are nearer than this; kernels work on so many elements at a time anyway.
const STEP_MIN: usize = 8;

impl Ladder {
    /// The lengths up to `longest`, `steps` of them from each power of two to the next.
    ///
    /// With 16 steps the padding to a length is 3 % on average and at most 1/16.
    pub fn new(longest: usize, steps: usize) -> Self {
        Self { longest, steps: steps.max(1), few_rows_of: None, limit: None }
    }

    /// The same lengths, each with few numbers of rows, of which the largest makes a batch of `tokens_max` tokens: all of
    /// them, seven eighths, three quarters, and then each time a half. What the look-ahead calls a full batch has one of the
    /// first three.
    #[must_use]
    pub fn with_few_rows(self, tokens_max: usize) -> Self {
        Self { few_rows_of: Some(tokens_max), ..self }
    }

    /// The smallest number of rows of a length that holds `rows`; `rows` itself where none does, or where any will do.
    pub fn fit_rows(self, rows: usize, len: usize) -> usize {
        self.rows(len).into_iter().filter(|&fit| fit >= rows).min().unwrap_or(rows)
    }

    /// The numbers of rows of a length, largest first; none where any will do.
    fn rows(self, len: usize) -> Vec<usize> {
        let Some(tokens_max) = self.few_rows_of else { return vec![] };
        let full = (tokens_max / len.max(1)).max(1);
        let mut rows = vec![full, full - full / 8, full - full / 4];
        rows.extend(
            std::iter::successors(Some(full / 2), |half| Some(half / 2)).take_while(|&half| half > 0),
        );
        rows.dedup();
        rows
    }

    /// Every shape, `(rows, length)`, largest batch first; none where any number of rows will do.
    pub fn shapes(self) -> Vec<(usize, usize)> {
        let mut shapes: Vec<_> = self
            .lengths()
            .into_iter()
            .flat_map(|len| self.rows(len).into_iter().map(move |rows| (rows, len)))
            .collect();
        shapes.sort_by_key(|(rows, len)| std::cmp::Reverse((rows * len, *len)));
        shapes
    }

    /// The same ladder for a model that computes rows of more than `limit` tokens in another way, and goes by the length
    /// that they are padded to: no row is padded beyond the limit that is not longer itself.
    #[must_use]
    pub fn split_at(self, limit: Option<usize>) -> Self {
        Self { limit, ..self }
    }

    /// Whether rows of these lengths may share a batch.
    pub fn allows_together(self, one: usize, other: usize) -> bool {
        self.limit.is_none_or(|limit| (one <= limit) == (other <= limit))
    }

    /// The shortest length on the ladder that holds `len` tokens; `len` itself where none does.
    pub fn fit(self, len: usize) -> usize {
        if len == 0 {
            return 0;
        }
        let octave = (len.next_power_of_two() / 2).max(1);
        let step = (octave / self.steps).max(STEP_MIN);
        let bound = self.limit.filter(|&limit| len <= limit).unwrap_or(self.longest);
        len.next_multiple_of(step).min(bound).min(self.longest).max(len)
    }

    /// Every length on the ladder, shortest first.
    pub fn lengths(self) -> Vec<usize> {
        let mut lengths = Vec::new();
        let mut len = 1;
        while len <= self.longest {
            let rung = self.fit(len);
            lengths.push(rung);
            len = rung + 1;
        }
        lengths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_few_and_close() {
        let ladder = Ladder::new(2048, 16);
        let lengths = ladder.lengths();
        assert_eq!(lengths[..3], [8, 16, 24]);
        assert_eq!(lengths.last(), Some(&2048));
        assert!(lengths.len() < 90, "{}", lengths.len());
        for len in 1..=2048 {
            let fit = ladder.fit(len);
            assert!(lengths.contains(&fit) && fit >= len);
            assert!(fit - len < (len / 16).max(STEP_MIN), "{len} is padded to {fit}");
        }
    }

    #[test]
    fn rows_are_few_and_near() {
        let ladder = Ladder::new(512, 8).with_few_rows(4096);
        assert_eq!(ladder.rows(512), [8, 7, 6, 4, 2, 1]);
        assert_eq!(ladder.rows(4096 / 3), [3, 1], "none twice");
        for len in ladder.lengths() {
            let rows = ladder.rows(len);
            assert!(rows.is_sorted_by(|a, b| a > b) && rows.last() == Some(&1), "{rows:?}");
            for asked in 1..=rows[0] {
                let fit = ladder.fit_rows(asked, len);
                assert!(rows.contains(&fit) && fit >= asked && fit * len <= 4096);
                // A batch that counts as full is padded by an eighth of it at most.
                assert!(4 * asked < 3 * rows[0] || fit - asked <= rows[0].div_ceil(8), "{asked} of {rows:?}");
            }
        }
        assert_eq!(ladder.shapes()[0], (8, 512), "the largest first");
        assert_eq!(Ladder::new(512, 8).fit_rows(5, 512), 5, "any number will do where shapes are not few");
        assert_eq!(ladder.fit_rows(2, 8192), 2, "what is too much stays whole");
    }

    #[test]
    fn the_longest_is_a_length_whatever_it_is() {
        for longest in [1, 2, 7, 64, 100, 1000, 1023] {
            let lengths = Ladder::new(longest, 4).lengths();
            assert_eq!(lengths.last(), Some(&longest));
            assert!(lengths.is_sorted());
        }
        assert_eq!(Ladder::new(10, 4).fit(12), 12, "what is too long stays whole");
    }

    #[test]
    fn no_length_passes_the_limit() {
        let ladder = Ladder::new(2048, 4).split_at(Some(100));
        assert_eq!((ladder.fit(99), ladder.fit(100), ladder.fit(101)), (100, 100, 112));
        assert!(ladder.lengths().contains(&100));
        assert!(ladder.allows_together(1, 100) && ladder.allows_together(101, 2048));
        assert!(!ladder.allows_together(100, 101));
        assert!(Ladder::new(2048, 4).allows_together(1, 2048));
        for len in 1..=100 {
            assert!(ladder.fit(len) <= 100);
        }
    }
}
