//! What losses rest on, tried on each model before the daemon is ready: a token's loss depends on what stands before it
//! and on nothing else. A model that sees more has losses that look good, and nobody would know. A token classifier may see
//! what follows a token; it too must see neither its padding nor what shares its batch.

use anyhow::bail;
use sluice_schemas::record::Precision;

use super::Score;
use crate::batch::{Batch, Ladder, TokenClass, Window};

/// Tokens of the row that is looked at, where windows are that long.
const TOKENS_MIN: usize = 8;
/// Most by which a loss may change for the arithmetic's sake, which depends on the shape of a batch: nats, for losses of
/// about ten. What a model sees that it should not changes losses by far more.
const NATS_F32: f32 = 0.02;
const NATS_16_BITS: f32 = 0.25;
/// Pairs of rows by which a token classifier is tried.
const TRIALS: u32 = 8;
/// By how much more than this, in nats and as a share of it, a loss differs that is not the same: rounding is less.
const SAME_NATS: f32 = 1e-6;
const SAME_SHARE: f32 = 1e-5;

/// Refuses a model whose loss of a token changes with what follows that token, with what shares its batch, or with its
/// padding.
pub fn self_test(
    scorer: &mut dyn Score,
    (vocabulary, precision): (u32, Precision),
    class: Option<&TokenClass>,
    ladder: Ladder,
    tokens_max: usize,
) -> anyhow::Result<()> {
    let lengths = ladder.lengths();
    let Some(short) = short_length(&lengths) else { return Ok(()) };
    let row = |len: usize, seed: usize| row(len, seed, vocabulary, class.map(|class| class.index));
    let alone = Batch::new(vec![row(short, 0)], ladder);
    let expected = scorer.score(&alone)?.losses;
    let most = match precision {
        Precision::F16 | Precision::Bf16 => NATS_16_BITS,
        // Weights of fewer bits are multiplied in float32.
        Precision::F32 | Precision::Int8 | Precision::Int4 => NATS_F32,
    };
    let change = |scorer: &mut dyn Score, batch: &Batch, losses: usize| -> anyhow::Result<Option<f32>> {
        let scores = scorer.score(batch)?;
        let pairs = scores.losses.iter().zip(&expected).take(losses);
        let largest = pairs.map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
        Ok((largest > most).then_some(largest))
    };

    let seen = short / 2;
    if class.is_none()
        && let Some(nats) = change(scorer, &with_another_end(&alone, seen, &row(short, 1)), seen)?
    {
        bail!(
            "the model sees what follows a token: losses of the first {seen} tokens of a row change by {nats} nats when only \
             the tokens after them do; it was exported without its causal mask, or reads its input shifted"
        );
    }
    let company = Batch::new(vec![row(short, 0), row(short, 2)], ladder);
    if let Some(nats) = change(scorer, &company, expected.len())? {
        bail!(
            "the model mixes the rows of a batch: losses of a row change by {nats} nats with what shares its batch; it was \
             exported for one row, or is quantized over whole batches"
        );
    }
    // The longest that it can share a batch with: a graph may change what it computes at any length.
    let may_share = |long: usize| 2 * long <= tokens_max && ladder.allows_together(short, long);
    if let Some(long) = lengths.into_iter().rev().find(|&long| long > short && may_share(long)) {
        let padded = Batch::new(vec![row(short, 0), row(long, 2)], ladder);
        if let Some(nats) = change(scorer, &padded, expected.len())? {
            bail!(
                "the model sees its padding: losses of a row of {short} tokens change by {nats} nats when it is padded to \
                 {long}; it was exported for one length, or without its attention mask, or computes long batches in another way"
            );
        }
    }
    Ok(())
}

