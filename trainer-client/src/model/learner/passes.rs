//! A batch forward and back through the whole model, in groups of rows.

use burn::tensor::{IndexingUpdateOp, Tensor};
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::select::Needs;

use super::{BurnLearner, History};
use crate::model::decoder::{self, BodyGradients, Group, Tape, indices};
use crate::model::device::is_cpu;
use crate::model::head::{self, Keep, Predictions};
use crate::model::parallel;
use crate::model::weights::Weights;
use crate::training::learner::Measured;

/// Tokens in a group of rows on the CPU: its activations fit the caches, its matrix products are still large.
/// Fixed, because the groups decide the order in which gradients are added.
const GROUP_TOKENS: usize = 1024;

/// A forward pass over the body.
pub(super) struct Forward {
    /// Final hidden states, `[tokens, hidden]`.
    hidden: Tensor<2>,
    /// One for each group of rows, in order; none if only losses are wanted.
    tapes: Vec<Tape>,
}

impl BurnLearner {
    /// Rows of a batch that go through the body together.
    fn groups(&self, batch: &Batch) -> Vec<std::ops::Range<usize>> {
        let rows = match parallel::workers(&self.device) {
            1 if !is_cpu(&self.device) => batch.rows,
            _ => (GROUP_TOKENS / batch.len).max(1),
        };
        (0..batch.rows).step_by(rows).map(|start| start..(start + rows).min(batch.rows)).collect()
    }

    /// Weights as products take them; norms stay f32.
    fn computing(&self, weights: &Weights<Tensor<2>>) -> Weights<Tensor<2>> {
        let dtype = self.precision.dtype();
        weights.clone().map(|weight| if weight.dims()[0] == 1 { weight } else { weight.cast(dtype) })
    }

    pub(super) fn forward(&self, weights: &Weights<Tensor<2>>, batch: &Batch, keep_tapes: bool) -> Forward {
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

    pub(super) fn predict(
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

    pub(super) fn measured(&self, predictions: Predictions, batch: &Batch, needs: Needs) -> Measured {
        let Predictions { losses, entropies } = predictions;
        let history_losses = if needs.history_loss { self.history_losses(batch) } else { vec![] };
        Measured { losses, entropies, history_losses }
    }

    /// Gradients of the loss summed over `kept`, which is not empty.
    pub(super) fn backward(
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
}
