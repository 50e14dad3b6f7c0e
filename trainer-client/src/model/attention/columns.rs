//! Attention on a device that wants few and large products: blocks of columns of all rows of a group, against the columns from
//! the first that any of their tokens may look at. Masks are made on the device, from where each token's segment begins, and live
//! as long as their block; so do scores, which the backward pass makes again.
//!
//! Not Burn's own attention, which has a flash kernel for CUDA: on tensor cores that takes f16 alone, and in bf16 and f32
//! Burn falls back to whole scores with a softmax in that precision (ADR 42).

use std::ops::Range;

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, DType, FloatDType, Int, Tensor};

use super::shape::{AttentionShape, COLUMNS, Projected};

/// Some columns of every row of the group, and what they look at.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
    /// True where a token (third dimension) must not look at another (fourth), `[rows, 1, queries, keys]`.
    hidden: Tensor<4, Bool>,
}

/// A group's blocks, one at a time, since their masks are as large as a head's scores.
fn blocks<'a>(
    shape: AttentionShape,
    starts: &'a Tensor<2, Int>,
    firsts: &'a [usize],
) -> impl Iterator<Item = Block> + 'a {
    let AttentionShape { rows, len, .. } = shape;
    let device = starts.device();
    (0..len).step_by(COLUMNS).zip(firsts).map(move |(column, &first)| {
        let queries = column..len.min(column + COLUMNS);
        let keys = first..queries.end;
        let numbers =
            |range: &Range<usize>| Tensor::<1, Int>::arange(range.start as i64..range.end as i64, &device);
        let (count, of) = (queries.len(), [rows, 1, queries.len(), keys.len()]);
        let key = numbers(&keys).reshape([1, 1, 1, keys.len()]).expand(of);
        let query = numbers(&queries).reshape([1, 1, count, 1]).expand(of);
        let start = starts.clone().narrow(1, column, count).reshape([rows, 1, count, 1]).expand(of);
        Block { hidden: key.clone().lower(start).bool_or(key.greater(query)), queries, keys }
    })
}

impl AttentionShape {
    /// `[rows * len, heads * head_dim]` to `[rows, heads, len, head_dim]`.
    fn by_head(self, x: Tensor<2>) -> Tensor<4> {
        let heads = x.dims()[1] / self.head_dim;
        x.reshape([self.rows, self.len, heads, self.head_dim]).swap_dims(1, 2)
    }

    /// The inverse of [`AttentionShape::by_head`].
    fn merge(self, x: Tensor<4>) -> Tensor<2> {
        let heads = x.dims()[1];
        x.swap_dims(1, 2).reshape([self.rows * self.len, heads * self.head_dim])
    }

    /// Some columns of `[rows, heads, len, width]` as `[rows, kv_heads, heads / kv_heads * columns, width]`: query heads that share
    /// a key head are stacked, so that neither keys nor values are ever repeated.
    fn stack(self, x: &Tensor<4>, columns: &Range<usize>) -> Tensor<4> {
        let [rows, heads, _, width] = x.dims();
        let x = x.clone().narrow(2, columns.start, columns.len());
        x.reshape([rows, self.kv_heads, heads / self.kv_heads * columns.len(), width])
    }

    /// The inverse of [`AttentionShape::stack`].
    fn unstack(self, x: Tensor<4>) -> Tensor<4> {
        let [rows, _, stacked, width] = x.dims();
        x.reshape([rows, self.heads, stacked * self.kv_heads / self.heads, width])
    }

    /// A block's softmax, in f32 whatever the scores are, `[rows, kv_heads, heads / kv_heads * queries, keys]`.
    fn probabilities(self, query: Tensor<4>, key: Tensor<4>, block: &Block) -> Tensor<4> {
        let scores = query.matmul(key.transpose());
        let (stacked, dtype) = (scores.dims(), scores.dtype());
        let by_head = [self.rows, self.heads, block.queries.len(), block.keys.len()];
        let scores = scores.cast(FloatDType::F32).reshape(by_head);
        softmax(scores.mask_fill(block.hidden.clone(), f32::NEG_INFINITY), 3).reshape(stacked).cast(dtype)
    }
}

/// Attention of every query of the group, `[rows * len, heads * head_dim]`.
pub(super) fn attend(
    shape: AttentionShape,
    query: Tensor<2>,
    projected: &Projected,
    starts: &Tensor<2, Int>,
    firsts: &[usize],
) -> Tensor<2> {
    let query = shape.by_head(query);
    let (key, value) = (shape.by_head(projected.key.clone()), shape.by_head(projected.value.clone()));
    let outputs = blocks(shape, starts, firsts).map(|block| {
        let (query, key) = (shape.stack(&query, &block.queries), shape.stack(&key, &block.keys));
        let probabilities = shape.probabilities(query, key, &block);
        shape.unstack(probabilities.matmul(shape.stack(&value, &block.keys)))
    });
    shape.merge(Tensor::cat(outputs.collect(), 2))
}

/// Gradients of [`attend`] with respect to queries, keys and values. `along` is each head's sum of `d_p * p`,
/// `[rows * len, heads]`.
pub(super) fn backward(
    shape: AttentionShape,
    d_output: Tensor<2>,
    projected: Projected,
    along: Tensor<2>,
    starts: &Tensor<2, Int>,
    firsts: &[usize],
) -> [Tensor<2>; 3] {
    let dtype = d_output.dtype();
    let Projected { query, key, value } = projected;
    let (query, key, value) = (shape.by_head(query), shape.by_head(key), shape.by_head(value));
    let d_output = shape.by_head(d_output);
    let along = along.reshape([shape.rows, shape.len, shape.heads, 1]).swap_dims(1, 2);
    // Sums over blocks are f32, whatever the products were.
    let zeros = || Tensor::<4>::zeros(key.dims(), (&key.device(), DType::F32));
    let (mut d_queries, mut d_key, mut d_value) = (Vec::with_capacity(firsts.len()), zeros(), zeros());
    for block in blocks(shape, starts, firsts) {
        let Block { queries, keys, .. } = &block;
        let (query, key) = (shape.stack(&query, queries), shape.stack(&key, keys));
        let d_output = shape.stack(&d_output, queries);
        let probabilities = shape.probabilities(query.clone(), key.clone(), &block);
        let d_probabilities = d_output.clone().matmul(shape.stack(&value, keys).transpose());
        let d_scores = (d_probabilities.cast(FloatDType::F32) - shape.stack(&along, queries))
            * probabilities.clone().cast(FloatDType::F32);
        let d_scores = d_scores.cast(dtype);
        add(&mut d_value, keys, probabilities.transpose().matmul(d_output));
        add(&mut d_key, keys, d_scores.clone().transpose().matmul(query));
        d_queries.push(shape.unstack(d_scores.matmul(key)));
    }
    let d_query = Tensor::cat(d_queries, 2);
    [shape.merge(d_query), shape.merge(d_key.cast(dtype)), shape.merge(d_value.cast(dtype))]
}

/// Adds to some columns of `[rows, heads, len, width]`.
fn add(into: &mut Tensor<4>, columns: &Range<usize>, x: Tensor<4>) {
    let [rows, heads, _, width] = into.dims();
    let sum = into.clone().narrow(2, columns.start, columns.len()) + x.cast(FloatDType::F32);
    *into = into.clone().slice_assign([0..rows, 0..heads, columns.clone(), 0..width], sum);
}
