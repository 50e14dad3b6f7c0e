//! Attention on the CPU: blocks of queries of one segment against that segment alone.

use std::ops::Range;

use burn::tensor::{FloatDType, Tensor};

use super::shape::{Attended, AttentionShape, PADDING, Projected};
use crate::model::host::{from_host, to_host};
use crate::model::kernels::attention as kernels;
use crate::model::parallel;
use crate::model::rows::Rows;

/// Queries in a block: few, so that little of what lies behind them is computed and masked; products of as many rows are
/// still at their speed.
const QUERIES: usize = 64;

/// Some queries of one segment, and what they look at.
struct Block {
    /// Rows of the queries' matrix.
    queries: Range<usize>,
    /// Rows of keys and values, from the beginning of the segment to the last of the queries.
    keys: Range<usize>,
    /// Row of the segment's first query in the queries' matrix.
    first_query: usize,
}

/// Blocks of the queries that stand at these rows of a group, ascending.
fn blocks(positions: &[u32], starts: &[u32]) -> Vec<Block> {
    let mut blocks = Vec::new();
    let segments = (0..positions.len()).collect::<Vec<_>>();
    let start_of = |query: usize| starts[positions[query] as usize];
    for segment in segments.chunk_by(|&a, &b| start_of(a) == start_of(b)) {
        let first_query = segment[0];
        if start_of(first_query) == PADDING {
            continue;
        }
        for queries in segment.chunks(QUERIES) {
            let (first, last) = (queries[0], queries[queries.len() - 1]);
            blocks.push(Block {
                queries: first..last + 1,
                keys: start_of(first) as usize..positions[last] as usize + 1,
                first_query,
            });
        }
    }
    blocks
}

impl Block {
    /// The keys that each query may look at, from the block's first.
    fn visible(&self, positions: &[u32]) -> Vec<Range<usize>> {
        let ends = positions[self.queries.clone()].iter().map(|&position| position as usize + 1);
        ends.map(|end| 0..end - self.keys.start).collect()
    }

    /// The keys at which queries stand, from the block's first.
    fn columns(&self, positions: &[u32]) -> Vec<u32> {
        let seen = &positions[self.first_query..self.queries.end];
        seen.iter().map(|position| position - self.keys.start as u32).collect()
    }
}

/// Values by query and head, `[queries, heads]`, as the rows of a block's scores have them, `[heads, queries]`.
fn by_head(values: &[f32], queries: &Range<usize>, heads: usize) -> Vec<f32> {
    let at = |head: usize| queries.clone().map(move |query| values[query * heads + head]);
    (0..heads).flat_map(at).collect()
}

/// Sums over what each query looks at, `[queries, heads]`.
pub(super) struct Sums {
    /// Logarithm of the sum of the scores' exponentials.
    pub log_sums: Vec<f32>,
    /// Sum of `d_p * p`.
    pub along: Vec<f32>,
}

impl AttentionShape {
    /// Some rows of `[.., heads * head_dim]` as a matrix for each key head, `[kv_heads, heads / kv_heads * rows, head_dim]`: query
    /// heads that share a key head are stacked, so that neither keys nor values are ever repeated.
    fn heads_of(self, x: &Tensor<2>, rows: &Range<usize>) -> Tensor<3> {
        let Self { kv_heads, head_dim, .. } = self;
        let stacked = x.dims()[1] / head_dim / kv_heads;
        let x = x.clone().narrow(0, rows.start, rows.len());
        if stacked == 1 {
            // Products read it where it is.
            return x.reshape([rows.len(), kv_heads, head_dim]).swap_dims(0, 1);
        }
        let x = x.reshape([rows.len(), kv_heads, stacked, head_dim]).permute([1, 2, 0, 3]);
        x.reshape([kv_heads, stacked * rows.len(), head_dim])
    }
}

/// Attention of the queries at `positions`; rows of padding are zero.
pub(super) fn attend(
    shape: AttentionShape,
    projected: &Projected,
    starts: &[u32],
    positions: &[u32],
) -> Attended {
    let AttentionShape { heads, head_dim, .. } = shape;
    let Projected { query, key, value } = projected;
    let ([count, width], dtype, device) = (query.dims(), query.dtype(), query.device());
    let mut output = vec![0.0; count * width];
    let mut log_sums = vec![0.0; count * heads];
    let run = |block: Block| {
        let Block { queries, keys, .. } = &block;
        let scores = shape.heads_of(query, queries).matmul(shape.heads_of(key, keys).transpose());
        let of_scores = scores.dims();
        let mut scores = to_host(scores.cast(FloatDType::F32));
        let sums = kernels::visible_exponentials(&mut scores, keys.len(), &block.visible(positions));
        let exponentials = from_host(scores, of_scores, &device).cast(dtype);
        let mixed = to_host(exponentials.matmul(shape.heads_of(value, keys)).cast(FloatDType::F32));
        (block.queries, sums, mixed)
    };
    parallel::in_waves(blocks(positions, starts), run, |(queries, sums, mixed)| {
        // Divided by the sums here, where there are fewer values.
        let factors: Vec<f32> = sums.iter().map(|(_, sum)| 1.0 / sum).collect();
        let rows = &mut output[queries.start * width..queries.end * width];
        kernels::place_heads(&mixed, &factors, heads, head_dim, rows);
        for (index, (max, sum)) in sums.into_iter().enumerate() {
            let (head, query) = (index / queries.len(), index % queries.len());
            log_sums[(queries.start + query) * heads + head] = max + sum.ln();
        }
    });
    Attended { output: from_host(output, [count, width], &device).cast(dtype), log_sums }
}

