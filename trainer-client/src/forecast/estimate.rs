//! A mean over tokens, and how far chance moves it. Tokens of one document are alike, so what varies is the document.

use serde::Serialize;

/// Fewest documents of which an interval is given.
const DOCUMENTS_MIN: usize = 5;
/// The 97.5 % quantile of the normal distribution.
const NORMAL_QUANTILE: f64 = 1.959_963_984_540_054;

/// A mean over tokens with its 95 % interval over documents, in the unit of what is summed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Of all tokens.
    pub mean: f64,
    /// Lower end of the interval; `None` where there are too few documents for one.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
}

impl Estimate {
    /// The mean over the tokens of documents, each given by the sum over its tokens and their number; `None` where there is no
    /// token.
    ///
    /// A mean over tokens is a ratio of two sums over documents; its variance is that of a ratio estimate (Cochran, Sampling
    /// Techniques, 3rd edition, 1977, chapter 6): `D / (D - 1) * sum((e - m n)^2) / (sum n)^2` for `D` documents with sums `e`,
    /// `n` tokens and the mean `m`. The interval is Student's, with `D - 1` degrees of freedom.
    pub fn of(documents: &[(f64, u64)]) -> Option<Self> {
        let documents: Vec<(f64, f64)> = documents
            .iter()
            .filter(|(_, tokens)| *tokens > 0)
            .map(|&(sum, tokens)| (sum, tokens as f64))
            .collect();
        let tokens: f64 = documents.iter().map(|(_, tokens)| tokens).sum();
        if documents.is_empty() {
            return None;
        }
        let mean = documents.iter().map(|(sum, _)| sum).sum::<f64>() / tokens;
        if documents.len() < DOCUMENTS_MIN {
            return Some(Self { mean, low: None, high: None });
        }
        let squares: f64 = documents.iter().map(|(sum, tokens)| (sum - mean * tokens).powi(2)).sum();
        let free = documents.len() as f64 - 1.0;
        let deviation = (squares * (free + 1.0) / free).sqrt() / tokens;
        let half = student_quantile(free) * deviation;
        Some(Self { mean, low: Some(mean - half), high: Some(mean + half) })
    }

    /// Which side of 0 it is on, as far as its interval says.
    pub fn standing(&self) -> Standing {
        match (self.low, self.high) {
            (Some(low), _) if low > 0.0 => Standing::Better,
            (_, Some(high)) if high < 0.0 => Standing::Worse,
            _ => Standing::Unclear,
        }
    }
}

/// How the reference stands beside the base model on some tokens, by the interval of the mean excess loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// It predicts them better.
    Better,
    /// The interval holds 0, or there are too few documents for one.
    Unclear,
    /// It predicts them worse.
    Worse,
}

/// The 97.5 % quantile of Student's distribution with `free` degrees of freedom, at least 4 (Abramowitz and Stegun, Handbook of
/// Mathematical Functions, 26.7.5, to its third term: 0.3 % too low at 4).
fn student_quantile(free: f64) -> f64 {
    let z = NORMAL_QUANTILE;
    let [z3, z5, z7] = [3, 5, 7].map(|power| z.powi(power));
    z + (z3 + z) / (4.0 * free)
        + (5.0 * z5 + 16.0 * z3 + 3.0 * z) / (96.0 * free.powi(2))
        + (3.0 * z7 + 19.0 * z5 + 17.0 * z3 - 15.0 * z) / (384.0 * free.powi(3))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::{Estimate, Standing, student_quantile};

    #[test]
    fn quantiles_are_those_of_the_printed_table() {
        // Abramowitz and Stegun, table 26.10.
        for (free, expected) in [(4.0, 2.776), (5.0, 2.571), (10.0, 2.228), (30.0, 2.042), (120.0, 1.980)] {
            let found = student_quantile(free);
            assert!((found / expected - 1.0).abs() < 3e-3, "{free}: {found}");
        }
    }

    #[test]
    fn documents_of_one_length_have_the_interval_of_their_means() {
        // Means 1 to 5: their mean is 3, its deviation sqrt(2.5 / 5), and 2.776 of that lie on each side.
        let documents: Vec<(f64, u64)> = (1..=5).map(|mean| (10.0 * f64::from(mean), 10)).collect();
        let found = Estimate::of(&documents).unwrap();
        let half = 2.776 * (2.5_f64 / 5.0).sqrt();
        assert!((found.mean - 3.0).abs() < 1e-12);
        assert!((found.low.unwrap() - (3.0 - half)).abs() < 0.01, "{found:?}");
        assert!((found.high.unwrap() - (3.0 + half)).abs() < 0.01, "{found:?}");
        assert_eq!(found.standing(), Standing::Better);
    }

    #[test]
    fn a_long_document_weighs_as_much_as_it_holds_and_an_empty_one_nothing() {
        let documents = [(2.0, 2), (0.0, 0), (30.0, 10), (4.0, 4), (8.0, 4)];
        assert_eq!(Estimate::of(&documents), Some(Estimate { mean: 2.2, low: None, high: None }));
        assert_eq!(Estimate::of(&[(0.0, 0)]), None);
    }

    #[test]
    fn an_interval_that_holds_0_decides_nothing() {
        let standing = |shift: f64| {
            let documents: Vec<(f64, u64)> =
                (0..20).map(|number| (shift + f64::from(number % 3) - 1.0, 1)).collect();
            Estimate::of(&documents).unwrap().standing()
        };
        assert_eq!([0.0, 1.0, -1.0].map(standing), [Standing::Unclear, Standing::Better, Standing::Worse]);
        assert_eq!(Estimate { mean: 9.0, low: None, high: None }.standing(), Standing::Unclear);
    }
}
