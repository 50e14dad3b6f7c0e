//! What losses rest on, tried on each model before the daemon is ready: a token's loss depends on what stands before it
//! and on nothing else. A model that sees more has losses that look good, and nobody would know.

use anyhow::bail;
use sluice_schemas::record::Precision;

use super::Score;
use crate::batch::{Batch, Ladder, Window};

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
    ladder: Ladder,
    tokens_max: usize,
) -> anyhow::Result<()> {
    let lengths = ladder.lengths();
    let enough = TOKENS_MIN.min(lengths.last().copied().unwrap_or(0));
    let Some(&short) = lengths.iter().find(|&&len| len >= enough) else { return Ok(()) };
    let row = |len: usize, seed: usize| Window {
        document: 0,
        // Of the lower half of the vocabulary: special tokens stand at its end.
        tokens: (0..len)
            .map(|at| ((at * 7 + seed * 13 + 3) % (vocabulary as usize / 2).max(1)) as u32)
            .collect(),
        span: 0..len,
        bos: None,
        first_scored: 1,
    };
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

    let mut later = alone.clone();
    let seen = short / 2;
    for (slot, id) in later.tokens[seen..].iter_mut().zip(row(short, 1).ids()) {
        *slot = i64::from(id);
    }
    if let Some(nats) = change(scorer, &later, seen)? {
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
