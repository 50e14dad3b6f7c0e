//! AdamW with decoupled weight decay, and clipping by the gradient's global norm.
//!
//! Burn's own optimizer clips each tensor by itself and cannot be restored without its module system; this one
//! follows `PyTorch`'s arithmetic in its order.

use anyhow::{Context, Result, ensure};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::host::{from_host, on_host, to_host};
use super::kernels::{self, AdamWNumbers, adamw};
use crate::run::tensors::NamedTensor;

/// Settings of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the mean of the gradient, in [0, 1).
    pub beta1: f64,
    /// Decay of the mean of the squared gradient, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the mean squared gradient.
    pub eps: f64,
    /// Share of a matrix taken off at each step, times the learning rate; norms do not decay.
    pub weight_decay: f64,
    /// Global L2 norm to which longer gradients are scaled down; infinity for no clipping.
    pub max_gradient_norm: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_gradient_norm: 1.0 }
    }
}

impl AdamWConfig {
    /// Checks ranges; the error names the setting.
    pub fn validate(&self) -> Result<()> {
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            ensure!(
                (0.0..1.0).contains(&beta),
                "{name} {beta} of the optimizer must be at least 0 and below 1"
            );
        }
        ensure!(self.eps > 0.0, "eps {} of the optimizer must be above 0", self.eps);
        ensure!(self.weight_decay >= 0.0, "weight_decay {} must not be negative", self.weight_decay);
        ensure!(self.max_gradient_norm > 0.0, "max_gradient_norm {} must be above 0", self.max_gradient_norm);
        Ok(())
    }
}

/// Running means of one weight's gradient and squared gradient.
#[derive(Clone, Debug)]
pub(crate) struct Moments {
    pub mean: Tensor<2>,
    pub square: Tensor<2>,
}

/// One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), the same for every weight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWStep {
    config: AdamWConfig,
    learning_rate: f64,
    /// `1 - beta^t` for both betas.
    corrections: (f64, f64),
    /// What gradients are multiplied with.
    scale: f64,
}

impl AdamWStep {
    /// The `step`-th step (from 1), for a gradient of global norm `gradient_norm` that was summed over `summed`
    /// tokens and is to be their mean.
    pub fn new(
        config: AdamWConfig,
        step: u64,
        learning_rate: f64,
        gradient_norm: f64,
        summed: usize,
    ) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        // The same small number as in PyTorch's clip_grad_norm_, so that results can be compared.
        let clip = (config.max_gradient_norm / (gradient_norm + 1e-6)).min(1.0);
        Self {
            config,
            learning_rate,
            corrections: (correction(config.beta1), correction(config.beta2)),
            scale: clip / summed as f64,
        }
    }

    /// Moves a weight and its moments along its unclipped, summed gradient.
    pub fn apply(self, weight: &mut Tensor<2>, moments: &mut Moments, gradient: Tensor<2>) {
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let (mean_correction, square_correction) = self.corrections;
        // A norm is held as a matrix of one row.
        let decays = weight.dims()[0] > 1;
        let decay = if decays { 1.0 - self.learning_rate * weight_decay } else { 1.0 };
        if on_host(weight) {
            let numbers = AdamWNumbers {
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                eps: eps as f32,
                scale: self.scale as f32,
                decay: decay as f32,
                rate: (self.learning_rate / mean_correction) as f32,
                root_factor: (1.0 / square_correction.sqrt()) as f32,
            };
            let Moments { mean, square } = moments;
            return in_place([weight, mean, square], |[weight, mean, square]| {
                adamw(numbers, weight, mean, square, &to_host(gradient));
            });
        }
        let gradient = gradient.mul_scalar(self.scale);
        let square = (gradient.clone() * gradient.clone()).mul_scalar(1.0 - beta2);
        let mean = gradient.mul_scalar(1.0 - beta1);
        moments.mean = moments.mean.clone().mul_scalar(beta1) + mean;
        moments.square = moments.square.clone().mul_scalar(beta2) + square;
        let root = moments.square.clone().sqrt().mul_scalar(1.0 / square_correction.sqrt()).add_scalar(eps);
        let update = (moments.mean.clone() / root).mul_scalar(self.learning_rate / mean_correction);
        *weight = weight.clone().mul_scalar(decay) - update;
    }
}

/// Sum of all gradients' squares, and the gradients.
pub(crate) fn sum_of_squares(gradients: Vec<Tensor<2>>) -> (f64, Vec<Tensor<2>>) {
    if !gradients.iter().all(on_host) {
        let squares = gradients.iter().map(|gradient| (gradient.clone() * gradient.clone()).sum());
        // One copy, since each would wait for the device.
        let squares = to_host(Tensor::cat(squares.collect(), 0));
        return (squares.into_iter().map(f64::from).sum(), gradients);
    }
    let mut squares = 0.0;
    let own = |gradient: Tensor<2>| {
        let (shape, device) = (gradient.dims(), gradient.device());
        let values = to_host(gradient);
        squares += kernels::sum_of_squares(&values);
        from_host(values, shape, &device)
    };
    let gradients = gradients.into_iter().map(own).collect();
    (squares, gradients)
}

/// Changes tensors on the CPU in their own memory.
fn in_place(tensors: [&mut Tensor<2>; 3], change: impl FnOnce([&mut [f32]; 3])) {
    let device = tensors[0].device();
    // Out of their places, so that nobody else holds the memory.
    let mut taken = tensors.map(|tensor| {
        let shape = tensor.dims();
        let values = to_host(std::mem::replace(tensor, Tensor::empty([1, 1], &device)));
        (tensor, shape, values)
    });
    change(taken.each_mut().map(|(_, _, values)| values.as_mut_slice()));
    for (tensor, shape, values) in taken {
        *tensor = from_host(values, shape, &device);
    }
}

/// Prefix of a weight's name for the running mean of its gradient, as in `PyTorch`.
pub(crate) const MEAN_PREFIX: &str = "exp_avg.";
/// Prefix of a weight's name for the running mean of its squared gradient, as in `PyTorch`.
pub(crate) const SQUARE_PREFIX: &str = "exp_avg_sq.";
/// Metadata key under which the number of steps taken is saved.
pub(crate) const STEP_KEY: &str = "step";

/// Splits the tensors of an optimizer file into means and squares, under the weights' own names.
pub(crate) fn split_moments(tensors: Vec<NamedTensor>) -> Result<(Vec<NamedTensor>, Vec<NamedTensor>)> {
    let (mut means, mut squares) = (Vec::new(), Vec::new());
    for tensor in tensors {
        let (list, name) = if let Some(name) = tensor.name.strip_prefix(SQUARE_PREFIX) {
            (&mut squares, name.to_owned())
        } else {
            let name = tensor.name.strip_prefix(MEAN_PREFIX);
            let name =
                name.with_context(|| format!("tensor {} is not part of AdamW's state", tensor.name))?;
            (&mut means, name.to_owned())
        };
        list.push(NamedTensor { name, ..tensor });
    }
    Ok((means, squares))
}
