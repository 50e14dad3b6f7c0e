//! How the losses of single tokens move over training (Rho-1, arXiv 2404.07965, section 2.1 and appendix).

use serde::Serialize;

/// Least change over training that counts as one, in nats.
const CHANGE_NATS: f64 = 0.2;

/// What became of a token's loss. H is high, L is low.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Category {
    /// It stayed high.
    #[serde(rename = "H->H")]
    HighHigh,
    /// It rose.
    #[serde(rename = "L->H")]
    LowHigh,
    /// It fell: what was learnt.
    #[serde(rename = "H->L")]
    HighLow,
    /// It stayed low.
    #[serde(rename = "L->L")]
    LowLow,
}

impl Category {
    /// In the paper's order.
    pub const ALL: [Self; 4] = [Self::HighHigh, Self::LowHigh, Self::HighLow, Self::LowLow];

    /// As the paper writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::HighHigh => "H→H",
            Self::LowHigh => "L→H",
            Self::HighLow => "H→L",
            Self::LowLow => "L→L",
        }
    }
}

/// The category of each token, given the losses in nats of all tokens at each of n checkpoints.
///
/// `a x + b` is fitted to a token's losses by least squares over x = 1 to n, and `a n` is its change. One that falls by more
/// than 0.2 is H->L, one that rises by more L->H; of the others L->L are those whose last loss is at most the mean last loss of
/// all tokens, and H->H the rest. Fewer than two checkpoints say nothing, so no token has a category then.
///
/// # Panics
/// When the checkpoints differ in their number of tokens.
pub fn categories(checkpoints: &[&[f32]]) -> Vec<Category> {
    let (Some(last), true) = (checkpoints.last(), checkpoints.len() >= 2) else { return vec![] };
    assert!(
        checkpoints.iter().all(|losses| losses.len() == last.len()),
        "checkpoints of one set have as many tokens"
    );
    let count = checkpoints.len() as f64;
    let middle = f64::midpoint(1.0, count);
    let spread: f64 = (1..=checkpoints.len()).map(|x| (x as f64 - middle).powi(2)).sum();
    let mean_last = last.iter().map(|&loss| f64::from(loss)).sum::<f64>() / last.len() as f64;
    let category = |token: usize| {
        let covariance: f64 = (1..)
            .zip(checkpoints)
            .map(|(x, losses)| (f64::from(x) - middle) * f64::from(losses[token]))
            .sum();
        let change = covariance / spread * count;
        if change < -CHANGE_NATS {
            Category::HighLow
        } else if change > CHANGE_NATS {
            Category::LowHigh
        } else if f64::from(last[token]) <= mean_last {
            Category::LowLow
        } else {
            Category::HighHigh
        }
    };
    (0..last.len()).map(category).collect()
}

#[cfg(test)]
mod tests {
    use super::Category::{HighHigh, HighLow, LowHigh, LowLow};
    use super::categories;

    #[test]
    fn agrees_with_slopes_worked_out_by_hand() {
        // Five tokens at four checkpoints. The slope of four values is sum((x - 2.5) y) / 5, and the change four times that:
        //   3.0 2.5 2.4 1.9 -> -1.36   falls
        //   1.0 1.3 1.1 1.6 ->  0.64   rises
        //   4.0 4.1 3.9 4.0 -> -0.08   stays, above the mean last loss of 2.02
        //   0.5 0.4 0.5 0.45 -> -0.02  stays, below it
        //   2.0 2.0 2.1 2.15 -> 0.22   rises by a little more than 0.2, though its ends differ by less
        let checkpoints: [&[f32]; 4] = [
            &[3.0, 1.0, 4.0, 0.5, 2.0],
            &[2.5, 1.3, 4.1, 0.4, 2.0],
            &[2.4, 1.1, 3.9, 0.5, 2.1],
            &[1.9, 1.6, 4.0, 0.45, 2.15],
        ];
        assert_eq!(categories(&checkpoints), [HighLow, LowHigh, HighHigh, LowLow, LowHigh]);
    }

    #[test]
    fn one_checkpoint_says_nothing() {
        assert_eq!(categories(&[&[1.0, 2.0]]), []);
    }
}
