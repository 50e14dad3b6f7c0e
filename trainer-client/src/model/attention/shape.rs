//! What attention is of: its shape, what tokens may look at, what goes in and what comes out.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::model::device::is_cpu;

/// Columns in a block elsewhere than on the CPU.
pub(super) const COLUMNS: usize = if cfg!(test) { 7 } else { 256 };
/// Start of a padding's segment, which nobody looks at.
pub(super) const PADDING: u32 = u32::MAX;

/// Shape of a group's attention.
#[derive(Clone, Copy)]
pub(in crate::model) struct AttentionShape {
    pub rows: usize,
    pub len: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// What queries are multiplied with.
    pub scale: f32,
    /// Added to the mean square in the norms of queries and keys, where the model has them.
    pub eps: f64,
}

/// What each token of a group may look at: itself, and what stands before it in its segment. There is one of a group.
#[allow(clippy::large_enum_variant)]
pub(in crate::model) enum Visible {
    /// On the CPU: the row of the group's matrices where its segment begins for each token, `[rows * len]`; [`PADDING`] in
    /// padding.
    Segments(Vec<u32>),
    /// Elsewhere.
    Columns {
        /// The column where its segment begins for each token, `[rows, len]`.
        starts: Tensor<2, Int>,
        /// The first column that any token of each block of columns may look at.
        firsts: Vec<usize>,
    },
}

impl Visible {
    /// From the segments of a group's tokens, `[rows * len]`, 0 in padding.
    pub fn of(segments: &[u32], len: usize, device: &Device) -> Self {
        let mut start = 0;
        let starts = segments.iter().enumerate().map(|(index, &segment)| {
            if index.is_multiple_of(len) || segment != segments[index - 1] {
                start = index as u32;
            }
            (start, segment)
        });
        if is_cpu(device) {
            let starts = starts.map(|(start, segment)| if segment == 0 { PADDING } else { start });
            return Self::Segments(starts.collect());
        }
        let starts: Vec<i64> = starts.map(|(start, _)| i64::from(start) % len as i64).collect();
        let first =
            |column: usize| starts.iter().skip(column).step_by(len).min().map_or(0, |&it| it as usize);
        Self::Columns {
            // Starts do not fall along a row, so a block's first column has the first of them.
            firsts: (0..len).step_by(COLUMNS).map(first).collect(),
            starts: Tensor::from_data(TensorData::new(starts, [segments.len() / len, len]), device),
        }
    }
}

/// What comes of attention.
pub(in crate::model) struct Attended {
    /// Heads' outputs, `[queries, heads * head_dim]`.
    pub output: Tensor<2>,
    /// Logarithm of each head's sum of exponentials, `[queries, heads]`, from which the CPU makes the probabilities again;
    /// elsewhere empty.
    pub log_sums: Vec<f32>,
}

/// What the gradient of attention needs. Keys and values are those of all tokens.
pub(in crate::model) struct Projected {
    /// Rotated and scaled queries, `[queries, heads * head_dim]`.
    pub query: Tensor<2>,
    /// Rotated keys, `[n, kv_heads * head_dim]`.
    pub key: Tensor<2>,
    /// Values, `[n, kv_heads * head_dim]`.
    pub value: Tensor<2>,
}
