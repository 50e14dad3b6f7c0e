//! Records of the documents topic that are there and cannot be read, because a producer has left a transaction open before
//! them: readers of committed records stand still at the last stable offset.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What the client knows of a partition that it reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    pub(super) partition: i32,
    /// Where it reads on.
    pub(super) next: i64,
    /// Before this offset every transaction has come to its end; below 0 where that is not known.
    pub(super) stable: i64,
    /// The end of the log.
    pub(super) end: i64,
}

/// Since when each partition has stood still at an open transaction.
#[derive(Debug, Default)]
pub(super) struct Standing(BTreeMap<i32, (i64, Instant)>);

impl Standing {
    /// Takes what is known of all partitions that are read; the longest time that one of them stands still.
    pub(super) fn look(&mut self, partitions: impl Iterator<Item = Ends>, now: Instant) -> Duration {
        let before = std::mem::take(&mut self.0);
        for Ends { partition, next, stable, end } in partitions {
            // All that can be read has been, and there is more.
            if stable >= 0 && next >= stable && end > stable {
                let since =
                    before.get(&partition).filter(|(at, _)| *at == stable).map_or(now, |(_, since)| *since);
                self.0.insert(partition, (stable, since));
            }
        }
        self.0.values().map(|(_, since)| now.saturating_duration_since(*since)).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_stands_still_while_its_stable_offset_does_and_there_is_more() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let ends = |next, stable, end| std::iter::once(Ends { partition: 3, next, stable, end });
        let seconds = Duration::from_secs;
        let mut standing = Standing::default();
        assert_eq!(standing.look(ends(5, 10, 20), at(0)), seconds(0), "there is something to read");
        assert_eq!(standing.look(ends(10, 10, 20), at(60)), seconds(0));
        assert_eq!(standing.look(ends(10, 10, 30), at(90)), seconds(30));
        assert_eq!(standing.look(ends(15, 15, 30), at(95)), seconds(0), "another transaction");
        assert_eq!(standing.look(ends(15, 15, 30), at(99)), seconds(4));
        assert_eq!(standing.look(ends(30, 30, 30), at(100)), seconds(0), "everything is read");
        assert_eq!(standing.look(ends(0, -1001, 30), at(101)), seconds(0), "nothing is known");
        assert_eq!(standing.look(ends(30, 30, 31), at(102)), seconds(0));
        assert_eq!(standing.look(std::iter::empty(), at(200)), seconds(0), "it is another daemon's");
    }
}
