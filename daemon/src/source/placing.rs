//! Where each partition that the group gave to this daemon begins to be read, as a value: no client and no clock is known
//! here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::topic_partition_list::Offset;

/// How long the first question for a partition's offset waits for its answer, and how long at most a later one. Short at
/// first: what an open transaction holds up has no answer, and others wait for their turn.
const ANSWER: Duration = Duration::from_millis(250);
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// How long a partition may be held up before somebody hears of it.
const OVERDUE: Duration = Duration::from_secs(10);

/// What is known of where a partition begins to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Its committed offset is asked for, and nothing has come of it yet.
    Asked,
    /// Its committed offset was not to be had. It is asked for again.
    Held,
    /// It is to be read from here, which the client is not told yet.
    Known(Offset),
    /// It is read from here.
    Placed(Offset),
}

#[derive(Debug)]
struct Entry {
    /// Tells this assignment of the partition from earlier ones, whose answers may still come.
    epoch: u64,
    place: Place,
    since: Instant,
    /// When it was last asked for, and how often.
    asked: Option<Instant>,
    questions: u32,
    /// Records that wait in it, as far as can be told.
    behind: Option<u64>,
    told: bool,
}

impl Entry {
    fn is_waiting(&self) -> bool {
        matches!(self.place, Place::Asked | Place::Held)
    }
}

/// A question for the committed offset of one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// Which partition is asked for.
    pub(super) partition: i32,
    /// How long to wait for the answer.
    pub(super) patience: Duration,
    /// Whether it was asked before in vain.
    pub(super) again: bool,
    epoch: u64,
}

/// A partition that is held up for long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overdue {
    /// Which it is.
    pub(super) partition: i32,
    /// For how long.
    pub(super) held: Duration,
    /// Records that wait in it; nothing where the brokers do not tell that either.
    pub(super) behind: Option<u64>,
}

/// The partitions that the group gave to this daemon. One that is not placed is not in its client's assignment.
#[derive(Debug, Default)]
pub(super) struct Placing {
    entries: BTreeMap<i32, Entry>,
    epochs: u64,
    closed: bool,
}

impl Placing {
    /// Notes that the committed offsets of new partitions are to be asked for.
    pub(super) fn ask(&mut self, partitions: &[i32], now: Instant) {
        for &partition in partitions {
            self.epochs += 1;
            let entry = Entry {
                epoch: self.epochs,
                place: Place::Asked,
                since: now,
                asked: None,
                questions: 0,
                behind: None,
                told: false,
            };
            self.entries.insert(partition, entry);
        }
    }

    /// Asks for nothing any more.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Whether nothing is asked for any more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// What to ask next: for the partition that has waited longest for its turn, those first that were never asked for.
    pub(super) fn next_question(&mut self, now: Instant) -> Option<Question> {
        let waiting = self.entries.iter_mut().filter(|(_, entry)| entry.is_waiting());
        let (&partition, entry) = waiting.min_by_key(|(_, entry)| entry.asked)?;
        let patience = (ANSWER * 2_u32.pow(entry.questions.min(3))).min(ANSWER_MAX);
        let again = entry.questions > 0;
        entry.asked = Some(now);
        entry.questions += 1;
        Some(Question { partition, patience, again, epoch: entry.epoch })
    }

    /// Takes the answer to `question`: an offset, or none. It says nothing of a partition that was given up meanwhile,
    /// or given up and given back.
    pub(super) fn answered(&mut self, question: Question, offset: Option<Offset>) {
        if let Some(entry) = self.asked_by(question) {
            entry.place = offset.map_or(Place::Held, Place::Known);
        }
    }

    /// Notes how many records wait in a partition that is held up.
    pub(super) fn set_behind(&mut self, question: Question, behind: Option<u64>) {
        if let Some(entry) = self.asked_by(question) {
            entry.behind = behind;
        }
    }

