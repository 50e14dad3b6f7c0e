//! What has been fetched of one partition, pass after pass over it, and where it ends.

use std::collections::VecDeque;

use bytes::Bytes;

use super::kind::TopicKind;
use super::place::Position;

/// A record's place and bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Pass that it belongs to, counted from 1.
    pub epoch: u64,
    /// Offset in its partition.
    pub offset: i64,
    /// Payload; `None` for a tombstone.
    pub payload: Option<Bytes>,
    /// What the record's header says that it is, if it says so.
    pub kind: Option<TopicKind>,
}

/// How far the reading of a partition has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Records are being fetched.
    Reading,
    /// The broker said that there is no more, before the offset that the pass ends at. It may be right, as the last
    /// offsets may hold marks of transactions alone, or be a replica that lags behind.
    EndedEarly,
    /// The rest is fetched once more from a broker that was seen to have all of it.
    Confirming,
    /// The pass is read.
    PassRead,
    /// The last pass is read, or nothing is to be read after an error.
    Ended,
}

/// A partition on its way through its passes.
#[derive(Debug)]
pub struct Track {
    partition: i32,
    epoch: u64,
    first_offset: i64,
    expected_offset: i64,
    end: Option<i64>,
    progress: Progress,
    buffer: VecDeque<Record>,
    buffered_bytes: usize,
}

impl Track {
    /// A partition that is read from a place on.
    pub fn new(partition: i32, position: &Position) -> Self {
        let Position { epoch, first_offset, next_offset, end, .. } = *position;
        let is_read = end.is_some_and(|end| next_offset >= end);
        let progress = if is_read { Progress::PassRead } else { Progress::Reading };
        let (buffer, buffered_bytes) = (VecDeque::new(), 0);
        Self {
            partition,
            epoch,
            first_offset,
            expected_offset: next_offset,
            end,
            progress,
            buffer,
            buffered_bytes,
        }
    }

    /// Its number.
    pub fn partition(&self) -> i32 {
        self.partition
    }

    /// Pass that is being read, counted from 1.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Offset that the first pass began at.
    pub fn first_offset(&self) -> i64 {
        self.first_offset
    }

    /// Offset of the next record to fetch.
    pub fn expected_offset(&self) -> i64 {
        self.expected_offset
    }

    /// Offset that each pass ends before, if it ends.
    pub fn end(&self) -> Option<i64> {
        self.end
    }

    /// How far the reading has come.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Payload bytes that wait.
    pub fn buffered_bytes(&self) -> usize {
        self.buffered_bytes
    }

    /// Records that wait.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Stores a fetched record, and says so. One past the end, or fetched a second time after a pause, is dropped.
    pub fn arrive(&mut self, offset: i64, payload: Option<Bytes>, kind: Option<TopicKind>) -> bool {
        if matches!(self.progress, Progress::PassRead | Progress::Ended) {
            return false;
        }
        let is_past_end = self.end.is_some_and(|end| offset >= end);
        let is_new = offset >= self.expected_offset && !is_past_end;
        if is_new {
            self.expected_offset = offset + 1;
            self.buffered_bytes += payload.as_ref().map_or(0, Bytes::len);
            self.buffer.push_back(Record { epoch: self.epoch, offset, payload, kind });
        }
        let is_read = is_past_end || self.end.is_some_and(|end| self.expected_offset >= end);
        self.progress = if is_read { Progress::PassRead } else { Progress::Reading };
        is_new
    }

    /// Notes that the broker has no record after the last one now.
    pub fn reached_end(&mut self) {
        self.progress = match self.progress {
            Progress::Reading if self.end.is_some() => Progress::EndedEarly,
            // It was asked for the rest after it was seen to have all of it, and there is none.
            Progress::Confirming => Progress::PassRead,
            other => other,
        };
    }

    /// Fetches the rest once more, because the broker has by now what the pass ends at.
    pub fn confirm(&mut self) {
        self.progress = Progress::Confirming;
    }

    /// Begins the next pass, at the first offset that the partition has now.
    pub fn begin_pass(&mut self, low: i64) {
        self.epoch += 1;
        self.expected_offset = low;
        let is_empty = self.end.is_some_and(|end| low >= end);
        self.progress = if is_empty { Progress::PassRead } else { Progress::Reading };
    }

    /// Reads nothing more.
    pub fn finish(&mut self) {
        self.progress = Progress::Ended;
    }

    /// Takes the next record.
    pub fn take(&mut self) -> Option<Record> {
        let record = self.buffer.pop_front()?;
        self.buffered_bytes -= record.payload.as_ref().map_or(0, Bytes::len);
        Some(record)
    }

    /// Drops the records that wait; how many there were.
    pub fn discard(&mut self) -> usize {
        let waiting = self.buffer.len();
        self.buffer.clear();
        self.buffered_bytes = 0;
        waiting
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{Progress, Track};
    use crate::stream::Position;

    fn track(next_offset: i64, end: Option<i64>) -> Track {
        Track::new(3, &Position { epoch: 1, first_offset: 0, next_offset, end, documents: 0 })
    }

    fn arrive(track: &mut Track, offset: i64) -> bool {
        track.arrive(offset, Some(Bytes::from_static(b"x")), None)
    }

    fn drain(track: &mut Track) -> Vec<(u64, i64)> {
        std::iter::from_fn(|| track.take()).map(|record| (record.epoch, record.offset)).collect()
    }

    #[test]
    fn repeats_and_records_past_the_end_are_dropped() {
        let mut track = track(5, Some(8));
        let taken: Vec<bool> = [4, 5, 6, 5, 6, 9, 10].map(|offset| arrive(&mut track, offset)).into();
        assert_eq!(taken, [false, true, true, false, false, false, false]);
        assert_eq!(track.buffered_bytes(), 2);
        assert_eq!(drain(&mut track), [(1, 5), (1, 6)]);
        assert_eq!((track.progress(), track.buffered_bytes()), (Progress::PassRead, 0));
    }

    #[test]
    fn an_end_before_the_end_is_believed_only_when_the_broker_has_all_of_it() {
        let mut track = track(0, Some(4));
        arrive(&mut track, 0);
        track.reached_end();
        assert_eq!(track.progress(), Progress::EndedEarly);
        // A broker that lagged behind has caught up by itself.
        arrive(&mut track, 1);
        assert_eq!(track.progress(), Progress::Reading);
        track.reached_end();
        track.confirm();
        // It had not: there was another record.
        arrive(&mut track, 2);
        assert_eq!(track.progress(), Progress::Reading);
        track.reached_end();
        track.confirm();
        track.reached_end();
        assert_eq!(track.progress(), Progress::PassRead, "offset 3 is a transaction's mark");
        assert_eq!(drain(&mut track), [(1, 0), (1, 1), (1, 2)]);
    }

    #[test]
    fn a_pass_begins_where_the_partition_begins_by_then() {
        let mut track = track(0, Some(3));
        (0..3).for_each(|offset| assert!(arrive(&mut track, offset)));
        track.begin_pass(1);
        assert!(!arrive(&mut track, 0), "retention has removed it since");
        assert!(arrive(&mut track, 1) && arrive(&mut track, 2));
        assert_eq!(drain(&mut track), [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]);
        track.begin_pass(3);
        assert_eq!(track.progress(), Progress::PassRead, "nothing is left of it");
    }

    #[test]
    fn a_followed_partition_never_ends() {
        let mut track = track(0, None);
        track.reached_end();
        assert_eq!(track.progress(), Progress::Reading);
    }
}