/// Whether a token classifier sees what follows a token: with other tokens after them, the losses of some class change at those
/// before. Every class is asked for (`class_targets` of them, see [`super::kind::ModelKind::class_targets`]) and several rows are
/// tried, for a class that is certain has the same loss whatever it sees.
pub fn sees_both_sides(
    scorer: &mut dyn Score,
    vocabulary: u32,
    class_targets: u32,
    ladder: Ladder,
) -> anyhow::Result<bool> {
    // Of a model that reads one token at a time either is true.
    let Some(short) = short_length(&ladder.lengths()).filter(|&short| short > 1) else { return Ok(true) };
    let seen = short / 2;
    for trial in 0..TRIALS {
        let window = |number: u32| spread_window(short, number, vocabulary);
        let mut alone = Batch::new(vec![window(2 * trial)], ladder);
        let asked =
            (0..seen as i64).flat_map(|at| (0..i64::from(class_targets)).map(move |class| (at, class)));
        (alone.target_rows, alone.targets) = asked.unzip();
        let later = with_another_end(&alone, seen, &window(2 * trial + 1));
        let (one, other) = (scorer.score(&alone)?.losses, scorer.score(&later)?.losses);
        let differs = |(one, other): (&f32, &f32)| (one - other).abs() > SAME_NATS + SAME_SHARE * one.abs();
        if one.iter().zip(&other).any(differs) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Length of the row that is looked at.
fn short_length(lengths: &[usize]) -> Option<usize> {
    let enough = TOKENS_MIN.min(lengths.last().copied().unwrap_or(0));
    lengths.iter().copied().find(|&len| len >= enough)
}

/// A row of ids from all over the vocabulary, others for each number: a model's classes may say the same of tokens that were never
/// used in training, and special tokens stand at either end.
fn spread_window(len: usize, number: u32, vocabulary: u32) -> Window {
    // Knuth's multiplicative hashing (The Art of Computer Programming, volume 3, section 6.4): multiples of the golden ratio.
    let id = |at: u32| {
        let hash = (number * len as u32 + at + 1).wrapping_mul(0x9e37_79b9);
        ((u64::from(hash) * u64::from(vocabulary)) >> 32) as u32
    };
    Window::whole(0, (0..len as u32).map(id).collect(), Some(0))
}

fn row(len: usize, seed: usize, vocabulary: u32, class: Option<u32>) -> Window {
    // Of the lower half of the vocabulary: special tokens stand at its end.
    let id = |at: usize| ((at * 7 + seed * 13 + 3) % (vocabulary as usize / 2).max(1)) as u32;
    Window::whole(0, (0..len).map(id).collect(), class)
}

/// A batch of one row, in which other tokens stand from `from` on, and the same is asked for.
fn with_another_end(batch: &Batch, from: usize, other: &Window) -> Batch {
    let mut later = batch.clone();
    for (slot, id) in later.tokens[from..].iter_mut().zip(other.ids()) {
        *slot = i64::from(id);
    }
    later
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::*;
    use crate::score::Scores;

    /// A classifier of two classes, of which the first is certain of every token, and what the second says depends on all ids
    /// of the row, by the weight that a position gives another.
    struct Saturated<F>(F);

    impl<F: Fn(usize, usize) -> f32 + Send> Score for Saturated<F> {
        fn score(&mut self, batch: &Batch) -> anyhow::Result<Scores> {
            let loss = |(&row, &class): (&i64, &i64)| {
                let (row, weight) = (row as usize, &self.0);
                let (start, at) = (row - row % batch.padded_len, row % batch.padded_len);
                let seen =
                    (0..batch.padded_len).map(|other| weight(at, other) * batch.tokens[start + other] as f32);
                if class == 0 { 0.0 } else { 20.0 + seen.sum::<f32>() }
            };
            let losses = batch.target_rows.iter().zip(&batch.targets).map(loss).collect();
            Ok(Scores { losses, entropies: vec![] })
        }
    }

    #[test]
    fn a_class_that_is_certain_hides_no_side() {
        let sees = |weight: fn(usize, usize) -> f32, class_targets: u32| {
            sees_both_sides(&mut Saturated(weight), 512, class_targets, Ladder::new(64, 16)).unwrap()
        };
        assert!(sees(|_, _| 0.01, 2), "all tokens of the row");
        assert!(!sees(|at, other| if other <= at { 0.01 } else { 0.0 }, 2), "those before it");
        assert!(!sees(|at, other| if other <= at { 0.01 } else { 1e-9 }, 2), "and noise of those behind");
        assert!(!sees(|_, _| 0.01, 1), "of the certain class alone nothing shows");
    }

    #[test]
    fn rows_to_try_have_ids_of_the_whole_vocabulary() {
        for vocabulary in [1, 2, 512, 128_256] {
            let ids: Vec<u32> = (0..2 * TRIALS)
                .flat_map(|number| spread_window(8, number, vocabulary).ids().collect::<Vec<_>>())
                .collect();
            assert!(ids.iter().all(|&id| id < vocabulary));
            let quarters = ids.iter().map(|&id| u64::from(id) * 4 / u64::from(vocabulary));
            let tried: std::collections::BTreeSet<u64> = quarters.collect();
            assert_eq!(tried.len() as u32, vocabulary.min(4), "{vocabulary}: {ids:?}");
        }
    }
}