/// Gradients of [`attend`] with respect to queries, keys and values.
pub(super) fn backward(
    shape: AttentionShape,
    d_output: &Tensor<2>,
    projected: &Projected,
    sums: &Sums,
    starts: &[u32],
    (queries, keys): (&Rows, &Rows),
) -> [Tensor<2>; 3] {
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let (dtype, device) = (d_output.dtype(), d_output.device());
    let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let positions = queries.positions();
    let mut d_query = vec![0.0; queries.len() * width];
    let mut d_key = vec![0.0; keys.len() * kv_width];
    let mut d_value = d_key.clone();
    let run = |block: Block| {
        let first = if keys.are_all() { block.keys.start } else { block.first_query };
        let columns = (!keys.are_all()).then(|| block.columns(&positions));
        let gradients = block_backward(shape, d_output, projected, sums, (&block, &positions, columns));
        (block.queries, first, gradients.map(|gradient| to_host(gradient.cast(FloatDType::F32))))
    };
    parallel::in_waves(blocks(&positions, starts), run, |(own, first, [query, key, value])| {
        let rows = &mut d_query[own.start * width..own.end * width];
        kernels::place_heads(&query, &vec![1.0; heads * own.len()], heads, head_dim, rows);
        for (gradient, into) in [(key, &mut d_key), (value, &mut d_value)] {
            let rows = &mut into[first * kv_width..][..gradient.len()];
            kernels::add_heads(&gradient, kv_heads, head_dim, rows);
        }
    });
    let tensor = |values: Vec<f32>, width| {
        let rows = values.len() / width;
        from_host(values, [rows, width], &device).cast(dtype)
    };
    [tensor(d_query, width), tensor(d_key, kv_width), tensor(d_value, kv_width)]
}

/// What a block adds to the gradients of its queries, and to those of its keys and values, of all or of some `columns`: a matrix
/// for each key head.
fn block_backward(
    shape: AttentionShape,
    d_output: &Tensor<2>,
    projected: &Projected,
    sums: &Sums,
    (block, positions, columns): (&Block, &[u32], Option<Vec<u32>>),
) -> [Tensor<3>; 3] {
    let (heads, dtype, device) = (shape.heads, d_output.dtype(), d_output.device());
    let Block { queries, keys, .. } = block;
    let query = shape.heads_of(&projected.query, queries);
    let key = shape.heads_of(&projected.key, keys);
    let d_output = shape.heads_of(d_output, queries);

    let scores = query.clone().matmul(key.clone().transpose());
    let of_scores = scores.dims();
    let mut probabilities = to_host(scores.cast(FloatDType::F32));
    let log_sums = by_head(&sums.log_sums, queries, heads);
    kernels::visible_probabilities(&mut probabilities, keys.len(), &block.visible(positions), &log_sums);

    let d_probabilities = d_output.clone().matmul(shape.heads_of(&projected.value, keys).transpose());
    let mut d_scores = to_host(d_probabilities.cast(FloatDType::F32));
    kernels::softmax_backward(
        &mut d_scores,
        &probabilities,
        &by_head(&sums.along, queries, heads),
        keys.len(),
    );

    let tensor = |values: Vec<f32>| {
        let columns = values.len() / (of_scores[0] * of_scores[1]);
        from_host(values, [of_scores[0], of_scores[1], columns], &device).cast(dtype)
    };
    let (probabilities, some_d_scores, d_scores) = match columns {
        Some(columns) if columns.len() < keys.len() => {
            let some = |values: &[f32]| tensor(kernels::some_columns(values, keys.len(), &columns));
            (some(&probabilities), some(&d_scores), tensor(d_scores))
        }
        _ => {
            let d_scores = tensor(d_scores);
            (tensor(probabilities), d_scores.clone(), d_scores)
        }
    };
    let d_value = probabilities.transpose().matmul(d_output);
    let d_key = some_d_scores.transpose().matmul(query);
    [d_scores.matmul(key), d_key, d_value]
}
