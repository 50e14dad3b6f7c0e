//! Where a partition begins to be read.

use super::error::StreamError;
use super::place::{Extent, Position};

/// Where a partition begins to be read: where `place` says, or at the first record. `offsets` are the first and the
/// past-the-last offset that it has now.
pub(super) fn starting_position(
    (topic, partition): (&str, i32),
    extent: Extent,
    (low, high): (i64, i64),
    place: Option<&Position>,
) -> Result<Position, StreamError> {
    let end = (extent != Extent::Follow).then_some(high);
    let begin = Position { epoch: 1, first_offset: low, next_offset: low, end, documents: 0 };
    let position = place.copied().unwrap_or(begin);
    let Position { next_offset, end, .. } = position;
    if next_offset < low && end.is_none_or(|end| next_offset < end) {
        return Err(StreamError::Removed { topic: topic.to_owned(), partition, next_offset, low });
    }
    let reached = end.unwrap_or(next_offset).max(next_offset);
    if reached > high {
        return Err(StreamError::Shorter { topic: topic.to_owned(), partition, next_offset: reached, high });
    }
    Ok(position)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::starting_position;
    use crate::stream::{Extent, Position, StreamError};

    const EPOCHS: Extent = Extent::UntilEnd { epochs: 2 };

    fn at(next_offset: i64, end: Option<i64>) -> Position {
        Position { epoch: 1, first_offset: 0, next_offset, end, documents: 9 }
    }

    #[test]
    fn a_place_is_gone_on_from_and_a_lane_that_has_none_is_read_from_its_start() {
        let start =
            |offsets, place: Option<Position>| starting_position(("t", 0), EPOCHS, offsets, place.as_ref());
        // The end is the one that the run began with, whatever has been added since.
        assert_eq!(start((3, 30), Some(at(7, Some(20)))).unwrap(), at(7, Some(20)));
        let begun = Position { epoch: 1, first_offset: 2, next_offset: 2, end: Some(8), documents: 0 };
        assert_eq!(start((2, 8), None).unwrap(), begun);
        // A lane that was read to its end misses nothing that retention has removed.
        assert_eq!(start((6, 9), Some(at(5, Some(5)))).unwrap(), at(5, Some(5)));
        let followed = starting_position(("t", 0), Extent::Follow, (3, 30), None).unwrap();
        assert_eq!((followed.next_offset, followed.end), (3, None));
    }

    #[test]
    fn what_retention_has_removed_is_an_error_and_not_a_gap() {
        let error = starting_position(("t", 0), EPOCHS, (8, 30), Some(&at(7, Some(20)))).unwrap_err();
        let is_removed = matches!(error, StreamError::Removed { partition: 0, next_offset: 7, low: 8, .. });
        assert!(is_removed && error.to_string().contains("documents would be lost"), "{error}");
    }

    #[test]
    fn a_topic_that_ends_before_the_place_is_another_one() {
        for place in [at(21, None), at(7, Some(21))] {
            let error = starting_position(("t", 0), EPOCHS, (0, 20), Some(&place)).unwrap_err();
            assert!(matches!(error, StreamError::Shorter { next_offset: 21, high: 20, .. }), "{error}");
        }
    }
}
