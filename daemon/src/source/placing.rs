//! Where each partition that the group gave to this daemon begins to be read, as a value: no client is known here.

use std::collections::{BTreeMap, HashMap};

use rdkafka::topic_partition_list::Offset;

/// What is known of where a partition begins to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Its committed offset is asked for, and nothing has come of it yet.
    Asked,
    /// Its committed offset was not to be had, because an open transaction holds it up. It is asked for again.
    Held,
    /// It is read from here.
    Placed(Offset),
}

/// The partitions that the group gave to this daemon. One that is not placed is not read.
#[derive(Debug, Default)]
pub(super) struct Placing(BTreeMap<i32, Place>);

impl Placing {
    /// Notes that the committed offsets of new partitions are asked for.
    pub(super) fn ask(&mut self, partitions: &[i32]) {
        self.0.extend(partitions.iter().map(|&partition| (partition, Place::Asked)));
    }

    /// Takes the answer to asking for every partition that is not placed: those without an offset in it are held.
    pub(super) fn answered(&mut self, settled: &HashMap<i32, Offset>) {
        for (partition, place) in &mut self.0 {
            if *place == Place::Asked && !settled.contains_key(partition) {
                *place = Place::Held;
            }
        }
    }

    /// Notes that `partition` is read from `offset` on.
    pub(super) fn place(&mut self, partition: i32, offset: Offset) {
        self.0.insert(partition, Place::Placed(offset));
    }

    /// Forgets partitions that are this daemon's no more.
    pub(super) fn give_up(&mut self, partitions: &[i32]) {
        self.0.retain(|partition, _| !partitions.contains(partition));
    }

    /// The partitions that are read.
    pub(super) fn placed(&self) -> Vec<i32> {
        self.those(|place| matches!(place, Place::Placed(_)))
    }

    /// The partitions whose committed offset is still to be had, so that they are not read yet.
    pub(super) fn unplaced(&self) -> Vec<i32> {
        self.those(|place| matches!(place, Place::Asked | Place::Held))
    }

    /// Those of them whose committed offset was asked for in vain.
    pub(super) fn held(&self) -> Vec<i32> {
        self.those(|place| place == Place::Held)
    }

    fn those(&self, are: impl Fn(Place) -> bool) -> Vec<i32> {
        self.0.iter().filter(|(_, place)| are(**place)).map(|(&partition, _)| partition).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placing(partitions: &[i32], settled: &[(i32, i64)]) -> Placing {
        let settled =
            settled.iter().map(|&(partition, offset)| (partition, Offset::Offset(offset))).collect();
        let mut placing = Placing::default();
        placing.ask(partitions);
        placing.answered(&settled);
        for (partition, offset) in settled {
            placing.place(partition, offset);
        }
        placing
    }

    #[test]
    fn a_partition_is_asked_for_then_held_then_placed() {
        let mut placing = Placing::default();
        placing.ask(&[1, 2]);
        assert_eq!((placing.placed(), placing.unplaced(), placing.held()), (vec![], vec![1, 2], vec![]));
        placing.answered(&HashMap::from([(2, Offset::Beginning)]));
        placing.place(2, Offset::Beginning);
        assert_eq!((placing.placed(), placing.unplaced(), placing.held()), (vec![2], vec![1], vec![1]));
        placing.place(1, Offset::Offset(7));
        assert_eq!((placing.placed(), placing.unplaced(), placing.held()), (vec![1, 2], vec![], vec![]));
    }

    #[test]
    fn an_answer_says_nothing_of_partitions_that_are_read() {
        let mut placing = placing(&[1], &[(1, 7)]);
        placing.ask(&[2]);
        placing.answered(&HashMap::new());
        assert_eq!((placing.placed(), placing.held()), (vec![1], vec![2]));
    }

    #[test]
    fn what_is_given_up_is_neither_read_nor_asked_for() {
        let mut placing = placing(&[1, 2, 3, 4], &[(1, 0), (2, 0)]);
        placing.give_up(&[1, 3]);
        assert_eq!((placing.placed(), placing.unplaced()), (vec![2], vec![4]));
    }

    #[test]
    fn a_partition_that_comes_back_is_placed_anew() {
        let mut placing = placing(&[1], &[(1, 7)]);
        placing.give_up(&[1]);
        placing.ask(&[1]);
        assert_eq!((placing.placed(), placing.unplaced()), (vec![], vec![1]));
    }
}
