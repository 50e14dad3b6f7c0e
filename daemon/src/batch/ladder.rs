//! The lengths that rows are padded to: few enough to run each once before the daemon is ready.

/// Lengths up to a longest one, evenly spaced between one power of two and the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ladder {
    longest: usize,
    steps: usize,
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
        Self { longest, steps: steps.max(1), limit: None }
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
