//! What attention does over slices: softmaxes over what a token may look at, rotations, and heads that move between the
//! rows of a matrix and matrices of their own.
//!
//! A block's scores are matrices `[queries, columns]`, one for each head, one after the other; `visible` has the span of
//! columns that each query may look at.

use std::ops::Range;

use pulp::Arch;

use super::{exp, map_sum, max};

/// Turns scores into `exp(score - max of the row)` over what each query may look at, zero elsewhere, and gives each row's
/// largest score and the sum of its exponentials.
pub(in crate::model) fn visible_exponentials(
    scores: &mut [f32],
    columns: usize,
    visible: &[Range<usize>],
) -> Vec<(f32, f32)> {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let rows = scores.chunks_exact_mut(columns).zip(visible.iter().cycle());
            rows.map(|(row, span)| {
                let row = only(row, span);
                let max = max(row);
                (max, map_sum(row, |x| exp(x - max), |_, e| e))
            })
            .collect()
        },
    )
}

/// Turns scores into the probabilities that a softmax over what each query may look at has made of them, zero elsewhere,
/// given the logarithm of each row's sum of exponentials.
pub(in crate::model) fn visible_probabilities(
    scores: &mut [f32],
    columns: usize,
    visible: &[Range<usize>],
    log_sums: &[f32],
) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let rows = scores.chunks_exact_mut(columns).zip(visible.iter().cycle());
            for ((row, span), &log_sum) in rows.zip(log_sums) {
                for x in only(row, span) {
                    *x = exp(*x - log_sum);
                }
            }
        },
    );
}

/// A row's span, after the rest of the row was set to zero.
#[inline(always)]
fn only<'a>(row: &'a mut [f32], span: &Range<usize>) -> &'a mut [f32] {
    row[..span.start].fill(0.0);
    row[span.end..].fill(0.0);
    &mut row[span.clone()]
}

/// Gradient of a softmax with respect to its scores, in place of that of its result: `(d_p - along) * p`, where `along` is the
/// row's own sum of `d_p * p`.
pub(in crate::model) fn softmax_backward(
    d_result: &mut [f32],
    result: &[f32],
    along: &[f32],
    columns: usize,
) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let rows = d_result.chunks_exact_mut(columns).zip(result.chunks_exact(columns));
            for ((d_row, row), &along) in rows.zip(along) {
                d_row.iter_mut().zip(row).for_each(|(d, &p)| *d = (*d - along) * p);
            }
        },
    );
}

/// Some columns of a matrix, `[rows, which.len()]`.
pub(in crate::model) fn some_columns(values: &[f32], columns: usize, which: &[u32]) -> Vec<f32> {
    let mut some = vec![0.0; values.len() / columns * which.len()];
    for (to, from) in some.chunks_exact_mut(which.len()).zip(values.chunks_exact(columns)) {
        to.iter_mut().zip(which).for_each(|(to, &column)| *to = from[column as usize]);
    }
    some
}

/// Puts matrices of heads, `[heads, rows, width]`, beside one another into the rows of `into`, `[rows, heads * width]`, each row
/// times its head's factor, `[heads, rows]`.
pub(in crate::model) fn place_heads(
    from: &[f32],
    factors: &[f32],
    heads: usize,
    width: usize,
    into: &mut [f32],
) {
    let rows = factors.len() / heads;
    for ((index, from), &factor) in (0..).zip(from.chunks_exact(width)).zip(factors) {
        let to = &mut into[(index % rows * heads + index / rows) * width..][..width];
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = from * factor);
    }
}

/// Adds matrices of heads, `[heads, rows, width]`, to the rows of `into`, `[rows, heads * width]`.
pub(in crate::model) fn add_heads(from: &[f32], heads: usize, width: usize, into: &mut [f32]) {
    let rows = from.len() / heads / width;
    for (index, from) in from.chunks_exact(width).enumerate() {
        let to = &mut into[(index % rows * heads + index / rows) * width..][..width];
        to.iter_mut().zip(from).for_each(|(to, &from)| *to += from);
    }
}

