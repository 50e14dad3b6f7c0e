//! The decoder, its optimizer and its files behind [`Learner`].

mod held;
mod passes;
mod purpose;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::tensor::{Tensor, TensorData};
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::select::Needs;
use sluice_schemas::fingerprint::Fingerprint;

use super::backward::Backward;
use super::carried::Carried;
use super::checkpoint::{HISTORY_FILE, OPTIMIZER_FILE, WEIGHTS_METADATA, read_weights};
use super::config::ModelConfig;
use super::decoder;
use super::device::{Device, Precision};
use super::head::{self, Keep};
use super::optimizer::{
    AdamWConfig, AdamWStep, MEAN_PREFIX, Moments, SQUARE_PREFIX, STEP_KEY, split_moments, sum_of_squares,
};
use super::weights::{self, Weights};
use crate::run::tensors::{self, NamedTensor, Pending, Stored, read_tensors, write_pending};
use crate::training::learner::{Learner, Measured, StepOutcome, WEIGHTS_FILE};
use held::Held;
use purpose::{Forward, Purpose};

/// A Llama-style decoder in training with AdamW, on Burn.
pub struct BurnLearner {
    config: ModelConfig,
    optimizer: AdamWConfig,
    device: burn::tensor::Device,
    weights: Held,
    /// In the order of [`weights::specs`]; none before the first step, since a model that is only looked at needs none.
    moments: Vec<Moments>,
    /// Optimizer steps taken.
    steps: u64,
    /// Cosines and sines of all positions.
    rotary_tables: (Tensor<2>, Tensor<2>),
    waiting: Option<Waiting>,
    history: Option<History>,
    recomputes: bool,
    backward: Backward,
    /// What the folder that the weights come from holds beside them.
    carried: Carried,
}

/// What has been accumulated since the last optimizer step.
struct Waiting {
    /// Gradients of the loss summed over the kept tokens.
    gradients: Weights<Tensor<2>>,
    kept: usize,
    /// In nats.
    loss_sum: f64,
}

/// An earlier state of the model.
struct History {
    weights: Held,
    /// Share of itself that it keeps at each step; the rest is taken from the model. 1 for one that stands still.
    decay: f64,
}

impl BurnLearner {
    /// A fresh model on the CPU, its weights decided by `seed` alone.
    pub fn new(config: ModelConfig, optimizer: AdamWConfig, seed: u64) -> Result<Self> {
        Self::new_on(Device::cpu(), config, optimizer, seed)
    }

