//! What one training step sees: packed sequences with their reference losses, free of any framework type.

use sha2::{Digest, Sha256};
use sluice_schemas::fingerprint::Fingerprint;

use crate::cut::Piece;

/// A micro-batch of packed sequences, row-major: every vector has `rows * len` entries.
///
/// Position `i` of a row holds a token and the *prediction made after reading it*: `targets[i]` is the token
/// that follows in the same document, and `reference[i]` is the reference loss of that target.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Number of sequences.
    pub rows: usize,
    /// Tokens in each sequence, padding included.
    pub len: usize,
    /// Token ids; padding holds 0.
    pub tokens: Vec<u32>,
    /// What a token belongs to within its row, counted from 1: a piece of a document, or the whole row where tokens
    /// attend across documents; 0 is padding. A token attends only to earlier tokens of its own segment.
    pub segments: Vec<u32>,
    /// Position of the token within its segment, from 0 (the rotary position).
    pub positions: Vec<u32>,
    /// The next token of the same document, or of the next one where first tokens are predicted; [`NO_TARGET`] where
    /// nothing is predicted: at the end of a piece, in its context, and in padding.
    pub targets: Vec<u32>,
    /// Reference loss of `targets[i]` in nats; NaN where there is no target or no reference.
    pub reference: Vec<f32>,
    /// Entropy in nats of the reference's prediction of `targets[i]`; NaN where there is none.
    pub reference_entropy: Vec<f32>,
    /// What a token classifier says of `targets[i]`; NaN where there is none.
    pub attribute: Vec<f32>,
}

/// Marks a position that predicts nothing.
pub const NO_TARGET: u32 = u32::MAX;

impl Batch {
    /// Number of positions that predict something.
    pub fn predictions(&self) -> usize {
        self.targets.iter().filter(|&&target| target != NO_TARGET).count()
    }
}

/// A micro-batch and what it was made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PackedBatch {
    /// The packed sequences.
    pub batch: Batch,
    /// For each row its pieces, a segment each, in order.
    pub rows: Vec<Vec<Piece>>,
    /// The lane that it was read from.
    pub lane: usize,
    /// Which of its step's micro-batches it is, from 0, over all ranks. `None` for one without tokens, which a rank is
    /// given at the end of the data, so that all ranks have as many.
    pub number: Option<usize>,
}

impl PackedBatch {
    /// Digest of all that training sees of it, and of where it came from: lane, ids, places in their documents, tokens,
    /// targets, positions, segments, and what the reference says, to the last bit.
    pub fn digest(&self) -> Fingerprint {
        let mut digest = Sha256::new();
        digest.update((self.lane as u64).to_le_bytes());
        for (row, pieces) in (0u64..).zip(&self.rows) {
            for piece in pieces {
                let id = piece.document.id();
                for number in [row, piece.start as u64, piece.len() as u64, id.len() as u64] {
                    digest.update(number.to_le_bytes());
                }
                digest.update(id);
            }
        }
        let Batch { tokens, segments, positions, targets, reference, reference_entropy, attribute, .. } =
            &self.batch;
        let mut bytes = Vec::with_capacity(tokens.len() * 4);
        let mut update = |words: &mut dyn Iterator<Item = u32>| {
            bytes.clear();
            words.for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
            digest.update(&bytes);
        };
        for words in [tokens, segments, positions, targets] {
            update(&mut words.iter().copied());
        }
        // Of a topic without attributes the digest is as it was before there were any.
        let has_attribute = attribute.iter().any(|value| !value.is_nan());
        for values in [reference, reference_entropy].into_iter().chain(has_attribute.then_some(attribute)) {
            // One NaN, whatever its bits: it says that there is no value.
            update(&mut values.iter().map(|value| if value.is_nan() { f32::NAN } else { *value }.to_bits()));
        }
        Fingerprint::from(<[u8; Fingerprint::LEN]>::from(digest.finalize()))
    }
}

/// Digest of the micro-batches of a step, which are given in the order of their numbers: equal for runs, on any number
/// of ranks, that learn from the same.
pub fn digest_of_step(digests: &[Fingerprint]) -> Fingerprint {
    let bytes: Vec<u8> = digests.iter().flat_map(|digest| *digest.as_bytes()).collect();
    Fingerprint::of_bytes(&bytes)
}