    fn asked_by(&mut self, question: Question) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&question.partition)?;
        Some(entry).filter(|entry| entry.epoch == question.epoch && entry.is_waiting())
    }

    /// Notes that the client reads `partition` from `offset` on; whether it had to be waited for.
    pub(super) fn place(&mut self, partition: i32, offset: Offset) -> bool {
        let Some(entry) = self.entries.get_mut(&partition) else { return false };
        entry.place = Place::Placed(offset);
        entry.questions > 1
    }

    /// All of them.
    pub(super) fn partitions(&self) -> Vec<i32> {
        self.entries.keys().copied().collect()
    }

    /// Forgets partitions that are this daemon's no more.
    pub(super) fn give_up(&mut self, partitions: &[i32]) {
        self.entries.retain(|partition, _| !partitions.contains(partition));
    }

    /// The partitions that are read, and where each began.
    pub(super) fn placed(&self) -> Vec<(i32, Offset)> {
        self.those(|place| if let Place::Placed(offset) = place { Some(offset) } else { None })
    }

    /// The partitions that can be read now, and from where.
    pub(super) fn known(&self) -> Vec<(i32, Offset)> {
        self.those(|place| if let Place::Known(offset) = place { Some(offset) } else { None })
    }

    /// How many partitions are not read yet.
    pub(super) fn unplaced(&self) -> usize {
        self.entries.len() - self.placed().len()
    }

    /// Whether an answer is to be expected at any moment.
    pub(super) fn is_asking(&self) -> bool {
        self.entries.values().any(|entry| matches!(entry.place, Place::Asked | Place::Known(_)))
    }

    /// Records that wait in partitions that are not read yet, as far as can be told.
    pub(super) fn behind(&self) -> u64 {
        self.entries.values().filter(|entry| entry.is_waiting()).filter_map(|entry| entry.behind).sum()
    }

    /// A partition that has been held up for long, each once.
    pub(super) fn overdue(&mut self, now: Instant) -> Option<Overdue> {
        let is_overdue =
            |entry: &Entry| entry.place == Place::Held && !entry.told && now - entry.since >= OVERDUE;
        let (&partition, entry) = self.entries.iter_mut().find(|(_, entry)| is_overdue(entry))?;
        entry.told = true;
        Some(Overdue { partition, held: now - entry.since, behind: entry.behind })
    }

    fn those(&self, offset: impl Fn(Place) -> Option<Offset>) -> Vec<(i32, Offset)> {
        let entries = self.entries.iter();
        entries.filter_map(|(&partition, entry)| Some((partition, offset(entry.place)?))).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SOME: Option<Offset> = Some(Offset::Offset(7));

    /// What is asked next, with the answer that comes.
    fn answer(placing: &mut Placing, now: Instant, offset: Option<Offset>) -> i32 {
        let question = placing.next_question(now).unwrap();
        placing.answered(question, offset);
        question.partition
    }

    #[test]
    fn a_partition_is_asked_for_then_known_then_placed() {
        let now = Instant::now();
        let mut placing = Placing::default();
        placing.ask(&[1, 2], now);
        assert_eq!((placing.placed(), placing.known(), placing.unplaced()), (vec![], vec![], 2));
        assert_eq!(answer(&mut placing, now, SOME), 1);
        assert_eq!((placing.placed(), placing.known()), (vec![], vec![(1, Offset::Offset(7))]));
        assert!(!placing.place(1, Offset::Offset(7)), "its first question was answered");
        assert_eq!((placing.placed(), placing.unplaced()), (vec![(1, Offset::Offset(7))], 1));
        assert!(placing.is_asking());
    }

    #[test]
    fn one_that_is_held_comes_again_after_all_others_and_with_more_patience() {
        let begin = Instant::now();
        let mut placing = Placing::default();
        placing.ask(&[1, 2, 3], begin);
        let first = placing.next_question(begin).unwrap();
        assert!(!first.again);
        placing.answered(first, None);
        let later = begin + ANSWER;
        placing.ask(&[0], later);
        let turns = [later; 3].map(|now| answer(&mut placing, now, SOME));
        assert_eq!(turns, [0, 2, 3]);
        let second = placing.next_question(later).unwrap();
        assert_eq!((second.partition, second.again), (1, true));
        assert!(second.patience > first.patience);
        assert!(!placing.place(9, Offset::Beginning), "which was given up");
        placing.answered(second, SOME);
        assert!(placing.place(1, Offset::Offset(7)), "which was waited for");
        assert_eq!(placing.next_question(later), None);
    }

    #[test]
    fn the_answer_to_an_earlier_question_says_nothing_of_a_partition_that_came_back() {
        let now = Instant::now();
        let mut placing = Placing::default();
        placing.ask(&[1], now);
        let old = placing.next_question(now).unwrap();
        placing.give_up(&[1]);
        placing.answered(old, SOME);
        assert_eq!(placing.unplaced(), 0);
        placing.ask(&[1], now);
        placing.answered(old, SOME);
        placing.set_behind(old, Some(9));
        assert_eq!((placing.known(), placing.behind()), (vec![], 0));
        assert_eq!(answer(&mut placing, now, SOME), 1);
        assert_eq!(placing.known().len(), 1);
    }

    #[test]
    fn what_is_held_for_long_is_told_once_and_counted_all_the_time() {
        let begin = Instant::now();
        let mut placing = Placing::default();
        placing.ask(&[1, 2], begin);
        assert_eq!(answer(&mut placing, begin, SOME), 1);
        let question = placing.next_question(begin).unwrap();
        placing.answered(question, None);
        placing.set_behind(question, Some(5));
        assert_eq!(placing.overdue(begin), None);
        let later = begin + OVERDUE;
        assert_eq!(placing.overdue(later), Some(Overdue { partition: 2, held: OVERDUE, behind: Some(5) }));
        assert_eq!((placing.overdue(later), placing.behind()), (None, 5));
    }
}
