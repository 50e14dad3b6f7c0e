//! The lengths that rows are padded to: few enough to run each once before the daemon is ready.

/// Lengths up to a longest one, evenly spaced between one power of two and the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ladder {
    longest: usize,
    steps: usize,
}

/// No two lengths are nearer than this; kernels work on so many elements at a time anyway.
const STEP_MIN: usize = 8;

impl Ladder {
    /// The lengths up to `longest`, `steps` of them from each power of two to the next.
    ///
    /// With 16 steps the padding to a length is 3 % on average and at most 1/16.
    pub fn new(longest: usize, steps: usize) -> Self {
        Self { longest, steps: steps.max(1) }
    }

    /// The shortest length on the ladder that holds `len` tokens; `len` itself where none does.
    pub fn fit(self, len: usize) -> usize {
        if len == 0 {
            return 0;
        }
        let octave = (len.next_power_of_two() / 2).max(1);
        let step = (octave / self.steps).max(STEP_MIN);
        len.next_multiple_of(step).min(self.longest).max(len)
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
}
