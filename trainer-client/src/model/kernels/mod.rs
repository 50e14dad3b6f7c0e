//! Elementwise work on the CPU: one pass over slices, in vector instructions, where tensor operations take several passes,
//! each over new memory and with the C library's scalar `exp`.
//!
//! `dispatch` compiles what is inlined into it for each instruction set, hence all the `inline(always)`. Sums go over [`LANES`] partial sums whatever the machine's width, so the bits are the same with every instruction set.

#![allow(clippy::inline_always)]

pub(super) mod attention;

use pulp::Arch;
use rayon::prelude::*;

/// Partial sums of a row.
const LANES: usize = 16;
/// Values in a piece of an elementwise pass over a whole weight: its four arrays fit a core's cache.
const PIECE: usize = 1 << 14;

/// `e^x` to 2 units in the last place (Cephes' `expf`), without a branch; `x` is held within [-87, 88], and NaN stays.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// `1.5 * 2^23`: adding it leaves the nearest whole number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + coefficient;
    }
    (p * (r * r) + r + 1.0) * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// Largest value.
#[inline(always)]
fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// Replaces every value by `map(value)` and gives the sum of `weigh(value, mapped)`.
#[inline(always)]
fn map_sum(values: &mut [f32], map: impl Fn(f32) -> f32, weigh: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            let mapped = map(*value);
            *lane += weigh(*value, mapped);
            *value = mapped;
        }
    }
    let mut sum: f32 = lanes.iter().sum();
    for value in rest {
        let mapped = map(*value);
        sum += weigh(*value, mapped);
        *value = mapped;
    }
    sum
}

/// What a block of the vocabulary adds to a row's softmax, beside the exponentials themselves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct RowSum {
    /// Largest logit.
    pub max: f32,
    /// Sum of `exp(logit - max)`.
    pub sum: f32,
    /// Sum of `exp(logit - max) * (logit - max)`, or 0 where entropies are not wanted.
    pub weighted: f32,
}

/// Turns rows of `columns` logits into `exp(logit - max of the row)`.
pub(super) fn exponentials(logits: &mut [f32], columns: usize, wants_entropies: bool) -> Vec<RowSum> {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            logits
                .chunks_exact_mut(columns)
                .map(|row| {
                    let max = max(row);
                    let weighted = if wants_entropies {
                        map_sum(&mut row.to_vec(), |x| x, |x, _| exp(x - max) * (x - max))
                    } else {
                        0.0
                    };
                    RowSum { max, sum: map_sum(row, |x| exp(x - max), |_, e| e), weighted }
                })
                .collect()
        },
    )
}

/// `exp(logit - shift) ` of every row, its own shift.
pub(super) fn shifted_exponentials(logits: &mut [f32], columns: usize, shifts: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (row, &shift) in logits.chunks_exact_mut(columns).zip(shifts) {
                for x in row {
                    *x = exp(*x - shift);
                }
            }
        },
    );
}

/// Some rows of a matrix of `columns`, each times a factor of its own.
pub(super) fn scaled_rows(values: &[f32], columns: usize, rows: &[u32], factors: &[f32]) -> Vec<f32> {
    let mut scaled = vec![0.0; rows.len() * columns];
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for ((to, &row), &factor) in scaled.chunks_exact_mut(columns).zip(rows).zip(factors) {
                let from = &values[row as usize * columns..][..columns];
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = from * factor);
            }
        },
    );
    scaled
}

/// Multiplies every row of `columns` by a factor of its own.
pub(super) fn scale_rows(values: &mut [f32], columns: usize, factors: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (row, &factor) in values.chunks_exact_mut(columns).zip(factors) {
                for x in row {
                    *x *= factor;
                }
            }
        },
    );
}

/// `silu(gate) * up`.
pub(super) fn gated(gate: &[f32], up: &[f32]) -> Vec<f32> {
    Arch::new().dispatch(
        #[inline(always)]
        || gate.iter().zip(up).map(|(&gate, &up)| gate / (1.0 + exp(-gate)) * up).collect(),
    )
}

/// Gradients of [`gated`]: turns `gate`, `up` and the gradient of the result into the gradient of gate, the gradient of up,
/// and the result.
pub(super) fn gated_backward(gate: &mut [f32], up: &mut [f32], d_result: &mut [f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for ((gate, up), d) in gate.iter_mut().zip(up).zip(d_result) {
                let (a, b, d_inner) = (*gate, *up, *d);
                let sigmoid = 1.0 / (1.0 + exp(-a));
                let silu = a * sigmoid;
                // silu'(a) = s + silu(a) (1 - s) with s = sigmoid(a).
                *gate = d_inner * b * ((1.0 - sigmoid) * silu + sigmoid);
                *up = d_inner * silu;
                *d = silu * b;
            }
        },
    );
}

