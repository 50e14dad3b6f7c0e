//! Places in a stream, and the parts of a topic that ranks read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::StreamError;
use super::fetch::Extent;

/// A place in a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Pass over the data that the last document belongs to, counted from 1.
    pub epoch: u64,
    /// How far each partition has been read; empty for documents held in memory.
    pub partitions: BTreeMap<i32, PartitionPosition>,
    /// The partition whose turn is next, if it is not the first one's.
    pub next_partition: Option<i32>,
    /// Documents handed out since the start of the run.
    pub documents: u64,
}

/// A place in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionPosition {
    /// Pass over the partition, counted from 1.
    pub epoch: u64,
    /// Offset of the next record to read in this pass.
    pub next_offset: i64,
    /// Offset that each pass ends before, fixed when the run began; none for a topic that is followed.
    pub end: Option<i64>,
}

impl Position {
    /// The places of several shards of one topic as one place, from which other shards can go on. Whose turn it is gets
    /// lost where there are several.
    pub fn merged(shards: &[Self]) -> Self {
        match shards {
            [alone] => alone.clone(),
            _ => Self {
                epoch: shards.iter().map(|shard| shard.epoch).max().unwrap_or(0),
                partitions: shards.iter().flat_map(|shard| shard.partitions.clone()).collect(),
                next_partition: None,
                documents: shards.iter().map(|shard| shard.documents).sum(),
            },
        }
    }
}

/// One of several equal parts of a topic: partition `p` belongs to rank `p % world_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which part, from 0.
    pub rank: usize,
    /// Number of parts.
    pub world_size: usize,
}

impl Shard {
    /// The whole topic.
    pub const WHOLE: Self = Self { rank: 0, world_size: 1 };

    /// Whether a partition belongs to this part.
    pub fn owns(self, partition: i32) -> bool {
        usize::try_from(partition).is_ok_and(|partition| partition % self.world_size == self.rank)
    }
}

/// Where a shard begins to read: where `place` says, and at the first record of partitions that it does not know.
pub(super) fn starting_position(
    topic: &str,
    extent: Extent,
    offsets: &BTreeMap<i32, (i64, i64)>,
    place: Option<&Position>,
) -> Result<Position, StreamError> {
    let mut partitions = BTreeMap::new();
    for (&partition, &(low, high)) in offsets {
        let end = (extent != Extent::Follow).then_some(high);
        let begin = PartitionPosition { epoch: 1, next_offset: low, end };
        let at = place.and_then(|place| place.partitions.get(&partition)).copied().unwrap_or(begin);
        let PartitionPosition { next_offset, end, .. } = at;
        if next_offset < low && end.is_none_or(|end| next_offset < end) {
            return Err(StreamError::Removed { topic: topic.to_owned(), partition, next_offset, low });
        }
        let reached = end.unwrap_or(next_offset).max(next_offset);
        if reached > high {
            return Err(StreamError::Shorter {
                topic: topic.to_owned(),
                partition,
                next_offset: reached,
                high,
            });
        }
        partitions.insert(partition, at);
    }
    let begun = Position { epoch: 1, ..Position::default() };
    Ok(Position { partitions, ..place.cloned().unwrap_or(begun) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use std::collections::BTreeMap;

    use super::{PartitionPosition, Position, starting_position};
    use crate::stream::{Extent, StreamError};

    const EPOCHS: Extent = Extent::UntilEnd { epochs: 2 };

    fn at(next_offset: i64, end: i64) -> PartitionPosition {
        PartitionPosition { epoch: 1, next_offset, end: Some(end) }
    }

    #[test]
    fn a_place_is_gone_on_from_and_partitions_that_it_does_not_know_are_read_from_their_start() {
        let place = Position {
            epoch: 1,
            partitions: BTreeMap::from([(0, at(7, 20)), (2, at(5, 5))]),
            next_partition: Some(2),
            documents: 9,
        };
        let offsets = BTreeMap::from([(0, (3, 30)), (1, (2, 8)), (2, (6, 9))]);
        let found = starting_position("t", EPOCHS, &offsets, Some(&place)).unwrap();
        // The ends are those that the run began with, whatever has been added since; a partition that was read to its end
        // misses nothing that retention has removed.
        assert_eq!(found.partitions, BTreeMap::from([(0, at(7, 20)), (1, at(2, 8)), (2, at(5, 5))]));
        assert_eq!((found.next_partition, found.documents), (Some(2), 9));
        let begun = starting_position("t", Extent::Follow, &offsets, None).unwrap();
        assert_eq!(begun.partitions[&0], PartitionPosition { epoch: 1, next_offset: 3, end: None });
    }

    #[test]
    fn what_retention_has_removed_is_an_error_and_not_a_gap() {
        let place = Position { partitions: BTreeMap::from([(0, at(7, 20))]), ..Position::default() };
        let error =
            starting_position("t", EPOCHS, &BTreeMap::from([(0, (8, 30))]), Some(&place)).unwrap_err();
        assert!(
            matches!(error, StreamError::Removed { partition: 0, next_offset: 7, low: 8, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("documents would be lost"));
    }

    #[test]
    fn a_topic_that_ends_before_the_place_is_another_one() {
        for (next_offset, end) in [(21, None), (7, Some(21))] {
            let at = PartitionPosition { epoch: 1, next_offset, end };
            let place = Position { partitions: BTreeMap::from([(0, at)]), ..Position::default() };
            let offsets = BTreeMap::from([(0, (0, 20))]);
            let error = starting_position("t", EPOCHS, &offsets, Some(&place)).unwrap_err();
            assert!(matches!(error, StreamError::Shorter { next_offset: 21, high: 20, .. }), "{error}");
        }
    }
}
