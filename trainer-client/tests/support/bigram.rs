//! The smallest learner there is: a table of next-token logits, trained by plain gradient descent.

use std::path::Path;

use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::select::Needs;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_trainer::training::learner::{Learner, Measured, StepOutcome};

/// Logits of the next token given the last one.
pub struct Bigram {
    vocabulary: usize,
    logits: Vec<f32>,
    /// Of the loss summed over the tokens kept since the last update.
    gradient: Vec<f32>,
    loss_sum: f32,
    kept: usize,
}

impl Bigram {
    pub fn new(vocabulary: usize) -> Self {
        let zeros = vec![0.0; vocabulary * vocabulary];
        Self { vocabulary, logits: zeros.clone(), gradient: zeros, loss_sum: 0.0, kept: 0 }
    }

    fn probabilities(&self, token: u32) -> Vec<f32> {
        let row = &self.logits[token as usize * self.vocabulary..][..self.vocabulary];
        let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exponentials: Vec<f32> = row.iter().map(|logit| (logit - highest).exp()).collect();
        let sum: f32 = exponentials.iter().sum();
        exponentials.into_iter().map(|exponential| exponential / sum).collect()
    }
}

impl Learner for Bigram {
    fn measure(&self, batch: &Batch, _: Needs) -> Measured {
        let loss = |(&token, &target): (&u32, &u32)| match target {
            NO_TARGET => f32::NAN,
            target => -self.probabilities(token)[target as usize].ln(),
        };
        let losses = batch.tokens.iter().zip(&batch.targets).map(loss).collect();
        Measured { losses, ..Measured::default() }
    }

    fn accumulate(&mut self, batch: &Batch, needs: Needs, select: &mut dyn FnMut(&Measured) -> Vec<u32>) {
        let measured = self.measure(batch, needs);
        let kept = select(&measured);
        for &index in &kept {
            let (token, target) = (batch.tokens[index as usize], batch.targets[index as usize]);
            let row = token as usize * self.vocabulary;
            for (column, probability) in self.probabilities(token).into_iter().enumerate() {
                self.gradient[row + column] += probability - f32::from(u8::from(column == target as usize));
            }
        }
        self.loss_sum += kept.iter().map(|&index| measured.losses[index as usize]).sum::<f32>();
        self.kept += kept.len();
    }

    fn update(&mut self, learning_rate: f64) -> StepOutcome {
        let kept = std::mem::take(&mut self.kept);
        let share = 1.0 / kept as f32;
        let kept_loss = share * std::mem::take(&mut self.loss_sum);
        let gradient = std::mem::replace(&mut self.gradient, vec![0.0; self.logits.len()]);
        let gradient_norm = share * gradient.iter().map(|slope| slope * slope).sum::<f32>().sqrt();
        if kept_loss.is_finite() && gradient_norm.is_finite() {
            for (logit, slope) in self.logits.iter_mut().zip(&gradient) {
                *logit -= learning_rate as f32 * share * slope;
            }
        }
        StepOutcome { kept_loss, kept, gradient_norm }
    }

    fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let bytes: Vec<u8> = self.logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        Ok(std::fs::write(folder.join("model.safetensors"), bytes)?)
    }

    fn digest(&self) -> anyhow::Result<Fingerprint> {
        let bytes: Vec<u8> = self.logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        Ok(Fingerprint::of_bytes(&bytes))
    }

    fn load(&mut self, folder: &Path) -> anyhow::Result<()> {
        let bytes = std::fs::read(folder.join("model.safetensors"))?;
        self.logits = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok(())
    }
}