    /// A model with the given weights (each one named, none beside them) and a fresh optimizer.
    pub fn from_weights(
        config: ModelConfig,
        optimizer: AdamWConfig,
        weights: Vec<NamedTensor>,
        device: Device,
    ) -> Result<Self> {
        config.validate()?;
        optimizer.validate()?;
        let Device(device) = device;
        let tensors = weights::upload(&config, weights, &device)?;
        let weights = Held::new(Weights::from_vec(&config, tensors)?, Precision::default());
        let shape = [config.max_position_embeddings, config.head_dim() / 2];
        let (cosine, sine) = decoder::rotary_tables(&config);
        let table = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, shape), &device);
        let rotary_tables = (table(cosine), table(sine));
        Ok(Self {
            config,
            optimizer,
            device,
            weights,
            moments: vec![],
            steps: 0,
            rotary_tables,
            waiting: None,
            history: None,
            recomputes: false,
            backward: Backward::default(),
            carried: Carried::default(),
        })
    }

    /// A fresh model on a device, its weights decided by `seed` alone.
    pub fn new_on(device: Device, config: ModelConfig, optimizer: AdamWConfig, seed: u64) -> Result<Self> {
        config.validate()?;
        let weights = weights::initial(&config, seed);
        Self::from_weights(config, optimizer, weights, device)
    }

    /// Computes the products of matrices in this precision from here on.
    pub fn compute_in(&mut self, precision: Precision) {
        self.weights.compute_in(precision);
        if let Some(History { weights, .. }) = &mut self.history {
            weights.compute_in(precision);
        }
    }

    /// Keeps a layer's input alone between its forward and its backward pass, and runs it forward once more instead: less
    /// memory and more time for the same bits (Chen et al., arXiv 1604.06174).
    pub fn recompute_activations(&mut self, recomputes: bool) {
        self.recomputes = recomputes;
    }

    /// What gradients flow through from here on.
    pub fn flow_through(&mut self, backward: Backward) {
        self.backward = backward;
    }

    /// Writes this into every checkpoint, as it came with the weights.
    pub fn carry(&mut self, carried: Carried) {
        self.carried = carried;
    }

    /// The token that begins a text, where what came with the weights names one.
    pub fn bos_token(&self) -> Option<u32> {
        self.carried.bos_token()
    }

    /// Opens a Hugging Face style folder (`config.json`, `model.safetensors`) on the CPU, with the optimizer's
    /// state if the folder has it.
    pub fn open(folder: &Path, optimizer: AdamWConfig) -> Result<Self> {
        Self::open_on(Device::cpu(), folder, optimizer)
    }

    /// As [`BurnLearner::open`], on a device.
    pub fn open_on(device: Device, folder: &Path, optimizer: AdamWConfig) -> Result<Self> {
        let config = ModelConfig::read(folder)?;
        let weights = read_weights(folder, &config)?;
        let mut learner = Self::from_weights(config, optimizer, weights, device)?;
        learner.carry(Carried::read(folder)?);
        learner.load_optimizer(folder)?;
        Ok(learner)
    }

    /// Keeps a history that [`Needs::history_loss`] can ask for: the weights as they are now, which from here on
    /// move by `1 - decay` towards the model's at each step. With a decay of 1 they stand still.
    pub fn keep_history(&mut self, decay: f64) {
        let weights = Held::new(self.weights.weights().clone(), self.weights.precision());
        self.history = Some(History { weights, decay });
    }

    /// As [`BurnLearner::keep_history`], of given weights, which stand still: those of an older checkpoint.
    pub fn keep_as_history(&mut self, weights: Vec<NamedTensor>) -> Result<()> {
        let tensors = weights::upload(&self.config, weights, &self.device)?;
        let weights = Held::new(Weights::from_vec(&self.config, tensors)?, self.weights.precision());
        self.history = Some(History { weights, decay: 1.0 });
        Ok(())
    }

    /// Waits until the device has done all that it was asked to; a step may end before its last computations have.
    pub fn synchronize(&self) -> Result<()> {
        self.device.sync().map_err(|error| anyhow::anyhow!("the device failed: {error:?}"))
    }

    /// Shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Optimizer steps taken so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// A copy of all weights on the host.
    pub fn weights(&self) -> Vec<NamedTensor> {
        weights::download(&self.config, self.weights.weights().clone().into_vec())
    }

    /// All weights, each of which is copied to the host when it is written. One that is not finite fails then: such a
    /// checkpoint could not be read again, and would push out one that can.
    fn pending_weights(&self) -> Vec<Pending<'_>> {
        weights::pending(&self.config, "", self.weights.weights().as_vec())
    }

    /// Gradients, before clipping, of the mean loss over `kept` positions (as [`Learner::step`] takes them).
    pub fn gradients(&self, batch: &Batch, kept: &[u32]) -> Vec<NamedTensor> {
        let forward = self.forward(&self.weights, batch, Purpose::Gradient);
        let (_, predicted) = self.predict(&self.weights, &forward, &batch.targets, self.keep(batch), false);
        let sums = self.backward(batch, forward, predicted, kept).into_vec();
        let means = sums.into_iter().map(|sum| sum.div_scalar(kept.len() as f64)).collect();
        weights::download(&self.config, means)
    }

    /// Steps along the mean of a gradient summed over `kept` tokens, and gives the mean's norm.
    fn descend(&mut self, gradients: Weights<Tensor<2>>, kept: usize, learning_rate: f64) -> f64 {
        let (squares, gradients) = sum_of_squares(gradients.into_vec());
        let norm = squares.sqrt() / kept as f64;
        if !norm.is_finite() {
            return norm;
        }
        self.steps += 1;
        if self.moments.is_empty() {
            self.moments = self.fresh_moments();
        }
        let step = AdamWStep::new(self.optimizer, self.steps, learning_rate, norm, kept);
        for ((weight, moments), gradient) in
            self.weights.change().as_vec_mut().into_iter().zip(&mut self.moments).zip(gradients)
        {
            step.apply(weight, moments, gradient);
        }
        self.move_history();
        norm
    }

    /// Adds the gradient of the sum of the kept losses to what waits for an optimizer step.
    fn add_gradients(
        &mut self,
        batch: &Batch,
        (forward, predicted): (Forward, head::Forward),
        kept: &[u32],
        losses: &[f32],
    ) {
        assert!(kept.is_sorted_by(|a, b| a < b), "selected positions must ascend without repeats");
        if kept.is_empty() {
            return;
        }
        let loss_sum: f64 = kept.iter().map(|&position| f64::from(losses[position as usize])).sum();
        let gradients = self.backward(batch, forward, predicted, kept);
        self.waiting = Some(match self.waiting.take() {
            None => Waiting { gradients, kept: kept.len(), loss_sum },
            Some(waiting) => Waiting {
                gradients: waiting.gradients.zip_with(gradients, |a, b| a + b),
                kept: waiting.kept + kept.len(),
                loss_sum: waiting.loss_sum + loss_sum,
            },
        });
    }

    fn move_history(&mut self) {
        let Some(History { weights, decay }) = &mut self.history else { return };
        if *decay < 1.0 {
            let new = self.weights.weights().clone().into_vec();
            for (old, new) in weights.change().as_vec_mut().into_iter().zip(new) {
                *old = old.clone().mul_scalar(*decay) + new.mul_scalar(1.0 - *decay);
            }
        }
    }

    fn load_history(&mut self, folder: &Path) -> Result<()> {
        let Some(history) = &mut self.history else { return Ok(()) };
        let (tensors, _) = read_tensors(&folder.join(HISTORY_FILE))?;
        let tensors = weights::upload(&self.config, tensors, &self.device)?;
        *history.weights.change() = Weights::from_vec(&self.config, tensors)?;
        Ok(())
    }

    fn fresh_moments(&self) -> Vec<Moments> {
        let zeros = |tensor: &Tensor<2>| Tensor::zeros(tensor.dims(), &self.device);
        let weights = self.weights.weights().as_vec();
        weights.into_iter().map(|tensor| Moments { mean: zeros(tensor), square: zeros(tensor) }).collect()
    }

    fn load_optimizer(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join(OPTIMIZER_FILE);
        if !path.try_exists().with_context(|| format!("cannot look for {}", path.display()))? {
            self.moments = vec![];
            self.steps = 0;
            return Ok(());
        }
        let (tensors, metadata) = read_tensors(&path)?;
        let restore = || {
            let step = metadata.get(STEP_KEY).context("the number of steps is missing")?;
            let steps = step.parse().with_context(|| format!("the number of steps is \"{step}\""))?;
            let (means, squares) = split_moments(tensors)?;
            let means = weights::upload(&self.config, means, &self.device)?;
            let squares = weights::upload(&self.config, squares, &self.device)?;
            let moments = means.into_iter().zip(squares).map(|(mean, square)| Moments { mean, square });
            anyhow::Ok((steps, moments.collect()))
        };
        (self.steps, self.moments) = restore().with_context(|| {
            format!("cannot use {}: delete it to start with a fresh optimizer", path.display())
        })?;
        Ok(())
    }
}

