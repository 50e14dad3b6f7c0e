//! A micro-batch as numpy arrays.

use numpy::{PyArray1, PyArray2, PyArrayMethods as _, PyUntypedArrayMethods as _};
use pyo3::prelude::*;
use sluice_feed::batch::{Batch as FeedBatch, NO_TARGET, PackedBatch};
use sluice_feed::cut::Piece;

/// What PyTorch's losses take for a position that predicts nothing.
const IGNORE_INDEX: i64 = -100;

/// A micro-batch of packed sequences. The last ones of a partition may have fewer rows than the others.
///
/// Arrays have the shape `[rows, sequence_length]` unless they say otherwise, belong to Python, and may be changed.
#[pyclass(frozen, get_all, module = "sluice_feed")]
pub(crate) struct Batch {
    /// Token ids, int64; padding holds 0.
    input_ids: Py<PyArray2<i64>>,
    /// What each position predicts, int64: the token AFTER it in the same document, so they are shifted already; -100
    /// where nothing is predicted.
    labels: Py<PyArray2<i64>>,
    /// Position of each token in its document's piece, int64, from 0; 0 in padding.
    position_ids: Py<PyArray2<i64>>,
    /// Which piece of its row a token belongs to, int64, from 1; 0 is padding. A token may look at earlier tokens of its
    /// own segment alone.
    segment_ids: Py<PyArray2<i64>>,
    /// Where segments begin in the row-major order of all tokens, and the end of the last: int32, `[segments + 1]`. Padding
    /// at a row's end is a segment too. For the varlen functions of FlashAttention.
    cu_seqlens: Py<PyArray1<i32>>,
    /// Tokens of the longest segment.
    max_seqlen: usize,
    /// Reference loss in nats of each label, float32; NaN where there is none.
    reference_loss: Py<PyArray2<f32>>,
    /// Entropy in nats of the reference's prediction of each label, float32; NaN where there is none.
    reference_entropy: Py<PyArray2<f32>>,
    /// What a token classifier says of each label, such as the probability of a class, float32; NaN where there is none.
    attribute: Py<PyArray2<f32>>,
    /// For each row the ids of the documents in it, in order: `document_ids[row][segment - 1]`, unless tokens attend across
    /// documents.
    document_ids: Vec<Vec<String>>,
    /// For each row the sources of its documents, in the same order.
    sources: Vec<Vec<String>>,
    /// For each row where in its document each piece begins: the index of its first token.
    document_starts: Vec<Vec<usize>>,
    /// The step it belongs to, from 1.
    step: u64,
    /// Which of its step's micro-batches it is, from 0, over all ranks; None for one of padding alone, which a rank is given
    /// at the end of the data so that all ranks have as many.
    number: Option<usize>,
    /// The partition that it was read from.
    lane: usize,
    /// SHA-256 in hexadecimal digits of all that training sees of it, where digests were asked for: equal to the Rust
    /// trainer's for the same topic, plan and seed.
    digest: Option<String>,
}

#[pymethods]
impl Batch {
    fn __repr__(&self, py: Python<'_>) -> String {
        let number = self.number.map_or_else(|| "None".to_owned(), |number| number.to_string());
        let shape = self.input_ids.bind(py).shape();
        format!("Batch(step={}, number={number}, lane={}, shape={shape:?})", self.step, self.lane)
    }
}

/// The vectors of a batch, as Python will see them, made without the GIL.
pub(crate) struct Columns {
    shape: [usize; 2],
    input_ids: Vec<i64>,
    labels: Vec<i64>,
    position_ids: Vec<i64>,
    segment_ids: Vec<i64>,
    cu_seqlens: Vec<i32>,
    max_seqlen: usize,
    reference_loss: Vec<f32>,
    reference_entropy: Vec<f32>,
    attribute: Vec<f32>,
    digest: Option<String>,
}

impl Columns {
    /// Takes the vectors out of a micro-batch and leaves the pieces that it was made of.
    pub(crate) fn take(packed: &mut PackedBatch, with_digest: bool) -> Self {
        let digest = with_digest.then(|| packed.digest().to_string());
        let batch = std::mem::take(&mut packed.batch);
        let (cu_seqlens, max_seqlen) = boundaries(&batch);
        let FeedBatch {
            rows,
            len,
            tokens,
            segments,
            positions,
            targets,
            reference,
            reference_entropy,
            attribute,
        } = batch;
        let widened = |words: Vec<u32>| words.into_iter().map(i64::from).collect::<Vec<_>>();
        let label = |target| if target == NO_TARGET { IGNORE_INDEX } else { i64::from(target) };
        Self {
            shape: [rows, len],
            input_ids: widened(tokens),
            labels: targets.into_iter().map(label).collect(),
            position_ids: widened(positions),
            segment_ids: widened(segments),
            cu_seqlens,
            max_seqlen,
            reference_loss: reference,
            reference_entropy,
            attribute,
            digest,
        }
    }
}

impl Batch {
    /// Hands the vectors of a micro-batch of `step` to Python, without a copy.
    pub(crate) fn new(py: Python<'_>, step: u64, packed: &PackedBatch, columns: Columns) -> PyResult<Self> {
        fn array<T: numpy::Element>(
            py: Python<'_>,
            values: Vec<T>,
            shape: [usize; 2],
        ) -> PyResult<Py<PyArray2<T>>> {
            Ok(PyArray1::from_vec(py, values).reshape(shape)?.unbind())
        }
        let of_pieces = |of: fn(&Piece) -> String| {
            packed.rows.iter().map(|row| row.iter().map(of).collect()).collect::<Vec<Vec<String>>>()
        };
        let Columns { shape, cu_seqlens, max_seqlen, digest, .. } = columns;
        Ok(Self {
            input_ids: array(py, columns.input_ids, shape)?,
            labels: array(py, columns.labels, shape)?,
            position_ids: array(py, columns.position_ids, shape)?,
            segment_ids: array(py, columns.segment_ids, shape)?,
            cu_seqlens: PyArray1::from_vec(py, cu_seqlens).unbind(),
            max_seqlen,
            reference_loss: array(py, columns.reference_loss, shape)?,
            reference_entropy: array(py, columns.reference_entropy, shape)?,
            attribute: array(py, columns.attribute, shape)?,
            document_ids: of_pieces(|piece| piece.document.id().to_owned()),
            sources: of_pieces(|piece| piece.document.source().to_owned()),
            document_starts: packed
                .rows
                .iter()
                .map(|row| row.iter().map(|piece| piece.start).collect())
                .collect(),
            step,
            number: packed.number,
            lane: packed.lane,
            digest,
        })
    }
}

/// Where segments begin, in the row-major order of tokens, with the end of the last; and the longest of them.
fn boundaries(batch: &FeedBatch) -> (Vec<i32>, usize) {
    let begins =
        |index: usize| index.is_multiple_of(batch.len) || batch.segments[index] != batch.segments[index - 1];
    let mut starts: Vec<i32> =
        (0..batch.segments.len()).filter(|&index| begins(index)).map(|index| index as i32).collect();
    starts.push(batch.segments.len() as i32);
    let longest = starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    (starts, longest as usize)
}
