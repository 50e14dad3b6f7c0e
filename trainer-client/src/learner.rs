//! The one seam between training and a tensor framework: everything else in this crate works on slices.

use std::path::Path;

use crate::batch::Batch;

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean loss in nats over the kept tokens: what was minimised.
    pub kept_loss: f32,
    /// Number of tokens that were kept.
    pub kept: usize,
    /// Global L2 norm of the gradient before clipping.
    pub gradient_norm: f32,
}

/// A language model in training.
///
/// Implementations are deterministic: the same weights, batch and selection give the same bits.
pub trait Learner {
    /// Loss in nats of every position's target, `rows * len` values; NaN where there is no target.
    fn losses(&self, batch: &Batch) -> Vec<f32>;

    /// One optimizer step: a forward pass, `select` on its per-position losses (NaN where there is no target),
    /// and a backward pass for the positions whose flat indices `select` returned (ascending, without repeats),
    /// minimising their mean loss. An empty selection leaves the weights alone, and so do a kept loss and a gradient
    /// that are not finite, which show in the outcome.
    fn step(
        &mut self,
        batch: &Batch,
        learning_rate: f64,
        select: &mut dyn FnMut(&[f32]) -> Vec<u32>,
    ) -> StepOutcome;

    /// Writes `model.safetensors` (Hugging Face names), `config.json` (a `LlamaForCausalLM`) and
    /// `optimizer.safetensors` into `folder`, which exists. Fails where a weight is not finite.
    fn save(&self, folder: &Path) -> anyhow::Result<()>;

    /// Reads back what [`Learner::save`] wrote; a missing optimizer file leaves the optimizer fresh.
    fn load(&mut self, folder: &Path) -> anyhow::Result<()>;
}
