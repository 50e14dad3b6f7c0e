//! The top k of a list, in linear time, with ties broken by position.

use super::adaptive::Adaptive;
use super::ratio::KeepRatio;
use crate::random::SplitMix64;

/// How many of those that compete are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Share {
    /// So many of each hundred.
    Ratio(KeepRatio),
    /// As many as score at least 0, within bounds.
    Adaptive(Adaptive),
}

impl Share {
    fn count(self, candidates: &[(u32, u64)]) -> usize {
        match self {
            Self::Ratio(keep) => keep.count(candidates.len()),
            Self::Adaptive(rule) => {
                let zero = order_preserving(0.0);
                rule.count(candidates.len(), candidates.iter().filter(|(_, key)| *key >= zero).count())
            }
        }
    }
}

/// One key a position, in the order of its score: a higher key is kept before a lower one, and a position without
/// a key cannot be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys(Vec<Option<u64>>);

impl Keys {
    /// Keys of scores; NaN marks a position that cannot be kept, and both zeros are one score.
    pub fn of_scores(scores: &[f32]) -> Self {
        Self(scores.iter().map(|&score| (!score.is_nan()).then(|| order_preserving(score))).collect())
    }

    /// Keys drawn for the positions that have a score, named by `seed`, `step` and `micro_batch` alone: no two
    /// positions are likelier than others, whatever their scores.
    pub fn drawn(scores: &[f32], seed: u64, step: u64, micro_batch: u64) -> Self {
        let mut generator = SplitMix64::keyed(SplitMix64::keyed(seed, step).next_u64(), micro_batch);
        Self(scores.iter().map(|score| (!score.is_nan()).then(|| generator.next_u64())).collect())
    }

    /// Positions, with or without a key.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The keys of several lists as one list.
    pub fn concat(lists: &[Self]) -> Self {
        Self(lists.iter().flat_map(|list| list.0.iter().copied()).collect())
    }

    /// Positions of the share with the highest keys, ascending; of equal keys the earlier position wins.
    pub fn highest(&self, share: Share) -> Vec<u32> {
        highest(&self.0, share)
    }

    /// As [`Keys::highest`], of each run of `row_len` positions by itself.
    ///
    /// # Panics
    /// When `row_len` is 0.
    pub fn highest_of_each(&self, row_len: usize, share: Share) -> Vec<u32> {
        let rows = (0..).step_by(row_len).zip(self.0.chunks(row_len));
        rows.flat_map(|(start, row)| highest(row, share).into_iter().map(move |index| start + index))
            .collect()
    }
}

fn highest(keys: &[Option<u64>], share: Share) -> Vec<u32> {
    let mut candidates: Vec<(u32, u64)> =
        (0..).zip(keys).filter_map(|(index, key)| key.map(|key| (index, key))).collect();
    let count = share.count(&candidates);
    if count < candidates.len() {
        candidates
            .select_nth_unstable_by(count, |left, right| right.1.cmp(&left.1).then(left.0.cmp(&right.0)));
        candidates.truncate(count);
    }
    // Marking and collecting keeps the whole linear, where a sort of the kept indices would not be.
    let mut is_kept = vec![false; keys.len()];
    for (index, _) in candidates {
        is_kept[index as usize] = true;
    }
    (0..).zip(is_kept).filter(|&(_, kept)| kept).map(|(index, _)| index).collect()
}

/// The bits of a number, changed so that they order as integers do.
fn order_preserving(score: f32) -> u64 {
    // Adding zero turns -0.0 into 0.0, whose bits differ.
    let bits = (score + 0.0).to_bits();
    let negative = bits >> 31 == 1;
    u64::from(if negative { !bits } else { bits | 1 << 31 })
}
