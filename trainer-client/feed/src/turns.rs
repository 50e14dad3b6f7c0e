//! Whose turn it is: micro-batches come from the lanes one after the other, whatever ranks the lanes belong to.
//!
//! The `m`-th micro-batch of a run is the next one of lane `m % lanes`, as long as all lanes have documents; a lane that
//! has ended is passed over. When a lane ends is known to the rank that has it, so ranks agree before each step on what
//! the lanes have left ([`Outlook`]), and then all of them know every turn.

/// Micro-batches that a lane has left while its end is not in sight.
const OPEN: i64 = i64::MAX;

/// What a rank knows of itself and of its lanes before a step. What all ranks know is, value by value, the smallest that
/// any of them gives: an all-reduce with MIN over [`Outlook::values`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outlook {
    state: RankState,
    left: Vec<i64>,
}

/// How a rank is. Of several ranks, the lowest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RankState {
    /// It has failed.
    Failed,
    /// It was asked to stop.
    Stopped,
    /// It has what it needs for the next step.
    Well,
}

impl Outlook {
    /// A rank's outlook: the micro-batches that each lane has left, for its own lanes that have ended.
    pub(crate) fn new(state: RankState, lanes: usize, left: impl Iterator<Item = (usize, usize)>) -> Self {
        let mut all = vec![OPEN; lanes];
        for (lane, left) in left {
            all[lane] = left as i64;
        }
        Self { state, left: all }
    }

    /// The outlook of a rank that cannot go on, so that the others need not wait for it.
    pub fn failed(lanes: usize) -> Self {
        Self { state: RankState::Failed, left: vec![OPEN; lanes] }
    }

    /// The state of the worst rank.
    pub fn state(&self) -> RankState {
        self.state
    }

    /// One value for the state and one for each lane.
    pub fn values(&self) -> Vec<i64> {
        std::iter::once(self.state as i64).chain(self.left.iter().copied()).collect()
    }

    /// Takes values back; a state that there is not counts as failed.
    pub fn from_values(values: &[i64]) -> Self {
        let (state, left) = values.split_first().unwrap_or((&0, &[]));
        let state = match *state {
            state if state == RankState::Well as i64 => RankState::Well,
            state if state == RankState::Stopped as i64 => RankState::Stopped,
            _ => RankState::Failed,
        };
        Self { state, left: left.to_vec() }
    }
}

/// The turns of all lanes, the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turns {
    next: usize,
    left: Vec<i64>,
}

impl Turns {
    /// `lanes` lanes, the next turn being that of lane `next`.
    pub fn new(lanes: usize, next: usize) -> Self {
        Self { next: next % lanes.max(1), left: vec![OPEN; lanes] }
    }

    /// The lane whose turn is next.
    pub fn next(&self) -> usize {
        self.next
    }

    /// How many lanes there are.
    pub fn lanes(&self) -> usize {
        self.left.len()
    }

    /// The lanes of the next micro-batches, at most `count`; fewer where all lanes have ended.
    pub fn lanes_of_next(&self, count: usize) -> Vec<usize> {
        self.clone().take(count)
    }

    /// Takes turns.
    pub fn take(&mut self, count: usize) -> Vec<usize> {
        let lanes = self.left.len();
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let has_left = |lane: &usize| self.left[*lane] > 0;
            let Some(lane) = (self.next..self.next + lanes).map(|lane| lane % lanes).find(has_left) else {
                break;
            };
            if self.left[lane] != OPEN {
                self.left[lane] -= 1;
            }
            self.next = (lane + 1) % lanes;
            taken.push(lane);
        }
        taken
    }

    /// Takes in what all ranks know; whether it is news.
    pub fn learn(&mut self, outlook: &Outlook) -> bool {
        let is_news = self.left != outlook.left;
        self.left.clone_from(&outlook.left);
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::{OPEN, Outlook, RankState, Turns};

    #[test]
    fn lanes_take_turns_and_one_that_has_ended_is_passed_over() {
        let mut turns = Turns::new(3, 1);
        assert_eq!(turns.take(4), [1, 2, 0, 1]);
        let outlook = Outlook::new(RankState::Well, 3, [(2, 1), (0, 3)].into_iter());
        assert!(turns.learn(&outlook) && !turns.learn(&outlook));
        assert_eq!(turns.lanes_of_next(5), [2, 0, 1, 0, 1]);
        assert_eq!(turns.take(2), [2, 0]);
        turns.learn(&Outlook::new(RankState::Well, 3, [(2, 0), (0, 2), (1, 0)].into_iter()));
        assert_eq!(turns.take(9), [0, 0], "nothing is left of the others");
        assert_eq!(turns.take(1), [0; 0]);
    }

    #[test]
    fn what_ranks_know_is_the_smallest_of_each_value() {
        let one = Outlook::new(RankState::Well, 4, [(0, 2)].into_iter());
        let other = Outlook::new(RankState::Stopped, 4, [(1, 0)].into_iter());
        let smallest: Vec<i64> =
            one.values().iter().zip(other.values()).map(|(one, other)| *one.min(&other)).collect();
        let all = Outlook::from_values(&smallest);
        assert_eq!((all.state(), &all.left[..]), (RankState::Stopped, &[2, 0, OPEN, OPEN][..]));
        assert_eq!(Outlook::from_values(&Outlook::failed(4).values()).state(), RankState::Failed);
        assert_eq!(Outlook::from_values(&[]).state(), RankState::Failed);
    }
}
