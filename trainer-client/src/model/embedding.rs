//! The gradient of the embedding: rows of one token id are summed.

use std::collections::BTreeMap;

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use super::device::is_cpu;
use super::rows::indices;

/// Adds each of `rows`, `[tokens, hidden]`, to the row of its token id in a gradient of `[vocab, hidden]`, or in zeros of that
/// shape. Rows behind those of `tokens` are zero.
///
/// On the CPU one row after the other. A GPU would do that in one thread a column (Burn's `select_assign`), or in parallel and in
/// whatever order (its `scatter`); so elsewhere rows are added in pairs, the pairs' sums in pairs, and so on: as many
/// rounds as the most frequent token has binary digits, in an order that the tokens alone decide.
pub(super) fn add_by_token(
    into: Option<Tensor<2>>,
    vocab: usize,
    tokens: &[u32],
    rows: Tensor<2>,
) -> Tensor<2> {
    let ([_, hidden], device) = (rows.dims(), rows.device());
    if is_cpu(&device) {
        let into = into.unwrap_or_else(|| Tensor::zeros([vocab, hidden], &device));
        return into.select_assign(0, indices(tokens, &device), rows, IndexingUpdateOp::Add);
    }
    let sums = sums_by_token(vocab, tokens, rows);
    match into {
        Some(into) => into + sums,
        None => sums,
    }
}

/// Sums of the rows of each token id, zero where there are none, `[vocab, hidden]`.
fn sums_by_token(vocab: usize, tokens: &[u32], rows: Tensor<2>) -> Tensor<2> {
    let ([count, hidden], device) = (rows.dims(), rows.device());
    let Plan { rounds, sums, indices: all } = Plan::new(vocab, tokens, count);
    // One copy for all rounds.
    let all = indices(&all, &device);
    let part = |(first, count): (usize, usize)| -> Tensor<1, Int> { all.clone().narrow(0, first, count) };
    let mut x = Tensor::cat(vec![rows, Tensor::zeros([1, hidden], &device)], 0);
    for [left, right] in rounds {
        x = x.clone().select(0, part(left)) + x.select(0, part(right));
    }
    x.select(0, part(sums))
}

/// Which rows are added to which.
struct Plan {
    /// First and number of the indices of a round's rows on the left, and of those that are added to them. The last is always
    /// a row of zeros.
    rounds: Vec<[(usize, usize); 2]>,
    /// The same for the row after the last round where each token id's sum is.
    sums: (usize, usize),
    indices: Vec<u32>,
}

impl Plan {
    /// For `count` rows and one of zeros behind them.
    fn new(vocab: usize, tokens: &[u32], count: usize) -> Self {
        let mut rows_of = BTreeMap::<u32, Vec<u32>>::new();
        for (row, &token) in (0..).zip(tokens) {
            rows_of.entry(token).or_default().push(row);
        }
        let (mut rounds, mut indices) = (Vec::new(), Vec::new());
        let mut append = |values: Vec<u32>| {
            let first = indices.len();
            indices.extend(values);
            (first, indices.len() - first)
        };
        let mut zeros = count as u32;
        while rows_of.values().any(|rows| rows.len() > 1) {
            let (mut left, mut right) = (Vec::new(), Vec::new());
            for rows in rows_of.values_mut() {
                let first = left.len() as u32;
                left.extend(rows.iter().step_by(2));
                right.extend(rows.chunks(2).map(|pair| pair.get(1).copied().unwrap_or(zeros)));
                *rows = (first..left.len() as u32).collect();
            }
            left.push(zeros);
            right.push(zeros);
            zeros = left.len() as u32 - 1;
            rounds.push([append(left), append(right)]);
        }
        let row_of = |token: u32| rows_of.get(&token).map_or(zeros, |rows| rows[0]);
        let sums = append((0..vocab as u32).map(row_of).collect());
        Self { rounds, sums, indices }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use sluice_feed::random::SplitMix64;

    use super::*;
    use crate::model::host::to_host;

    const HIDDEN: usize = 3;

    /// Whole numbers, whose sums are exact in any order.
    fn rows(count: usize) -> Tensor<2> {
        let mut random = SplitMix64::keyed(5, 0);
        let values: Vec<f32> = (0..count * HIDDEN).map(|_| random.below(100) as f32 - 50.0).collect();
        Tensor::from_data(TensorData::new(values, [count, HIDDEN]), &Device::flex())
    }

    #[test]
    fn sums_in_pairs_are_those_of_one_row_after_the_other() {
        let mut random = SplitMix64::keyed(5, 1);
        for (vocab, count) in [(1, 1), (1, 37), (5, 64), (300, 200)] {
            let tokens: Vec<u32> = (0..count).map(|_| random.below(vocab) as u32).collect();
            let expected = to_host(add_by_token(None, vocab, &tokens, rows(count)));
            assert!(expected.iter().any(|&x| x != 0.0));
            assert_eq!(to_host(sums_by_token(vocab, &tokens, rows(count))), expected, "{vocab} {count}");
        }
    }

    #[test]
    fn each_round_halves_what_is_left_of_a_token() {
        // Half of the tokens are one, as in real text; the others stand alone.
        let tokens: Vec<u32> = (0..1024).map(|i| if i % 2 == 0 { 0 } else { i }).collect();
        let plan = Plan::new(1024, &tokens, tokens.len());
        let lengths: Vec<usize> = plan.rounds.iter().map(|[left, _]| left.1).collect();
        assert_eq!(lengths, [256, 128, 64, 32, 16, 8, 4, 2, 1].map(|of_one| of_one + 512 + 1));
    }
}
