//! What one training step sees: packed sequences with their reference losses, free of any framework type.

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
    /// The next token of the same document, or of the next one where first tokens are predicted; [`NO_TARGET`] at the
    /// end and in padding.
    pub targets: Vec<u32>,
    /// Reference loss of `targets[i]` in nats; NaN where there is no target or no reference.
    pub reference: Vec<f32>,
    /// Entropy in nats of the reference's prediction of `targets[i]`; NaN where there is none.
    pub reference_entropy: Vec<f32>,
}

/// Marks a position that predicts nothing.
pub const NO_TARGET: u32 = u32::MAX;

impl Batch {
    /// Number of positions that predict something.
    pub fn predictions(&self) -> usize {
        self.targets.iter().filter(|&&target| target != NO_TARGET).count()
    }
}
