//! Stops publishing where too many of the last records fail for a reason of ours: a wrong model or tokenizer would turn the
//! whole topic into dead letters, as fast as the brokers take them.

use std::collections::VecDeque;

/// Which of the last records failed for a reason of ours.
#[derive(Debug)]
pub struct Breaker {
    last: VecDeque<bool>,
    failed: usize,
    records: usize,
    failed_max: usize,
}

impl Breaker {
    /// Breaks where more than `percent` in a hundred of the last `records` records have failed.
    pub fn new(records: usize, percent: usize) -> Self {
        let failed_max = records * percent / 100;
        Self { last: VecDeque::new(), failed: 0, records, failed_max }
    }

    /// Counts one more record; whether too many have failed with it.
    pub fn count(&mut self, failed: bool) -> bool {
        self.last.push_back(failed);
        self.failed += usize::from(failed);
        if self.last.len() > self.records && self.last.pop_front() == Some(true) {
            self.failed -= 1;
        }
        self.failed > self.failed_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_breaks_where_more_than_the_share_of_the_last_records_have_failed() {
        let mut breaker = Breaker::new(4, 50);
        let counted = [true, true, false, false, true, false, true, true].map(|failed| breaker.count(failed));
        assert_eq!(counted, [false, false, false, false, false, false, false, true]);
        // With all of them allowed it never does.
        let mut never = Breaker::new(4, 100);
        assert!((0..100).all(|_| !never.count(true)));
    }
}
