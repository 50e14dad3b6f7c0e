//! Which rows of a group's matrices are meant: all of them, or those that a gradient flows into.
//!
//! Elsewhere than on the CPU, matrices of some rows are padded to a multiple of [`MULTIPLE`] rows, so that a device sees the same
//! shapes again although every step keeps another number of tokens. Padding repeats the last of the rows, whose values are as
//! good as any; what flows into it is a gradient of zero, so that nothing comes of it.

use std::borrow::Cow;
use std::sync::OnceLock;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::device::is_cpu;

/// What the number of rows is a multiple of elsewhere than on the CPU: as many as a tile of a large product has.
const MULTIPLE: usize = if cfg!(test) { 16 } else { 128 };

/// Some rows of a group's `[tokens, ...]` matrices.
#[derive(Clone)]
pub(super) struct Rows {
    /// Tokens of the group.
    tokens: usize,
    /// Which of them, ascending; none for all of them.
    some: Option<Chosen>,
}

#[derive(Clone)]
struct Chosen {
    positions: Vec<u32>,
    /// The same on the device, and padding.
    indices: Tensor<1, Int>,
    /// 1 for each of the rows and 0 for padding, `[rows, 1]`; none where there is no padding.
    is_row: Option<Tensor<2>>,
    /// For each token its row, or the number of rows where it is none of them, `[tokens]`; made when it is first wanted.
    inverse: OnceLock<Tensor<1, Int>>,
}

impl Rows {
    /// All `tokens` rows.
    pub fn all(tokens: usize) -> Self {
        Self { tokens, some: None }
    }

    /// These rows of `tokens`, ascending.
    pub fn some(tokens: usize, positions: &[u32], device: &Device) -> Self {
        let count = positions.len();
        if count == tokens {
            return Self::all(tokens);
        }
        let mut padded = positions.to_vec();
        padded.resize(Self::in_matrix(tokens, count, device), positions.last().copied().unwrap_or(0));
        let is_row = (padded.len() > count).then(|| {
            let ones = (0..padded.len()).map(|row| if row < count { 1.0f32 } else { 0.0 });
            Tensor::from_data(TensorData::new(ones.collect(), [padded.len(), 1]), device)
        });
        let (indices, inverse) = (indices(&padded, device), OnceLock::new());
        Self { tokens, some: Some(Chosen { positions: positions.to_vec(), indices, is_row, inverse }) }
    }

    /// How many rows a matrix of `count` of `tokens` rows has, padding included.
    pub fn in_matrix(tokens: usize, count: usize, device: &Device) -> usize {
        if count == tokens || is_cpu(device) { count } else { count.next_multiple_of(MULTIPLE) }
    }

    /// How many there are, padding left out.
    pub fn len(&self) -> usize {
        self.some.as_ref().map_or(self.tokens, |some| some.positions.len())
    }

    /// Whether they are all rows of the group.
    pub fn are_all(&self) -> bool {
        self.some.is_none()
    }

    /// Which they are, ascending.
    pub fn positions(&self) -> Cow<'_, [u32]> {
        match &self.some {
            Some(some) => Cow::Borrowed(&some.positions),
            None => (0..self.tokens as u32).collect(),
        }
    }

    /// Those rows of a matrix of all.
    pub fn take(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.some {
            Some(some) => x.select(0, some.indices.clone()),
            None => x,
        }
    }

    /// As [`Rows::take`], of gradients: zero in padding.
    pub fn take_gradient(&self, d_x: Tensor<2>) -> Tensor<2> {
        self.without_padding(self.take(d_x))
    }

    /// Zero in padding, of a matrix of these rows.
    pub fn without_padding(&self, x: Tensor<2>) -> Tensor<2> {
        match self.some.as_ref().and_then(|some| some.is_row.clone()) {
            Some(is_row) => {
                let dtype = x.dtype();
                x * is_row.cast(dtype)
            }
            None => x,
        }
    }

    /// Those of values that there are `width` of in a row, `[tokens, width]`; of none, none.
    pub fn take_values(&self, values: Vec<f32>, width: usize) -> Vec<f32> {
        match &self.some {
            Some(some) if !values.is_empty() => {
                let rows = some.positions.iter().map(|&row| row as usize * width);
                rows.flat_map(|start| &values[start..start + width]).copied().collect()
            }
            _ => values,
        }
    }

    /// Those ids of all.
    pub fn take_ids(&self, ids: Tensor<1, Int>) -> Tensor<1, Int> {
        match &self.some {
            Some(some) => ids.select(0, some.indices.clone()),
            None => ids,
        }
    }

    /// The inverse of [`Rows::take`], with zeros between.
    ///
    /// Each row of the result is looked up, in `x` or as the row of zeros behind it: Burn's kernel that adds rows at indices
    /// (`select_assign`) has on a GPU one thread a column, which goes through all rows one after the other.
    pub fn spread(&self, x: Tensor<2>) -> Tensor<2> {
        let Some(some) = &self.some else { return x };
        let ([rows, width], device) = (x.dims(), x.device());
        let inverse = some.inverse.get_or_init(|| {
            let mut inverse = vec![rows as u32; self.tokens];
            for (row, &position) in (0..).zip(&some.positions) {
                inverse[position as usize] = row;
            }
            indices(&inverse, &device)
        });
        let zeros = Tensor::zeros([1, width], (&device, x.dtype()));
        Tensor::cat(vec![x, zeros], 0).select(0, inverse.clone())
    }

    /// A matrix of these rows as one of `others`, which are the same or all, with zeros between.
    pub fn spread_to(&self, others: &Self, x: Tensor<2>) -> Tensor<2> {
        if others.are_all() { self.spread(x) } else { x }
    }
}

/// Host indices as an integer tensor.
pub(super) fn indices(values: &[u32], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.iter().map(|&value| i64::from(value)).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
