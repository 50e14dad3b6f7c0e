//! Places in a stream, and how its lanes are dealt to ranks.

use serde::{Deserialize, Serialize};

/// How much of a topic to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    /// Up to the end it has when the stream opens, this many times over.
    UntilEnd {
        /// Passes over the topic.
        epochs: u64,
    },
    /// For ever.
    Follow,
}

impl Extent {
    /// Passes over the topic; `None` where the first one never ends.
    pub fn epochs(self) -> Option<u64> {
        match self {
            Self::UntilEnd { epochs } => Some(epochs),
            Self::Follow => None,
        }
    }
}

/// A place in a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Pass over the lane that the last document belongs to, counted from 1.
    pub epoch: u64,
    /// Offset that the first pass began at.
    pub first_offset: i64,
    /// Offset of the next record to read in this pass.
    pub next_offset: i64,
    /// Offset that each pass ends before, fixed when the run began; none for a topic that is followed, and in memory.
    pub end: Option<i64>,
    /// Documents handed out since the start of the run.
    pub documents: u64,
}

/// How the lanes of a stream are dealt to the ranks of a group: lane `l` belongs to rank `l % ranks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    rank: usize,
    world_size: usize,
}

/// Ranks that lanes cannot be dealt to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// There is no such rank.
    #[error("rank {rank} is none of {world_size} ranks, which are numbered from 0")]
    Rank {
        /// The number given.
        rank: usize,
        /// How many there are.
        world_size: usize,
    },
    /// Some ranks would have more lanes than others.
    #[error(
        "{lanes} lanes (partitions of the topic) cannot be dealt to {world_size} ranks in equal numbers; use {} ranks, or \
         a topic whose partitions {world_size} divides",
        divisors(*.lanes)
    )]
    Lanes {
        /// Lanes of the stream.
        lanes: usize,
        /// How many ranks there are.
        world_size: usize,
    },
    /// Some ranks would have more micro-batches of a step than others.
    #[error("{micro_batches} micro-batches a step are not a multiple of {world_size} ranks: give a multiple")]
    MicroBatches {
        /// Micro-batches of a step, over all ranks.
        micro_batches: usize,
        /// How many ranks there are.
        world_size: usize,
    },
}

impl Shard {
    /// One rank, which has every lane.
    pub const WHOLE: Self = Self { rank: 0, world_size: 1 };

    /// The lanes of rank `rank` of `ranks`.
    pub fn new(rank: usize, world_size: usize) -> Result<Self, ShardError> {
        if rank < world_size {
            Ok(Self { rank, world_size })
        } else {
            Err(ShardError::Rank { rank, world_size })
        }
    }

    /// Which rank, from 0.
    pub fn rank(self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world_size(self) -> usize {
        self.world_size
    }

    /// The rank that a lane belongs to.
    pub fn rank_of(self, lane: usize) -> usize {
        lane % self.world_size
    }

    /// Whether a lane belongs to this rank.
    pub fn owns(self, lane: usize) -> bool {
        self.rank_of(lane) == self.rank
    }

    /// The rank's lanes of so many.
    pub fn own(self, lanes: usize) -> impl Iterator<Item = usize> {
        (self.rank..lanes).step_by(self.world_size)
    }

    /// Fails where ranks would not have lanes and micro-batches in equal numbers, with the numbers that would do.
    pub fn check(self, lanes: usize, micro_batches: usize) -> Result<(), ShardError> {
        let world_size = self.world_size;
        if !lanes.is_multiple_of(world_size) {
            return Err(ShardError::Lanes { lanes, world_size });
        }
        if !micro_batches.is_multiple_of(world_size) {
            return Err(ShardError::MicroBatches { micro_batches, world_size });
        }
        Ok(())
    }
}

/// Numbers of ranks that so many lanes can be dealt to, in words.
fn divisors(lanes: usize) -> String {
    let all: Vec<String> =
        (1..=lanes).filter(|&ranks| lanes.is_multiple_of(ranks)).map(|ranks| ranks.to_string()).collect();
    match all.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => all.concat(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::Shard;

    #[test]
    fn lanes_are_dealt_in_equal_numbers_or_not_at_all() {
        for ranks in [1, 2, 3, 6] {
            let mut dealt: Vec<usize> =
                (0..ranks).flat_map(|rank| Shard::new(rank, ranks).unwrap().own(6)).collect();
            dealt.sort_unstable();
            assert_eq!(dealt, [0, 1, 2, 3, 4, 5]);
            assert_eq!(Shard::new(0, ranks).unwrap().check(6, 12), Ok(()));
        }
        let refused = |ranks, micro_batches| {
            Shard::new(0, ranks).unwrap().check(6, micro_batches).unwrap_err().to_string()
        };
        assert!(refused(4, 4).contains("6 lanes") && refused(4, 4).contains("use 1, 2, 3 or 6 ranks"));
        assert!(refused(3, 4).contains("4 micro-batches a step are not a multiple of 3 ranks"));
        assert!(Shard::new(2, 2).unwrap_err().to_string().contains("rank 2 is none of 2"));
    }
}
