//! A batch forward and back through the whole model, in groups of rows.

use std::ops::Range;

use burn::tensor::Tensor;
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::select::Needs;

use super::held::Held;
use super::purpose::{Forward, Purpose};
use super::{BurnLearner, History};
use crate::model::Backward;
use crate::model::decoder::{self, BodyGradients, Group, Record, Tape};
use crate::model::device::is_cpu;
use crate::model::embedding::add_by_token;
use crate::model::head::{self, Keep, Predictions};
use crate::model::parallel;
use crate::model::rows::Rows;
use crate::model::weights::Weights;
use crate::training::learner::Measured;

/// Tokens in a group of rows on the CPU: its activations fit the caches, its matrix products are still large.
/// Fixed, because the groups decide the order in which gradients are added.
const GROUP_TOKENS: usize = 1024;

/// Those of ascending flat positions that are in each group of rows, counted from its first token.
fn by_group(positions: &[u32], groups: &[Range<usize>], len: usize) -> Vec<Vec<u32>> {
    let mut rest = positions;
    let own = |rows: &Range<usize>| {
        let (start, end) = ((rows.start * len) as u32, (rows.end * len) as u32);
        let (own, others) = rest.split_at(rest.partition_point(|&position| position < end));
        rest = others;
        own.iter().map(|position| position - start).collect()
    };
    groups.iter().map(own).collect()
}

impl BurnLearner {
    /// Rows of a batch that go through the body together.
    fn groups(&self, batch: &Batch) -> Vec<Range<usize>> {
        let rows = match parallel::workers(&self.device) {
            1 if !is_cpu(&self.device) => batch.rows,
            _ => (GROUP_TOKENS / batch.len).max(1),
        };
        (0..batch.rows).step_by(rows).map(|start| start..(start + rows).min(batch.rows)).collect()
    }

    pub(super) fn forward(&self, weights: &Held, batch: &Batch, purpose: Purpose<'_>) -> Forward {
        self.check(batch);
        let (weights, dtype) = (weights.for_products(), weights.precision().dtype());
        let groups = self.groups(batch);
        let kept = match purpose {
            Purpose::GradientOf(kept) => by_group(kept, &groups, batch.len).into_iter().map(Some).collect(),
            Purpose::Losses | Purpose::Gradient => vec![None; groups.len()],
        };
        let run = |(rows, kept): (Range<usize>, Option<Vec<u32>>)| {
            let group = Group::new(batch, rows, &self.config, &self.rotary_tables, dtype, &self.device);
            let record = match (purpose, &kept) {
                (Purpose::Losses, _) => Record::Nothing,
                (Purpose::GradientOf(_), Some(kept)) if kept.is_empty() => Record::Nothing,
                _ if self.recomputes => Record::Inputs,
                (Purpose::GradientOf(_), Some(kept)) if self.backward == Backward::Kept => {
                    Record::TapesOf(kept)
                }
                _ => Record::Tapes,
            };
            decoder::forward(group, weights, self.config.rms_norm_eps, record)
        };
        let work = groups.into_iter().zip(kept).collect();
        let (hidden, tapes): (Vec<_>, Vec<_>) =
            parallel::map(parallel::workers(&self.device), work, run).into_iter().unzip();
        Forward { hidden: Tensor::cat(hidden, 0), tapes }
    }

    /// What the head keeps, by the shapes alone: what it computes again may round otherwise, and recomputing the activations of
    /// layers changes no bits.
    pub(super) fn keep(&self, batch: &Batch) -> Keep {
        Keep::Beside(batch.tokens.len() * self.config.layers * decoder::tape_values(&self.config))
    }

    /// What the head says of every position with a target, `targets` being the batch's or some of them.
    pub(super) fn predict(
        &self,
        weights: &Held,
        forward: &Forward,
        targets: &[u32],
        keep: Keep,
        wants_entropies: bool,
    ) -> (Predictions, head::Forward) {
        let weight = weights.for_products().head();
        head::predict(&forward.hidden, weight, targets, keep, wants_entropies, &self.device)
    }

    /// Losses under the history.
    fn history_losses(&self, batch: &Batch) -> Vec<f32> {
        let Some(History { weights, .. }) = &self.history else {
            panic!("a history loss was asked for, but the learner keeps no history");
        };
        let forward = self.forward(weights, batch, Purpose::Losses);
        self.predict(weights, &forward, &batch.targets, Keep::Nothing, false).0.losses
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
        let (weights, how) = (self.weights.for_products(), (self.config.rms_norm_eps, self.backward));
        let head = head::gradients(&hidden, weights.head(), predicted, kept, &self.device);
        drop(hidden);
        let workers = parallel::workers(&self.device);
        let mut work = Vec::with_capacity(tapes.len());
        let mut first = 0;
        let groups = self.groups(batch);
        let of_group = by_group(kept, &groups, batch.len);
        for ((tape, own), rows) in tapes.into_iter().zip(of_group).zip(groups) {
            let count = Rows::in_matrix(rows.len() * batch.len, own.len(), &self.device);
            // Nothing flows back into a group of which nothing was kept.
            if let Some(tape) = tape.filter(|_| count > 0) {
                work.push((tape, own, head.hidden.clone().narrow(0, first, count)));
            }
            first += count;
        }
        let mut work = work.into_iter();
        let (mut embedded, mut tokens) = (Vec::new(), Vec::new());
        let mut body: Option<BodyGradients> = None;
        loop {
            // As many groups at a time as there are workers, so that no more gradients than those are in memory;
            // summed in order, so that the bits do not depend on the number of workers.
            let wave: Vec<_> = work.by_ref().take(workers).collect();
            if wave.is_empty() {
                break;
            }
            let run = |(tape, own, d_hidden): (Tape, Vec<u32>, Tensor<2>)| {
                decoder::backward(d_hidden, &own, weights, tape, how)
            };
            for gradients in parallel::map(workers, wave, run) {
                embedded.push(gradients.embedded.clone());
                tokens.extend_from_slice(&gradients.tokens);
                body = Some(match body {
                    Some(sum) => sum.add(gradients),
                    None => gradients,
                });
            }
        }
        let (into, head) = if self.config.tie_word_embeddings {
            (Some(head.weight), None)
        } else {
            (None, Some(head.weight))
        };
        let embedding = add_by_token(into, self.config.vocab_size, &tokens, Tensor::cat(embedded, 0));
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