impl Learner for BurnLearner {
    fn measure(&self, batch: &Batch, needs: Needs) -> Measured {
        let forward = self.forward(&self.weights, batch, Purpose::Losses);
        let (predictions, _) =
            self.predict(&self.weights, &forward, &batch.targets, Keep::Nothing, needs.entropy);
        self.measured(predictions, batch, needs)
    }

    fn accumulate(&mut self, batch: &Batch, needs: Needs, select: &mut dyn FnMut(&Measured) -> Vec<u32>) {
        let forward = self.forward(&self.weights, batch, Purpose::Gradient);
        let (predictions, predicted) =
            self.predict(&self.weights, &forward, &batch.targets, self.keep(batch), needs.entropy);
        let measured = self.measured(predictions, batch, needs);
        let kept = select(&measured);
        self.add_gradients(batch, (forward, predicted), &kept, &measured.losses);
    }

    fn accumulate_chosen(
        &mut self,
        batch: &Batch,
        kept: &[u32],
        needs: Option<Needs>,
        measured: &mut dyn FnMut(&Measured),
    ) {
        let forward = self.forward(&self.weights, batch, Purpose::GradientOf(kept));
        // Of the others nobody wants to know.
        let of_kept = needs.is_none().then(|| targets_at(&batch.targets, kept));
        let targets = of_kept.as_deref().unwrap_or(&batch.targets);
        let needs = needs.unwrap_or_default();
        let (predictions, predicted) =
            self.predict(&self.weights, &forward, targets, self.keep(batch), needs.entropy);
        let found = self.measured(predictions, batch, needs);
        measured(&found);
        self.add_gradients(batch, (forward, predicted), kept, &found.losses);
    }

