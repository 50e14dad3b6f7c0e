//! Whose turn it is: micro-batches come from the lanes one after the other, whatever ranks the lanes belong to.
//!
//! The `m`-th micro-batch of a run is the next one of lane `m % lanes`, as long as all lanes have documents; a lane that
//! has ended is passed over. When a lane ends is known to the rank that has it, so ranks agree before each step on what
//! the lanes have left ([`Outlook`]), and then all of them know every turn.

use sluice_schemas::fingerprint::Fingerprint;

/// Micro-batches that a lane has left while its end is not in sight.
const OPEN: i64 = i64::MAX;

/// What a rank knows of itself and of its lanes before a step. What all ranks know is, value by value, the smallest that
/// any of them gives: an all-reduce with MIN over [`Outlook::values`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outlook {
    state: RankState,
    /// A digest of the reference that the rank's documents have shown, as numbers, and the same turned over: the smallest
    /// of those is the largest of these. All are [`UNSHOWN`] before there is one.
    shown: [i64; 2 * SHOWN],
    left: Vec<i64>,
}

/// Numbers of a digest.
const SHOWN: usize = Fingerprint::LEN / size_of::<i64>();
/// Larger than what any rank shows, or equal.
const UNSHOWN: i64 = i64::MAX;

/// How a rank is. Of several ranks, the lowest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RankState {
    /// It has failed.
    Failed,
    /// It was asked to stop.
    Stopped,
    /// It waits for documents, and has said so rather than keep the others waiting without a word.
    Waiting,
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
        Self { state, shown: [UNSHOWN; 2 * SHOWN], left: all }
    }

    /// The same outlook of a rank whose documents have shown a reference.
    pub(crate) fn showing(mut self, reference: Option<Fingerprint>) -> Self {
        let (digest, turned) = self.shown.split_at_mut(SHOWN);
        let bytes = reference.iter().flat_map(|reference| reference.as_bytes().as_chunks().0);
        for ((digest, turned), bytes) in digest.iter_mut().zip(turned).zip(bytes) {
            *digest = i64::from_le_bytes(*bytes);
            *turned = !*digest;
        }
        self
    }

    /// Whether ranks have shown several references.
    pub fn has_several_references(&self) -> bool {
        let (smallest, turned) = self.shown.split_at(SHOWN);
        let is_shown = self.shown.iter().any(|&number| number != UNSHOWN);
        is_shown && smallest.iter().zip(turned).any(|(&smallest, &turned)| smallest != !turned)
    }

    /// The outlook of a rank that cannot go on, so that the others need not wait for it.
    pub fn failed(lanes: usize) -> Self {
        Self::new(RankState::Failed, lanes, std::iter::empty())
    }

    /// The outlook of a rank that was asked to stop.
    pub fn stopped(lanes: usize) -> Self {
        Self::new(RankState::Stopped, lanes, std::iter::empty())
    }

    /// The outlook of a rank that still waits for documents.
    pub fn waiting(lanes: usize) -> Self {
        Self::new(RankState::Waiting, lanes, std::iter::empty())
    }

    /// The state of the worst rank.
    pub fn state(&self) -> RankState {
        self.state
    }

    /// One value for the state, some for the reference, and one for each lane.
    pub fn values(&self) -> Vec<i64> {
        [&[self.state as i64], &self.shown[..], &self.left].concat()
    }

    /// Takes values back; a state that there is not counts as failed.
    pub fn from_values(values: &[i64]) -> Self {
        let (state, rest) = values.split_first().unwrap_or((&0, &[]));
        let state = match *state {
            state if state == RankState::Well as i64 => RankState::Well,
            state if state == RankState::Stopped as i64 => RankState::Stopped,
            state if state == RankState::Waiting as i64 => RankState::Waiting,
            _ => RankState::Failed,
        };
        let unshown = ([UNSHOWN; 2 * SHOWN], &[][..]);
        let (shown, left) = rest.split_first_chunk().map_or(unshown, |(shown, left)| (*shown, left));
        Self { state, shown, left: left.to_vec() }
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
    use sluice_schemas::fingerprint::Fingerprint;

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
        let [stopped, waiting] = [Outlook::stopped(4), Outlook::waiting(4)];
        assert_eq!(Outlook::from_values(&waiting.values()), waiting);
        assert!(RankState::Failed < stopped.state() && stopped.state() < waiting.state());
        assert!(waiting.state() < one.state(), "one that waits holds up those that do not");
    }

    #[test]
    fn several_references_of_ranks_are_found_out() {
        let outlook = |reference| Outlook::new(RankState::Well, 1, std::iter::empty()).showing(reference);
        let has_several = |references: &[Option<Fingerprint>]| {
            let all = references.iter().map(|&reference| outlook(reference).values());
            let smallest = |one: Vec<i64>, other: Vec<i64>| {
                one.iter().zip(other).map(|(one, other)| other.min(*one)).collect()
            };
            Outlook::from_values(&all.reduce(smallest).unwrap_or_default()).has_several_references()
        };
        let [one, other] = [b"one", b"two"].map(|model| Some(Fingerprint::of_bytes(model)));
        let [lowest, highest] =
            [i64::MIN, i64::MAX].map(|number| Fingerprint::from_slice(&[number.to_le_bytes(); 4].concat()));
        for same in [None, one, lowest, highest] {
            assert!(!has_several(&[same, same]) && !has_several(&[None, same, None]), "{same:?}");
        }
        for (one, other) in [(one, other), (one, lowest), (one, highest), (lowest, highest)] {
            assert!(has_several(&[one, None, other]) && has_several(&[other, one]), "{one:?}, {other:?}");
        }
    }
}
