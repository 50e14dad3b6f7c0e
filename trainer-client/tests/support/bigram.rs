//! The smallest learner there is: a table of next-token logits, trained by plain gradient descent.

use std::path::Path;

use sluice_trainer::batch::{Batch, NO_TARGET};
use sluice_trainer::learner::{Learner, StepOutcome};

/// Logits of the next token given the last one.
pub struct Bigram {
    vocabulary: usize,
    logits: Vec<f32>,
}

impl Bigram {
    pub fn new(vocabulary: usize) -> Self {
        Self { vocabulary, logits: vec![0.0; vocabulary * vocabulary] }
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
    fn losses(&self, batch: &Batch) -> Vec<f32> {
        let loss = |(&token, &target): (&u32, &u32)| match target {
            NO_TARGET => f32::NAN,
            target => -self.probabilities(token)[target as usize].ln(),
        };
        batch.tokens.iter().zip(&batch.targets).map(loss).collect()
    }

    fn step(
        &mut self,
        batch: &Batch,
        learning_rate: f64,
        select: &mut dyn FnMut(&[f32]) -> Vec<u32>,
    ) -> StepOutcome {
        let losses = self.losses(batch);
        let kept = select(&losses);
        let share = 1.0 / kept.len().max(1) as f32;
        let mut gradient = vec![0.0; self.logits.len()];
        for &index in &kept {
            let (token, target) = (batch.tokens[index as usize], batch.targets[index as usize]);
            let row = token as usize * self.vocabulary;
            for (column, probability) in self.probabilities(token).into_iter().enumerate() {
                gradient[row + column] +=
                    share * (probability - f32::from(u8::from(column == target as usize)));
            }
        }
        let kept_loss = share * kept.iter().map(|&index| losses[index as usize]).sum::<f32>();
        let gradient_norm = gradient.iter().map(|slope| slope * slope).sum::<f32>().sqrt();
        if kept_loss.is_finite() && gradient_norm.is_finite() {
            for (logit, slope) in self.logits.iter_mut().zip(&gradient) {
                *logit -= learning_rate as f32 * slope;
            }
        }
        StepOutcome { kept_loss, kept: kept.len(), gradient_norm }
    }

    fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let bytes: Vec<u8> = self.logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        Ok(std::fs::write(folder.join("model.safetensors"), bytes)?)
    }

    fn load(&mut self, folder: &Path) -> anyhow::Result<()> {
        let bytes = std::fs::read(folder.join("model.safetensors"))?;
        self.logits = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok(())
    }
}
