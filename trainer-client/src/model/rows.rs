//! Which rows of a group's matrices are meant: all of them, or those that a gradient flows into.

use std::borrow::Cow;

use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};

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
    /// The same on the device.
    indices: Tensor<1, Int>,
}

impl Rows {
    /// All `tokens` rows.
    pub fn all(tokens: usize) -> Self {
        Self { tokens, some: None }
    }

    /// These rows of `tokens`, ascending.
    pub fn some(tokens: usize, positions: &[u32], device: &Device) -> Self {
        if positions.len() == tokens {
            return Self::all(tokens);
        }
        let some = Chosen { positions: positions.to_vec(), indices: indices(positions, device) };
        Self { tokens, some: Some(some) }
    }

    /// How many there are.
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

    /// Those token ids of all.
    pub fn take_ids(&self, ids: Tensor<1, Int>) -> Tensor<1, Int> {
        match &self.some {
            Some(some) => ids.select(0, some.indices.clone()),
            None => ids,
        }
    }

    /// The inverse of [`Rows::take`], with zeros between.
    pub fn spread(&self, x: Tensor<2>) -> Tensor<2> {
        let Some(some) = &self.some else { return x };
        let zeros = Tensor::zeros([self.tokens, x.dims()[1]], (&x.device(), x.dtype()));
        zeros.select_assign(0, some.indices.clone(), x, IndexingUpdateOp::Add)
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
