//! One optimizer step: losses to a choice, the chosen ones to a gradient, the gradient to the weights.

use anyhow::bail;
use sluice_feed::batch::{Batch, NO_TARGET, PackedBatch};
use sluice_feed::cut::Piece;
use sluice_feed::select::{Choice, Lowest, Signals, Thresholds, Turn};
use sluice_feed::sources::SourceNames;

use super::books::Books;
use super::learner::{Learner, Measured, StepOutcome};
use super::plan::Plan;
use crate::run::metrics::{ScoresMetric, StepMetric};
use crate::watch::stage::Stage;
use crate::watch::telemetry::{Refused, Telemetry};

/// What takes a step.
pub(super) struct Stepper<'a> {
    pub learner: &'a mut dyn Learner,
    pub plan: &'a Plan,
    /// Tokens of a sequence.
    pub row_len: usize,
    pub telemetry: &'a Telemetry,
}

impl Stepper<'_> {
    /// The step of this number.
    pub fn take(
        mut self,
        step: u64,
        batch: &[PackedBatch],
        thresholds: &mut Thresholds,
        sources: &mut SourceNames,
    ) -> anyhow::Result<(StepMetric, Option<ScoresMetric>)> {
        let mut books = Books::new(&self.plan.objective);
        if self.plan.counts_scores(step) {
            books = books.counting_scores();
        }
        let lowest = self.accumulate(step, batch, thresholds, (&mut books, sources));
        let Self { learner, plan, telemetry, .. } = self;
        let Plan { objective, schedule, .. } = plan;
        let lowest = lowest.map_err(|Broken { not_finite, of }| {
            telemetry.refused(Refused::NotFinite);
            anyhow::anyhow!(
                "step {step} was not taken: the model gives {not_finite} of the {of} tokens of a micro-batch a loss that is not \
                 finite; start again from an earlier checkpoint, with a lower --learning-rate or longer --warmup-steps"
            )
        })?;
        thresholds.end_step(&lowest);
        telemetry.enter(Stage::Optimizer);
        let learning_rate = schedule.at(step);
        let StepOutcome { kept_loss, kept, gradient_norm } = learner.update(learning_rate);
        let may_keep_nothing = objective.may_keep_nothing() && books.has_scored();
        // A step of nothing but pieces that are read under other contexts than the reference's has nothing to choose.
        let is_masked = || batch.iter().flat_map(|packed| &packed.rows).flatten().all(Piece::is_masked);
        if kept == 0 && !may_keep_nothing && !is_masked() {
            telemetry.refused(Refused::NothingKept);
            bail!(
                "step {step} found no token to learn from: no score of its batch is a number; if the selection and the \
                 topic are as intended, lower --learning-rate"
            );
        }
        if kept > 0 && !(kept_loss.is_finite() && gradient_norm.is_finite()) {
            telemetry.refused(Refused::NotFinite);
            bail!(
                "step {step} is not finite (loss {kept_loss}, gradient norm {gradient_norm}) and was not taken; lower \
                 --learning-rate or lengthen --warmup-steps, and start again"
            );
        }
        let loss = (kept > 0).then_some(kept_loss);
        let scores = books.take_scores().map(|histogram| ScoresMetric { step, histogram });
        Ok((StepMetric { step, loss, learning_rate, gradient_norm, ..books.into_metric() }, scores))
    }

    /// Adds up the gradients of a step's micro-batches, and gives what each teaches running thresholds.
    ///
    /// Each micro-batch runs forward once where its choice needs nothing of the others, and where the model decides nothing;
    /// where micro-batches compete for what the model says, each runs forward once more after the losses of all have decided,
    /// but its head for the kept tokens alone.
    fn accumulate(
        &mut self,
        step: u64,
        batch: &[PackedBatch],
        thresholds: &Thresholds,
        (books, sources): (&mut Books, &mut SourceNames),
    ) -> Result<Vec<Lowest>, Broken> {
        let Self { learner, plan, row_len, telemetry } = self;
        let (objective, turn) = (&plan.objective, plan.turn(step));
        let needs = objective.needs();
        let select = |measured: &[Measured]| {
            telemetry.enter(Stage::Select);
            let pairs = measured.iter().zip(batch);
            let signals: Vec<Signals<'_>> =
                pairs.map(|(measured, packed)| measured.signals(&packed.batch)).collect();
            objective.select(&signals, *row_len, turn, thresholds)
        };
        let mut lowest = Vec::with_capacity(batch.len());
        if objective.chooses_beforehand() {
            let unmeasured: Vec<Measured> = batch.iter().map(|packed| unmeasured(&packed.batch)).collect();
            for (packed, choice) in batch.iter().zip(select(&unmeasured)) {
                telemetry.enter(Stage::Forward);
                let mut found = None;
                learner.accumulate_chosen(&packed.batch, &choice.kept, Some(needs), &mut |measured| {
                    found = broken(measured, packed);
                    books.add(packed, &measured.losses, &choice, sources);
                    telemetry.enter(Stage::Backward);
                });
                found.map_or(Ok(()), Err)?;
                lowest.push(choice.lowest);
            }
        } else if batch.len() > 1 && objective.needs_whole_batch(step) {
            telemetry.enter(Stage::Forward);
            let measured: Vec<Measured> =
                batch.iter().map(|packed| learner.measure(&packed.batch, needs)).collect();
            let found = measured.iter().zip(batch).find_map(|(measured, packed)| broken(measured, packed));
            found.map_or(Ok(()), Err)?;
            for ((packed, measured), choice) in batch.iter().zip(&measured).zip(select(&measured)) {
                books.add(packed, &measured.losses, &choice, sources);
                telemetry.enter(Stage::Forward);
                learner.accumulate_chosen(&packed.batch, &choice.kept, None, &mut |_| {
                    telemetry.enter(Stage::Backward);
                });
                lowest.push(choice.lowest);
            }
        } else {
            for (micro_batch, packed) in (0..).zip(batch) {
                telemetry.enter(Stage::Forward);
                let mut found = None;
                learner.accumulate(&packed.batch, needs, &mut |measured| {
                    telemetry.enter(Stage::Select);
                    found = broken(measured, packed);
                    if found.is_some() {
                        return vec![];
                    }
                    let turn = Turn { micro_batch, ..turn };
                    let signals = [measured.signals(&packed.batch)];
                    let choice = objective.select(&signals, *row_len, turn, thresholds).pop();
                    let choice: Choice = choice.unwrap_or_default();
                    lowest.push(choice.lowest);
                    books.add(packed, &measured.losses, &choice, sources);
                    telemetry.enter(Stage::Backward);
                    choice.kept
                });
                found.map_or(Ok(()), Err)?;
            }
        }
        Ok(lowest)
    }
}

/// Predicted tokens of a micro-batch whose loss is not finite, and all that are predicted.
#[derive(Clone, Copy)]
struct Broken {
    not_finite: usize,
    of: usize,
}

/// Looks for tokens that have a target and no finite loss. Such a token would neither be chosen nor counted, and the step
/// would be of others than the selection says.
fn broken(measured: &Measured, packed: &PackedBatch) -> Option<Broken> {
    let targets = &packed.batch.targets;
    let predicted = measured.losses.iter().zip(targets).filter(|&(_, &target)| target != NO_TARGET);
    let not_finite = predicted.filter(|(loss, _)| !loss.is_finite()).count();
    (not_finite > 0).then(|| Broken { not_finite, of: packed.batch.predictions() })
}

/// What is known of a micro-batch before its forward pass: where it has targets.
fn unmeasured(batch: &Batch) -> Measured {
    let loss = |&target: &u32| if target == NO_TARGET { f32::NAN } else { 0.0 };
    Measured { losses: batch.targets.iter().map(loss).collect(), ..Measured::default() }
}
