//! The decoder, its optimizer and its files behind [`Learner`].

use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::tensor::{Device, IndexingUpdateOp, Tensor, TensorData};

use super::checkpoint::{
    HISTORY_FILE, OPTIMIZER_FILE, WEIGHTS_FILE, read_tensors, read_weights, write_file, write_tensors,
};
use super::config::{CONFIG_FILE, ModelConfig};
use super::decoder::{self, BodyGradients, Group, Tape, indices};
use super::device::Precision;
use super::head::{self, Keep, Predictions};
use super::kernels;
use super::layers::{from_host, on_host, to_host};
use super::parallel;
use super::weights::{self, NamedTensor, Weights};
use crate::batch::{Batch, NO_TARGET};
use crate::learner::{Learner, Measured, StepOutcome};
use crate::optimizer::{
    AdamWConfig, AdamWStep, MEAN_PREFIX, Moments, SQUARE_PREFIX, STEP_KEY, split_moments,
};
use crate::select::Needs;

/// Tokens in a group of rows on the CPU: its activations fit the caches, its matrix products are still large.
/// Fixed, because the groups decide the order in which gradients are added.
const GROUP_TOKENS: usize = 1024;

/// A Llama-style decoder in training with AdamW, on Burn.
pub struct BurnLearner {
    config: ModelConfig,
    optimizer: AdamWConfig,
    device: Device,
    weights: Weights<Tensor<2>>,
    /// In the order of [`weights::specs`].
    moments: Vec<Moments>,
    /// Optimizer steps taken.
    steps: u64,
    /// Cosines and sines of all positions.
    rotary_tables: (Tensor<2>, Tensor<2>),
    waiting: Option<Waiting>,
    history: Option<History>,
    precision: Precision,
    recomputes: bool,
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
    weights: Weights<Tensor<2>>,
    /// Share of itself that it keeps at each step; the rest is taken from the model. 1 for one that stands still.
    decay: f64,
}

/// A forward pass over the body.
struct Forward {
    /// Final hidden states, `[tokens, hidden]`.
    hidden: Tensor<2>,
    /// One for each group of rows, in order; none if only losses are wanted.
    tapes: Vec<Tape>,
}

