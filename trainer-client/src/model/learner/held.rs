//! Weights as the optimizer has them, and as products take them.

use std::sync::OnceLock;

use burn::tensor::Tensor;

use crate::model::counters::count_cast;
use crate::model::device::Precision;
use crate::model::weights::Weights;

/// Weights in f32, and the same in the precision of products, which are made once for all passes between two changes, of which
/// a step with accumulation has many. In bf16 that is two bytes a weight for as long as the model is held.
pub(super) struct Held {
    weights: Weights<Tensor<2>>,
    precision: Precision,
    /// None yet, or never where the weights are what products take.
    cast: OnceLock<Weights<Tensor<2>>>,
}

impl Held {
    pub fn new(weights: Weights<Tensor<2>>, precision: Precision) -> Self {
        Self { weights, precision, cast: OnceLock::new() }
    }

    /// In f32.
    pub fn weights(&self) -> &Weights<Tensor<2>> {
        &self.weights
    }

    /// As products take them; norms and biases stay f32.
    pub fn for_products(&self) -> &Weights<Tensor<2>> {
        if self.precision == Precision::F32 {
            return &self.weights;
        }
        self.cast.get_or_init(|| {
            count_cast();
            let dtype = self.precision.dtype();
            self.weights.clone().map(|weight| if weight.dims()[0] == 1 { weight } else { weight.cast(dtype) })
        })
    }

    /// What products are computed in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// To be changed: what was made of them is forgotten, and made again when it is wanted.
    pub fn change(&mut self) -> &mut Weights<Tensor<2>> {
        self.cast = OnceLock::new();
        &mut self.weights
    }

    /// Products take them in this precision from here on.
    pub fn compute_in(&mut self, precision: Precision) {
        self.change();
        self.precision = precision;
    }
}