/// Sum of squares.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    let pieces: Vec<f32> = values
        .par_chunks(PIECE)
        .map(|piece| {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    let mut lanes = [0.0; LANES];
                    let (chunks, rest) = piece.as_chunks::<LANES>();
                    for chunk in chunks {
                        lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane += x * x);
                    }
                    lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
                },
            )
        })
        .collect();
    pieces.into_iter().map(f64::from).sum()
}

/// The numbers of one step of AdamW, as [`adamw`] needs them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWNumbers {
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// What gradients are multiplied with.
    pub scale: f32,
    /// What weights are multiplied with.
    pub decay: f32,
    /// `learning rate / (1 - beta1^t)`.
    pub rate: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    pub root_factor: f32,
}

/// Moves a weight and its moments along its gradient.
pub(crate) fn adamw(
    numbers: AdamWNumbers,
    weight: &mut [f32],
    mean: &mut [f32],
    square: &mut [f32],
    gradient: &[f32],
) {
    let AdamWNumbers { beta1, beta2, eps, scale, decay, rate, root_factor } = numbers;
    let pieces =
        weight.par_chunks_mut(PIECE).zip(mean.par_chunks_mut(PIECE)).zip(square.par_chunks_mut(PIECE));
    pieces.zip(gradient.par_chunks(PIECE)).for_each(|(((weight, mean), square), gradient)| {
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for (((w, m), v), &g) in weight.iter_mut().zip(mean).zip(square).zip(gradient) {
                    let g = g * scale;
                    *m = *m * beta1 + g * (1.0 - beta1);
                    *v = *v * beta2 + g * g * (1.0 - beta2);
                    *w = *w * decay - *m / (v.sqrt() * root_factor + eps) * rate;
                }
            },
        );
    });
}

/// Numbers from -10 to 10 for tests.
#[cfg(test)]
fn noise(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state as f32 / u32::MAX as f32 * 20.0 - 10.0
    };
    (0..count).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_double_precision() {
        for x in (-8700..=8800).map(|x| x as f32 / 100.0) {
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 2.5e-7, "e^{x}: {} {expected}", exp(x));
        }
        assert!(exp(f32::NAN).is_nan() && exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn exponentials_of_blocks_make_a_softmax() {
        let (rows, columns) = (3, 37);
        let logits = noise(rows * columns);
        let mut values = logits.clone();
        for (row, sums) in exponentials(&mut values, columns, true).into_iter().enumerate() {
            let logits: Vec<f64> = logits[row * columns..][..columns].iter().map(|&x| f64::from(x)).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
            let weighted: f64 = logits.iter().map(|x| (x - max).exp() * (x - max)).sum();
            assert!((f64::from(sums.max) - max).abs() < 1e-6);
            assert!((f64::from(sums.sum) / sum - 1.0).abs() < 1e-6);
            assert!((f64::from(sums.weighted) - weighted).abs() < 1e-5);
            for (value, logit) in values[row * columns..][..columns].iter().zip(&logits) {
                assert!((f64::from(*value) - (logit - max).exp()).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn the_gate_has_the_slope_that_its_gradient_says() {
        let (gate, up) = (noise(50), noise(100)[50..].to_vec());
        let (mut d_gate, mut d_up, mut result) = (gate.clone(), up.clone(), vec![1.0; 50]);
        gated_backward(&mut d_gate, &mut d_up, &mut result);
        assert_eq!(result.len(), 50);
        let exact = |a: f64, b: f64| a / (1.0 + (-a).exp()) * b;
        for index in 0..50 {
            let (a, b) = (f64::from(gate[index]), f64::from(up[index]));
            let slope = (exact(a + 1e-5, b) - exact(a - 1e-5, b)) / 2e-5;
            assert!((f64::from(d_gate[index]) - slope).abs() < 1e-4);
            assert!((f64::from(d_up[index]) - exact(a, 1.0)).abs() < 1e-5);
            assert!((f64::from(result[index]) - exact(a, b)).abs() < 1e-4);
        }
        assert_eq!(gated(&gate, &up).len(), 50);
    }

    #[test]
    fn squares_of_many_pieces_are_summed() {
        let values = noise(3 * PIECE + 7);
        let expected: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
        assert!((sum_of_squares(&values) / expected - 1.0).abs() < 1e-5);
    }
}
