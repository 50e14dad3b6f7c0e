//! The order in which records of several partitions are taken: one of each in turn, whatever arrives first.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::decode::TopicKind;

/// A record's place and bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Offset in its partition.
    pub offset: i64,
    /// Payload; `None` for a tombstone.
    pub payload: Option<Bytes>,
    /// What the record's header says that it is, if it says so.
    pub kind: Option<TopicKind>,
}

/// Whose turn it is, and whether it can be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The next record, of this partition.
    Take(i32, Record),
    /// It is this partition's turn and nothing has arrived yet.
    Waiting(i32),
    /// Every partition has reached its end.
    Done,
}

/// First and past-the-last offset of a partition; no end means that it is followed for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First offset to read.
    pub start: i64,
    /// Offset to stop before.
    pub end: Option<i64>,
}

/// Buffers of all partitions and the strict rotation over them, in ascending order of partition number.
#[derive(Debug)]
pub struct Rotation {
    lanes: Vec<Lane>,
    by_partition: BTreeMap<i32, usize>,
    turn: usize,
}

#[derive(Debug)]
struct Lane {
    partition: i32,
    expected_offset: i64,
    end: Option<i64>,
    finished: bool,
    buffer: VecDeque<Record>,
    buffered_bytes: usize,
}

impl Rotation {
    /// A rotation over these partitions.
    pub fn new(ranges: &BTreeMap<i32, Range>) -> Self {
        let lane = |(&partition, range): (&i32, &Range)| Lane {
            partition,
            expected_offset: range.start,
            end: range.end,
            finished: range.end.is_some_and(|end| range.start >= end),
            buffer: VecDeque::new(),
            buffered_bytes: 0,
        };
        let by_partition = ranges.keys().copied().zip(0..).collect();
        Self { lanes: ranges.iter().map(lane).collect(), by_partition, turn: 0 }
    }

    /// The same rotation, with the turn at a partition.
    #[must_use]
    pub fn beginning_at(mut self, partition: Option<i32>) -> Self {
        self.turn = partition.and_then(|partition| self.by_partition.get(&partition).copied()).unwrap_or(0);
        self
    }

    /// Stores a fetched record, and says so. One past its partition's end, or fetched a second time after a pause, is dropped.
    pub fn arrive(&mut self, partition: i32, record: Record) -> bool {
        let Some(&index) = self.by_partition.get(&partition) else { return false };
        let lane = &mut self.lanes[index];
        if lane.end.is_some_and(|end| record.offset + 1 >= end) {
            lane.finished = true;
        }
        if record.offset < lane.expected_offset || lane.end.is_some_and(|end| record.offset >= end) {
            return false;
        }
        lane.expected_offset = record.offset + 1;
        lane.buffered_bytes += record.payload.as_ref().map_or(0, Bytes::len);
        lane.buffer.push_back(record);
        true
    }

    /// Notes that a partition has been read up to where the broker ends it now. The offsets before an end may hold
    /// transaction markers only, which never arrive as records.
    pub fn reached_end(&mut self, partition: i32) {
        if let Some(&index) = self.by_partition.get(&partition) {
            let lane = &mut self.lanes[index];
            lane.finished = lane.end.is_some();
        }
    }

    /// Takes the next record in the rotation.
    pub fn take(&mut self) -> Turn {
        for _ in 0..self.lanes.len() {
            let lane = &mut self.lanes[self.turn];
            if let Some(record) = lane.buffer.pop_front() {
                lane.buffered_bytes -= record.payload.as_ref().map_or(0, Bytes::len);
                let partition = lane.partition;
                self.turn = (self.turn + 1) % self.lanes.len();
                return Turn::Take(partition, record);
            }
            if !lane.finished {
                return Turn::Waiting(lane.partition);
            }
            self.turn = (self.turn + 1) % self.lanes.len();
        }
        Turn::Done
    }

    /// Payload bytes waiting in each partition's buffer, and whether the partition has reached its end.
    pub fn buffered(&self) -> impl Iterator<Item = (i32, usize, bool)> + '_ {
        self.lanes.iter().map(|lane| (lane.partition, lane.buffered_bytes, lane.finished))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;

    use super::{Range, Record, Rotation, Turn};
    use crate::random::SplitMix64;

    fn record(offset: i64) -> Record {
        Record { offset, payload: Some(Bytes::from_static(b"x")), kind: None }
    }

    fn drain(rotation: &mut Rotation) -> Vec<(i32, i64)> {
        let mut taken = Vec::new();
        while let Turn::Take(partition, record) = rotation.take() {
            taken.push((partition, record.offset));
        }
        taken
    }

    #[test]
    fn the_order_is_that_of_the_data_whatever_arrives_first() {
        let lengths = [5i64, 0, 9, 2];
        let ranges: BTreeMap<i32, Range> =
            (0..).zip(lengths).map(|(p, length)| (p, Range { start: 0, end: Some(length) })).collect();
        let expected: Vec<(i32, i64)> = (0..9)
            .flat_map(|offset| {
                (0..).zip(lengths).filter(move |&(_, n)| offset < n).map(move |(p, _)| (p, offset))
            })
            .collect();
        let mut generator = SplitMix64::keyed(5, 0);
        for _ in 0..200 {
            let mut rotation = Rotation::new(&ranges);
            let mut arrived = [0i64; 4];
            let mut taken = Vec::new();
            while rotation.take_into(&mut taken) {
                let partition = generator.below(4);
                if arrived[partition] < lengths[partition] {
                    rotation.arrive(partition as i32, record(arrived[partition]));
                    arrived[partition] += 1;
                }
            }
            assert_eq!(taken, expected);
        }
    }

    impl Rotation {
        /// Takes one record if it can; whether the rotation is still going.
        fn take_into(&mut self, taken: &mut Vec<(i32, i64)>) -> bool {
            match self.take() {
                Turn::Take(partition, record) => taken.push((partition, record.offset)),
                Turn::Waiting(_) => {}
                Turn::Done => return false,
            }
            true
        }
    }

    #[test]
    fn markers_before_the_end_do_not_hold_up_the_rotation() {
        let mut rotation = Rotation::new(&BTreeMap::from([
            (0, Range { start: 0, end: Some(4) }),
            (1, Range { start: 0, end: Some(1) }),
        ]));
        rotation.arrive(0, record(0));
        rotation.arrive(1, record(0));
        assert_eq!(drain(&mut rotation), [(0, 0), (1, 0)]);
        assert_eq!(rotation.take(), Turn::Waiting(0));
        rotation.reached_end(0);
        assert_eq!(rotation.take(), Turn::Done);
    }

    #[test]
    fn repeats_and_records_past_the_end_are_dropped() {
        let mut rotation = Rotation::new(&BTreeMap::from([(3, Range { start: 5, end: Some(8) })]));
        for offset in [4, 5, 6, 5, 6, 9, 10] {
            rotation.arrive(3, record(offset));
        }
        assert_eq!(drain(&mut rotation), [(3, 5), (3, 6)]);
        assert_eq!(rotation.take(), Turn::Done);
        assert_eq!(rotation.buffered().collect::<Vec<_>>(), [(3, 0, true)]);
    }

    #[test]
    fn a_followed_partition_never_ends() {
        let mut rotation = Rotation::new(&BTreeMap::from([(0, Range { start: 0, end: None })]));
        rotation.reached_end(0);
        assert_eq!(rotation.take(), Turn::Waiting(0));
    }
}