impl BurnLearner {
    /// A fresh model on the CPU, its weights decided by `seed` alone.
    pub fn new(config: ModelConfig, optimizer: AdamWConfig, seed: u64) -> Result<Self> {
        Self::new_on(Device::flex(), config, optimizer, seed)
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
        let tensors = weights::upload(&config, weights, &device)?;
        let moments = fresh_moments(&tensors, &device);
        let weights = Weights::from_vec(&config, tensors)?;
        let shape = [config.max_position_embeddings, config.head_dim() / 2];
        let (cosine, sine) = decoder::rotary_tables(&config);
        let table = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, shape), &device);
        let rotary_tables = (table(cosine), table(sine));
        Ok(Self {
            config,
            optimizer,
            device,
            weights,
            moments,
            steps: 0,
            rotary_tables,
            waiting: None,
            history: None,
            precision: Precision::default(),
            recomputes: false,
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
        self.precision = precision;
    }

    /// Keeps a layer's input alone between its forward and its backward pass, and runs it forward once more instead: less
    /// memory and more time for the same bits (Chen et al., arXiv 1604.06174).
    pub fn recompute_activations(&mut self, recomputes: bool) {
        self.recomputes = recomputes;
    }

    /// Opens a Hugging Face style folder (`config.json`, `model.safetensors`) on the CPU, with the optimizer's
    /// state if the folder has it.
    pub fn open(folder: &Path, optimizer: AdamWConfig) -> Result<Self> {
        Self::open_on(Device::flex(), folder, optimizer)
    }

    /// As [`BurnLearner::open`], on a device.
    pub fn open_on(device: Device, folder: &Path, optimizer: AdamWConfig) -> Result<Self> {
        let config = ModelConfig::read(folder)?;
        let weights = read_weights(folder, &config)?;
        let mut learner = Self::from_weights(config, optimizer, weights, device)?;
        learner.load_optimizer(folder)?;
        Ok(learner)
    }

    /// Keeps a history that [`Needs::history_loss`] can ask for: the weights as they are now, which from here on
    /// move by `1 - decay` towards the model's at each step. With a decay of 1 they stand still.
    pub fn keep_history(&mut self, decay: f64) {
        self.history = Some(History { weights: self.weights.clone(), decay });
    }

    /// As [`BurnLearner::keep_history`], of given weights, which stand still: those of an older checkpoint.
    pub fn keep_as_history(&mut self, weights: Vec<NamedTensor>) -> Result<()> {
        let tensors = weights::upload(&self.config, weights, &self.device)?;
        self.history = Some(History { weights: Weights::from_vec(&self.config, tensors)?, decay: 1.0 });
        Ok(())
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
        weights::download(&self.config, self.weights.clone().into_vec())
    }

    /// Gradients, before clipping, of the mean loss over `kept` positions (as [`Learner::step`] takes them).
    pub fn gradients(&self, batch: &Batch, kept: &[u32]) -> Vec<NamedTensor> {
        let forward = self.forward(&self.weights, batch, true);
        let (_, predicted) = self.predict(&self.weights, &forward, batch, Keep::Exponentials, false);
        let sums = self.backward(batch, forward, predicted, kept).into_vec();
        let means = sums.into_iter().map(|sum| sum.div_scalar(kept.len() as f64)).collect();
        weights::download(&self.config, means)
    }

    /// Rows of a batch that go through the body together.
    fn groups(&self, batch: &Batch) -> Vec<std::ops::Range<usize>> {
        let rows = match parallel::workers(&self.device) {
            1 if self.device != Device::flex() => batch.rows,
            _ => (GROUP_TOKENS / batch.len).max(1),
        };
        (0..batch.rows).step_by(rows).map(|start| start..(start + rows).min(batch.rows)).collect()
    }

    /// Weights as products take them; norms stay f32.
    fn computing(&self, weights: &Weights<Tensor<2>>) -> Weights<Tensor<2>> {
        let dtype = self.precision.dtype();
        weights.clone().map(|weight| if weight.dims()[0] == 1 { weight } else { weight.cast(dtype) })
    }

    fn forward(&self, weights: &Weights<Tensor<2>>, batch: &Batch, keep_tapes: bool) -> Forward {
        self.check(batch);
        let (weights, dtype) = (&self.computing(weights), self.precision.dtype());
        let run = |rows| {
            let group = Group::new(batch, rows, &self.config, &self.rotary_tables, dtype, &self.device);
            let (hidden, tape) =
                decoder::forward(group, weights, self.config.rms_norm_eps, self.recomputes || !keep_tapes);
            (hidden, keep_tapes.then_some(tape))
        };
        let (hidden, tapes): (Vec<_>, Vec<_>) =
            parallel::map(parallel::workers(&self.device), self.groups(batch), run).into_iter().unzip();
        Forward { hidden: Tensor::cat(hidden, 0), tapes: tapes.into_iter().flatten().collect() }
    }

    fn predict(
        &self,
        weights: &Weights<Tensor<2>>,
        forward: &Forward,
        batch: &Batch,
        keep: Keep,
        wants_entropies: bool,
    ) -> (Predictions, head::Forward) {
        let weight = weights.head().clone().cast(self.precision.dtype());
        head::predict(&forward.hidden, &weight, batch, keep, wants_entropies, &self.device)
    }

    /// Losses under the history.
    fn history_losses(&self, batch: &Batch) -> Vec<f32> {
        let Some(History { weights, .. }) = &self.history else {
            panic!("a history loss was asked for, but the learner keeps no history");
        };
        let forward = self.forward(weights, batch, false);
        self.predict(weights, &forward, batch, Keep::Nothing, false).0.losses
    }

    fn measured(&self, predictions: Predictions, batch: &Batch, needs: Needs) -> Measured {
        let Predictions { losses, entropies } = predictions;
        let history_losses = if needs.history_loss { self.history_losses(batch) } else { vec![] };
        Measured { losses, entropies, history_losses }
    }

    /// Gradients of the loss summed over `kept`, which is not empty.
    fn backward(
        &self,
        batch: &Batch,
        forward: Forward,
        predicted: head::Forward,
        kept: &[u32],
    ) -> Weights<Tensor<2>> {
        let Forward { hidden, tapes } = forward;
        let (weights, eps) = (&self.computing(&self.weights), self.config.rms_norm_eps);
        let head = head::gradients(&hidden, weights.head(), predicted, kept, &self.device);
        let workers = parallel::workers(&self.device);
        let mut remaining = kept;
        let mut work = Vec::with_capacity(tapes.len());
        for (tape, rows) in tapes.into_iter().zip(self.groups(batch)) {
            let (start, end) = ((rows.start * batch.len) as u32, (rows.end * batch.len) as u32);
            let count = remaining.partition_point(|&position| position < end);
            let first = kept.len() - remaining.len();
            let own: Vec<u32> = remaining[..count].iter().map(|position| position - start).collect();
            remaining = &remaining[count..];
            // Nothing flows back into a group of which nothing was kept.
            let flows = (count > 0).then(|| (tape, own, head.hidden.clone().narrow(0, first, count)));
            work.push((flows, (end - start) as usize));
        }
        let mut work = work.into_iter();
        let mut embedded = Vec::new();
        let mut body: Option<BodyGradients> = None;
        loop {
            // As many groups at a time as there are workers, so that no more gradients than those are in memory;
            // summed in order, so that the bits do not depend on the number of workers.
            let wave: Vec<_> = work.by_ref().take(workers).collect();
            if wave.is_empty() {
                break;
            }
            let run = |(flows, tokens): (Option<(Tape, Vec<u32>, Tensor<2>)>, usize)| {
                let gradients =
                    flows.map(|(tape, own, d_hidden)| decoder::backward(d_hidden, &own, weights, tape, eps));
                (gradients, tokens)
            };
            for (gradients, tokens) in parallel::map(workers, wave, run) {
                let Some(gradients) = gradients else {
                    embedded.push(Tensor::zeros([tokens, self.config.hidden_size], &self.device));
                    continue;
                };
                embedded.push(gradients.embedded.clone());
                body = Some(match body {
                    Some(sum) => sum.add(gradients),
                    None => gradients,
                });
            }
        }
        let tokens = indices(&batch.tokens, &self.device);
        let embedded = Tensor::cat(embedded, 0);
        let scatter = |into: Tensor<2>| into.select_assign(0, tokens, embedded, IndexingUpdateOp::Add);
        let (embedding, head) = if self.config.tie_word_embeddings {
            (scatter(head.weight), None)
        } else {
            (scatter(Tensor::zeros(self.weights.embedding.dims(), &self.device)), Some(head.weight))
        };
        let Some(BodyGradients { layers, norm, .. }) = body else {
            unreachable!("a batch with kept positions has rows")
        };
        Weights { embedding, layers, norm, head }
    }

    /// Refuses batches that would read outside a table, which a framework may do silently.
    fn check(&self, batch: &Batch) {
        let positions = batch.rows * batch.len;
        let Batch { tokens, segments, positions: at, targets, .. } = batch;
        assert!(positions > 0, "the batch is empty");
        assert!(
            [tokens.len(), segments.len(), at.len(), targets.len()] == [positions; 4],
            "a batch of {} rows of {} has fields of another length",
            batch.rows,
            batch.len
        );
        let vocab = self.config.vocab_size as u32;
        assert!(tokens.iter().all(|&id| id < vocab), "a token id is beyond the vocabulary of {vocab}");
        assert!(
            targets.iter().all(|&id| id < vocab || id == NO_TARGET),
            "a target is beyond the vocabulary of {vocab}"
        );
        let longest = self.config.max_position_embeddings;
        assert!(
            at.iter().all(|&position| (position as usize) < longest),
            "a position is beyond the {longest} of the model's max_position_embeddings"
        );
    }

    /// Steps along the mean of a gradient summed over `kept` tokens, and gives the mean's norm.
    fn descend(&mut self, gradients: Weights<Tensor<2>>, kept: usize, learning_rate: f64) -> f64 {
        let gradients = gradients.into_vec();
        let mut squares = 0.0;
        let mut own = Vec::with_capacity(gradients.len());
        for gradient in gradients {
            let (square, gradient) = sum_of_squares(gradient);
            squares += square;
            own.push(gradient);
        }
        let norm = squares.sqrt() / kept as f64;
        if !norm.is_finite() {
            return norm;
        }
        self.steps += 1;
        let step = AdamWStep::new(self.optimizer, self.steps, learning_rate, norm, kept);
        for ((weight, moments), gradient) in
            self.weights.as_vec_mut().into_iter().zip(&mut self.moments).zip(own)
        {
            step.apply(weight, moments, gradient);
        }
        self.move_history();
        norm
    }

    fn move_history(&mut self) {
        let Some(History { weights, decay }) = &mut self.history else { return };
        if *decay < 1.0 {
            for (old, new) in weights.as_vec_mut().into_iter().zip(self.weights.clone().into_vec()) {
                *old = old.clone().mul_scalar(*decay) + new.mul_scalar(1.0 - *decay);
            }
        }
    }

    fn load_history(&mut self, folder: &Path) -> Result<()> {
        let Some(history) = &mut self.history else { return Ok(()) };
        let (tensors, _) = read_tensors(&folder.join(HISTORY_FILE))?;
        let tensors = weights::upload(&self.config, tensors, &self.device)?;
        history.weights = Weights::from_vec(&self.config, tensors)?;
        Ok(())
    }

    fn load_optimizer(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join(OPTIMIZER_FILE);
        if !path.try_exists().with_context(|| format!("cannot look for {}", path.display()))? {
            self.moments = fresh_moments(&self.weights.clone().into_vec(), &self.device);
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
        let forward = self.forward(&self.weights, batch, false);
        let (predictions, _) = self.predict(&self.weights, &forward, batch, Keep::Nothing, needs.entropy);
        self.measured(predictions, batch, needs)
    }

    fn accumulate(&mut self, batch: &Batch, needs: Needs, select: &mut dyn FnMut(&Measured) -> Vec<u32>) {
        let forward = self.forward(&self.weights, batch, true);
        let (predictions, predicted) =
            self.predict(&self.weights, &forward, batch, Keep::Exponentials, needs.entropy);
        let measured = self.measured(predictions, batch, needs);
        let kept = select(&measured);
        assert!(kept.is_sorted_by(|a, b| a < b), "selected positions must ascend without repeats");
        if kept.is_empty() {
            return;
        }
        let loss_sum: f64 = kept.iter().map(|&position| f64::from(measured.losses[position as usize])).sum();
        let gradients = self.backward(batch, forward, predicted, &kept);
        self.waiting = Some(match self.waiting.take() {
            None => Waiting { gradients, kept: kept.len(), loss_sum },
            Some(waiting) => Waiting {
                gradients: waiting.gradients.zip_with(gradients, |a, b| a + b),
                kept: waiting.kept + kept.len(),
                loss_sum: waiting.loss_sum + loss_sum,
            },
        });
    }

    fn update(&mut self, learning_rate: f64) -> StepOutcome {
        let Some(Waiting { gradients, kept, loss_sum }) = self.waiting.take() else {
            return StepOutcome { kept_loss: f32::NAN, kept: 0, gradient_norm: 0.0 };
        };
        let norm = if loss_sum.is_finite() { self.descend(gradients, kept, learning_rate) } else { f64::NAN };
        StepOutcome { kept_loss: (loss_sum / kept as f64) as f32, kept, gradient_norm: norm as f32 }
    }

    fn save(&self, folder: &Path) -> Result<()> {
        let config = &self.config;
        let weights = self.weights();
        // Such a checkpoint could not be read again, and would push out one that can.
        weights::check_finite(&weights)?;
        write_file(&folder.join(CONFIG_FILE), config.to_hugging_face().as_bytes())?;
        write_tensors(&folder.join(WEIGHTS_FILE), &weights, ("format", "pt"))?;
        let (means, squares): (Vec<_>, Vec<_>) =
            self.moments.iter().cloned().map(|Moments { mean, square }| (mean, square)).unzip();
        let mut tensors = Vec::new();
        for (prefix, moments) in [(MEAN_PREFIX, means), (SQUARE_PREFIX, squares)] {
            let named = weights::download(config, moments).into_iter();
            tensors.extend(
                named.map(|tensor| NamedTensor { name: format!("{prefix}{}", tensor.name), ..tensor }),
            );
        }
        write_tensors(&folder.join(OPTIMIZER_FILE), &tensors, (STEP_KEY, &self.steps.to_string()))?;
        let Some(History { weights, .. }) = &self.history else { return Ok(()) };
        let history = weights::download(config, weights.clone().into_vec());
        write_tensors(&folder.join(HISTORY_FILE), &history, ("format", "pt"))
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
        self.weights = Weights::from_vec(&config, tensors)?;
        self.waiting = None;
        self.load_optimizer(folder)?;
        self.load_history(folder)
    }
}

fn fresh_moments(tensors: &[Tensor<2>], device: &Device) -> Vec<Moments> {
    let zeros = |tensor: &Tensor<2>| Tensor::zeros(tensor.dims(), device);
    tensors.iter().map(|tensor| Moments { mean: zeros(tensor), square: zeros(tensor) }).collect()
}

/// Sum of a gradient's squares, and the gradient.
fn sum_of_squares(gradient: Tensor<2>) -> (f64, Tensor<2>) {
    if on_host(&gradient) {
        let (shape, device) = (gradient.dims(), gradient.device());
        let values = to_host(gradient);
        return (kernels::sum_of_squares(&values), from_host(values, shape, &device));
    }
    let square = to_host((gradient.clone() * gradient.clone()).sum().unsqueeze::<2>())[0];
    (f64::from(square), gradient)
}
