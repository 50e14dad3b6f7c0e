//! Causal attention within segments, from projected heads to projected heads, in blocks of queries against what they may
//! look at, so that no `[length, length]` matrix exists; and its gradient, block by block, from scores that are computed
//! again (Dao et al., arXiv 2205.14135).
//!
//! On the CPU a block is some queries of one segment against that segment alone. Elsewhere many small products would leave
//! the device idle, so a block is some columns of all rows of the group, against the columns from the first that any of them
//! may look at.

mod columns;
mod segments;
mod shape;

use burn::tensor::{FloatDType, Tensor};

use super::host::to_host;
use super::rows::Rows;
pub(super) use shape::{Attended, AttentionShape, Projected, Visible};

impl AttentionShape {
    /// Attention of the queries at some rows of the group.
    pub fn attend(self, projected: &Projected, visible: &Visible, queries: &Rows) -> Attended {
        match visible {
            Visible::Segments(starts) => segments::attend(self, projected, starts, &queries.positions()),
            Visible::Columns { starts, firsts } => {
                let query = queries.spread(projected.query.clone());
                let output = columns::attend(self, query, projected, starts, firsts);
                Attended { output: queries.take(output), log_sums: vec![] }
            }
        }
    }

    /// Gradients of [`AttentionShape::attend`] with respect to the queries, and to keys and values at the rows `keys`, which are
    /// those of the queries or all.
    pub fn backward(
        self,
        d_output: Tensor<2>,
        projected: Projected,
        attended: Attended,
        visible: &Visible,
        (queries, keys): (&Rows, &Rows),
    ) -> [Tensor<2>; 3] {
        let Attended { output, log_sums } = attended;
        // The softmax's row sums over what is seen equal sums over `head_dim` outputs (Dao et al., section 3.1): far fewer.
        let count = d_output.dims()[0];
        let along = (d_output.clone() * output).cast(FloatDType::F32);
        let along = along.reshape([count * self.heads, self.head_dim]).sum_dim(1);
        let along = along.reshape([count, self.heads]);
        match visible {
            Visible::Segments(starts) => {
                let sums = segments::Sums { log_sums, along: to_host(along) };
                segments::backward(self, &d_output, &projected, &sums, starts, (queries, keys))
            }
            Visible::Columns { starts, firsts } => {
                // A query that no gradient flows into gets a zero one, which adds nothing to those of the keys.
                let projected = Projected { query: queries.spread(projected.query), ..projected };
                let (d_output, along) = (queries.spread(d_output), queries.spread(along));
                let [d_query, d_key, d_value] =
                    columns::backward(self, d_output, projected, along, starts, firsts);
                [queries.take_gradient(d_query), keys.take_gradient(d_key), keys.take_gradient(d_value)]
            }
        }
    }
}
