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

/// Whether a token classifier sees what follows a token. One that does not computes the same bits of the tokens before a change.
pub fn sees_both_sides(
    scorer: &mut dyn Score,
    vocabulary: u32,
    class: u32,
    ladder: Ladder,
) -> anyhow::Result<bool> {
    // Of a model that reads one token at a time either is true.
    let Some(short) = short_length(&ladder.lengths()).filter(|&short| short > 1) else { return Ok(true) };
    let row = |seed: usize| row(short, seed, vocabulary, Some(class));
    let alone = Batch::new(vec![row(0)], ladder);
    let seen = short / 2;
    let later = with_another_end(&alone, seen, &row(1));
    let (one, other) = (scorer.score(&alone)?.losses, scorer.score(&later)?.losses);
    Ok(one.iter().zip(&other).take(seen).any(|(one, other)| one.to_bits() != other.to_bits()))
}

/// Length of the row that is looked at.
fn short_length(lengths: &[usize]) -> Option<usize> {
    let enough = TOKENS_MIN.min(lengths.last().copied().unwrap_or(0));
    lengths.iter().copied().find(|&len| len >= enough)
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