    fn update(&mut self, learning_rate: f64) -> StepOutcome {
        let Some(Waiting { gradients, kept, loss_sum }) = self.waiting.take() else {
            return StepOutcome { kept_loss: f32::NAN, kept: 0, gradient_norm: 0.0 };
        };
        let norm = if loss_sum.is_finite() { self.descend(gradients, kept, learning_rate) } else { f64::NAN };
        StepOutcome { kept_loss: (loss_sum / kept as f64) as f32, kept, gradient_norm: norm as f32 }
    }

    fn save(&self, folder: &Path) -> Result<()> {
        write_pending(&folder.join(WEIGHTS_FILE), self.pending_weights(), Stored::F32, WEIGHTS_METADATA)?;
        self.carried.write(folder, &self.config, Stored::F32)?;
        let fresh = if self.moments.is_empty() { self.fresh_moments() } else { vec![] };
        let moments = if self.moments.is_empty() { &fresh } else { &self.moments };
        let (means, squares): (Vec<_>, Vec<_>) =
            moments.iter().map(|Moments { mean, square }| (mean, square)).unzip();
        let mut tensors = weights::pending(&self.config, MEAN_PREFIX, means);
        tensors.extend(weights::pending(&self.config, SQUARE_PREFIX, squares));
        let metadata = (STEP_KEY, &*self.steps.to_string());
        write_pending(&folder.join(OPTIMIZER_FILE), tensors, Stored::F32, metadata)?;
        let Some(History { weights, .. }) = &self.history else { return Ok(()) };
        let history = weights::pending(&self.config, "", weights.weights().as_vec());
        write_pending(&folder.join(HISTORY_FILE), history, Stored::F32, WEIGHTS_METADATA)
    }

    fn digest(&self) -> Result<Fingerprint> {
        tensors::digest(self.pending_weights(), WEIGHTS_METADATA)
    }

    fn load(&mut self, folder: &Path) -> Result<()> {
        let config = ModelConfig::read(folder)?;
        ensure!(
            config == self.config,
            "{} holds another model shape ({config:?}) than the one in training ({:?}): start from that \
             configuration, or from another checkpoint",
            folder.display(),
            self.config
        );
        let tensors = weights::upload(&config, read_weights(folder, &config)?, &self.device)?;
        *self.weights.change() = Weights::from_vec(&config, tensors)?;
        self.waiting = None;
        self.load_optimizer(folder)?;
        self.load_history(folder)
    }
}

/// The targets at some positions, ascending, and none elsewhere.
fn targets_at(targets: &[u32], positions: &[u32]) -> Vec<u32> {
    let mut some = vec![NO_TARGET; targets.len()];
    for &position in positions {
        some[position as usize] = targets[position as usize];
    }
    some
}