/// Rotates the heads of rows, `[rows, heads * width]`, by the angles of their row, whose cosines and sines are
/// `[rows, width / 2]`, and multiplies them by `scale`: dimension `i` of a head is paired with `i + width / 2`. `turns` is 1, or
/// -1 for the rotation backwards.
pub(in crate::model) fn rotate(
    values: &mut [f32],
    width: usize,
    (cosine, sine): (&[f32], &[f32]),
    turns: f32,
    scale: f32,
) {
    let half = width / 2;
    let row_width = values.len() / (cosine.len() / half);
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let angles = cosine.chunks_exact(half).zip(sine.chunks_exact(half));
            for (row, (cosine, sine)) in values.chunks_exact_mut(row_width).zip(angles) {
                for head in row.chunks_exact_mut(width) {
                    let (first, second) = head.split_at_mut(half);
                    let pairs = first.iter_mut().zip(second).zip(cosine.iter().zip(sine));
                    for ((first, second), (&cosine, &sine)) in pairs {
                        let (a, b) = (*first, *second);
                        *first = (a * cosine - b * (sine * turns)) * scale;
                        *second = (b * cosine + a * (sine * turns)) * scale;
                    }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::super::noise;
    use super::*;

    #[test]
    fn a_softmax_sees_its_span_alone_and_is_made_again_of_its_sum() {
        let columns = 5;
        let visible = [0..1, 0..2, 2..3, 2..4, 2..5];
        // Two heads.
        let before = noise(2 * visible.len() * columns);
        let mut exponentials = before.clone();
        let sums = visible_exponentials(&mut exponentials, columns, &visible);
        let mut again = before.clone();
        let log_sums: Vec<f32> = sums.iter().map(|(max, sum)| max + sum.ln()).collect();
        visible_probabilities(&mut again, columns, &visible, &log_sums);
        for (row, scores) in before.chunks(columns).enumerate() {
            let span = &visible[row % visible.len()];
            let sum: f64 = scores[span.clone()].iter().map(|&x| f64::from(x).exp()).sum();
            for (column, &score) in scores.iter().enumerate() {
                let expected = if span.contains(&column) { f64::from(score).exp() / sum } else { 0.0 };
                let first = exponentials[row * columns + column] / sums[row].1;
                let second = again[row * columns + column];
                assert!((f64::from(first) - expected).abs() < 1e-6, "{row} {column}: {first} {expected}");
                assert!((f64::from(second) - expected).abs() < 1e-5, "{row} {column}: {second} {expected}");
            }
        }
    }

    #[test]
    fn heads_stand_beside_one_another() {
        // Two heads of three rows, two wide: the value says head, row and column.
        let heads: Vec<f32> = (0..12u8).map(|i| f32::from(i / 6 * 100 + i / 2 % 3 * 10 + i % 2)).collect();
        let mut placed = vec![9.0; 12];
        place_heads(&heads, &[1.0, 1.0, 1.0, 1.0, 1.0, 2.0], 2, 2, &mut placed);
        assert_eq!(placed, [0., 1., 100., 101., 10., 11., 110., 111., 20., 21., 240., 242.]);
        add_heads(&heads, 2, 2, &mut placed);
        assert_eq!(placed, [0., 2., 200., 202., 20., 22., 220., 222., 40., 42., 360., 363.]);
        assert_eq!(some_columns(&[1., 2., 3., 4., 5., 6.], 3, &[0, 2]), [1., 3., 4., 6.]);
    }

    #[test]
    fn a_rotation_and_its_inverse_are_none() {
        let before = noise(2 * 8);
        let angles: Vec<f32> = noise(4);
        let (cosine, sine): (Vec<f32>, Vec<f32>) = angles.iter().map(|x| (x.cos(), x.sin())).unzip();
        let mut values = before.clone();
        rotate(&mut values, 4, (&cosine, &sine), 1.0, 2.0);
        // Dimension 1 of the second head of the second row.
        let (a, b) = (before[13], before[15]);
        assert!((values[13] - 2.0 * (a * cosine[3] - b * sine[3])).abs() < 1e-5);
        assert!((values[15] - 2.0 * (b * cosine[3] + a * sine[3])).abs() < 1e-5);
        rotate(&mut values, 4, (&cosine, &sine), -1.0, 0.5);
        for (found, expected) in values.iter().zip(&before) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }
}
