//! The one seam between training and a tensor framework: everything else in this crate works on slices.

use std::path::Path;

use sluice_feed::batch::Batch;
use sluice_feed::select::{Needs, Signals};
use sluice_schemas::fingerprint::Fingerprint;

/// File name of the weights that [`Learner::save`] writes, as in every Hugging Face style folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean loss in nats over the kept tokens: what was minimised. NaN where none was kept.
    pub kept_loss: f32,
    /// Number of tokens that were kept.
    pub kept: usize,
    /// Global L2 norm of the gradient before clipping.
    pub gradient_norm: f32,
}

/// What a forward pass says of each position of a micro-batch, `rows * len` values in nats, NaN where there is no
/// target. A list that was not asked for is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Loss of the position's target.
    pub losses: Vec<f32>,
    /// Entropy of its prediction.
    pub entropies: Vec<f32>,
    /// Loss of the target under the model's history.
    pub history_losses: Vec<f32>,
}

impl Measured {
    /// The same beside what the reference says of the micro-batch.
    pub fn signals<'a>(&'a self, batch: &'a Batch) -> Signals<'a> {
        Signals {
            loss: &self.losses,
            entropy: &self.entropies,
            history_loss: &self.history_losses,
            reference_loss: &batch.reference,
            reference_entropy: &batch.reference_entropy,
            attribute: &batch.attribute,
        }
    }
}

/// A language model in training.
///
/// On a CPU implementations are deterministic: the same weights, batches and selections give the same bits, which a resumed run
/// depends on. On a GPU they are not: which of several kernels computes a product is decided by their times, once for each size
/// and kind, and kernels add in different orders. (The model asks for nothing that is added in an order that a race decides.)
pub trait Learner {
    /// Losses of a micro-batch, and what else is asked for.
    ///
    /// # Panics
    /// When the history is asked for and the learner keeps none.
    fn measure(&self, batch: &Batch, needs: Needs) -> Measured;

    /// A forward pass, `select` on what it measured, and a backward pass for the positions whose flat indices
    /// `select` returned (ascending, without repeats). The gradient of the sum of their losses is added to what
    /// waits for [`Learner::update`].
    fn accumulate(&mut self, batch: &Batch, needs: Needs, select: &mut dyn FnMut(&Measured) -> Vec<u32>);

    /// As [`Learner::accumulate`], for positions that were chosen beforehand: what a step needs of dropped ones is then known
    /// before the forward pass, and is not kept. `measured` is called between the two passes, with what `needs` asks for;
    /// without `needs` with the losses of the kept positions alone.
    fn accumulate_chosen(
        &mut self,
        batch: &Batch,
        kept: &[u32],
        needs: Option<Needs>,
        measured: &mut dyn FnMut(&Measured),
    ) {
        self.accumulate(batch, needs.unwrap_or_default(), &mut |found| {
            measured(found);
            kept.to_vec()
        });
    }

    /// An optimizer step along the gradient of the mean loss over every token kept since the last one. Where no
    /// token was kept, and where a kept loss or the gradient is not finite, which shows in the outcome, the weights
    /// stay as they are.
    fn update(&mut self, learning_rate: f64) -> StepOutcome;

    /// Loss in nats of every position's target, `rows * len` values; NaN where there is no target.
    fn losses(&self, batch: &Batch) -> Vec<f32> {
        self.measure(batch, Needs::default()).losses
    }

    /// One optimizer step on a single micro-batch, chosen from by its losses.
    fn step(
        &mut self,
        batch: &Batch,
        learning_rate: f64,
        select: &mut dyn FnMut(&[f32]) -> Vec<u32>,
    ) -> StepOutcome {
        self.accumulate(batch, Needs::default(), &mut |measured| select(&measured.losses));
        self.update(learning_rate)
    }

    /// Writes `model.safetensors` (Hugging Face names), `config.json`, what else came with the weights, and
    /// `optimizer.safetensors` into `folder`, which exists; `history.safetensors` too where there is a history.
    /// Fails where a weight is not finite.
    fn save(&self, folder: &Path) -> anyhow::Result<()>;

    /// Digest of the `model.safetensors` that [`Learner::save`] would write now, without writing it.
    fn digest(&self) -> anyhow::Result<Fingerprint>;

    /// Reads back what [`Learner::save`] wrote; a missing optimizer file leaves the optimizer fresh.
    fn load(&mut self, folder: &Path) -> anyhow::Result<()>;
}
