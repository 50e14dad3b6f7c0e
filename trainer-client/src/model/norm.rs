//! The root mean square norm, beside its gradient. Shapes: `n` rows of a `width`.

use burn::tensor::{FloatDType, Tensor};

use super::rows::Rows;

/// What the gradient of a norm needs.
pub(super) struct NormTape {
    /// `x / rms(x)`, `[n, width]`.
    pub normed: Tensor<2>,
    /// `1 / rms(x)`, `[n, 1]`.
    pub inverse_rms: Tensor<2>,
}

impl NormTape {
    /// Its rows that a gradient flows into.
    pub fn take(self, rows: &Rows) -> Self {
        Self { normed: rows.take(self.normed), inverse_rms: rows.take(self.inverse_rms) }
    }
}

/// Root mean square norm: `x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich, arXiv 1910.07467).
pub(super) fn rms_norm(x: Tensor<2>, weight: &Tensor<2>, eps: f64) -> (Tensor<2>, NormTape) {
    let dtype = x.dtype();
    let x = x.cast(FloatDType::F32);
    let inverse_rms = (x.clone() * x.clone()).mean_dim(1).add_scalar(eps).sqrt().recip();
    let normed = x * inverse_rms.clone();
    let output = (normed.clone() * weight.clone()).cast(dtype);
    (output, NormTape { normed: normed.cast(dtype), inverse_rms })
}

/// Gradients of [`rms_norm`]: `(d_x, d_weight)`.
pub(super) fn rms_norm_backward(
    d_y: Tensor<2>,
    weight: &Tensor<2>,
    tape: NormTape,
) -> (Tensor<2>, Tensor<2>) {
    let NormTape { normed, inverse_rms } = tape;
    let dtype = d_y.dtype();
    let (d_y, normed) = (d_y.cast(FloatDType::F32), normed.cast(FloatDType::F32));
    let d_weight = (d_y.clone() * normed.clone()).sum_dim(0);
    let d_normed = d_y * weight.clone();
    let along = (d_normed.clone() * normed.clone()).mean_dim(1);
    (((d_normed - normed * along) * inverse_rms).cast(dtype), d_weight)
}
