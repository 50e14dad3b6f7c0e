//! The training loop: documents to batches, the current losses to a selection, a step, and the books.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::bail;
use serde::Serialize;

use crate::books::Books;
use crate::evaluate::EvalSet;
use crate::failure::Failure;
use crate::learner::{Learner, Measured, StepOutcome};
use crate::metrics::{EvalMetric, Metric, StepMetric};
use crate::pack::{BatchShape, PackedBatch};
use crate::picture::PictureRule;
use crate::progress::Progress;
use crate::run_folder::{RunFolder, RunRecord, State, latest_checkpoint};
use crate::schedule::Schedule;
use crate::select::{Choice, Needs, Objective, Signals, Thresholds, Turn};
use crate::stream::DocumentStream;
use crate::supply::Supply;
use crate::text::TextTokenizer;

/// What a run does, apart from where its documents come from.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is minimised.
    pub objective: Objective,
    /// Learning rates, and the most steps to take.
    pub schedule: Schedule,
    /// Shape of a micro-batch.
    pub shape: BatchShape,
    /// Micro-batches whose gradients make one step.
    pub accumulate: usize,
    /// Seed of random selections.
    pub seed: u64,
    /// Steps between evaluations; there is one before the first step and one after the last as well.
    pub eval_every: u64,
    /// Steps between checkpoints; there is one after the last as well.
    pub checkpoint_every: u64,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// All steps were done.
    Finished,
    /// The stream ended first.
    StreamEnded,
    /// Somebody asked it to stop.
    Stopped,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Steps done.
    pub steps: u64,
    /// Predictions seen.
    pub tokens: u64,
    /// Predictions kept.
    pub tokens_kept: u64,
    /// Why it ended.
    pub ending: Ending,
}

/// A run, put together.
pub struct Training<'a> {
    /// The model.
    pub learner: &'a mut dyn Learner,
    /// The documents.
    pub stream: &'a mut dyn DocumentStream,
    /// What to do.
    pub plan: Plan,
    /// Held-out sets.
    pub evals: &'a [EvalSet],
    /// The tokenizer, for checkpoints and the token picture.
    pub tokenizer: &'a TextTokenizer,
    /// Where it is all written down.
    pub folder: &'a mut RunFolder,
    /// Asks the run to stop after the step it is in.
    pub stop: &'a AtomicBool,
    /// What people see.
    pub progress: Progress,
}

impl Training<'_> {
    /// Trains until the steps are done, the stream ends or the run is asked to stop; a checkpoint follows in each
    /// case, and where an error ends the run after a step. `run.json` is written once the first batch has shown that
    /// the stream fits the tokenizer.
    pub fn run(mut self, record: RunRecord) -> anyhow::Result<Outcome> {
        let mut supply = Supply::new(self.plan.shape);
        let mut state = State {
            step: 0,
            tokens: 0,
            tokens_kept: 0,
            position: self.stream.position(),
            thresholds: Thresholds::default(),
        };
        let mut threshold = None;
        match self.take_steps(record, &mut supply, &mut state, &mut threshold) {
            Ok(ending) => self.close(&state, threshold, &supply, ending),
            Err(error) => Err(self.save_after(error, &state)),
        }
    }

    /// Steps until something ends them. After an error the weights are those of `state`: no step is taken by half.
    fn take_steps(
        &mut self,
        mut record: RunRecord,
        supply: &mut Supply,
        state: &mut State,
        threshold: &mut Option<f32>,
    ) -> anyhow::Result<Ending> {
        let mut ending = Ending::Finished;
        while state.step < self.plan.schedule.steps {
            let started = Instant::now();
            let batch = supply.next_batches(self.stream, self.plan.accumulate)?;
            let waited = started.elapsed().as_secs_f64();
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            if batch.is_empty() {
                ending = Ending::StreamEnded;
                break;
            }
            if state.step == 0 {
                record.reference_model = self.stream.reference_model();
                self.folder.write_record(&record)?;
                self.evaluate(state)?;
            }
            let step_started = Instant::now();
            let mut metric = self.step(&batch, state.step + 1, supply.sources(), &mut state.thresholds)?;
            metric.data_wait_seconds = waited;
            metric.seconds = waited + step_started.elapsed().as_secs_f64();
            state.step += 1;
            state.tokens += batch.iter().map(|packed| packed.batch.predictions() as u64).sum::<u64>();
            state.tokens_kept += metric.kept;
            state.position = self.stream.position();
            (metric.tokens, metric.tokens_kept, *threshold) =
                (state.tokens, state.tokens_kept, metric.threshold);
            self.progress.step(&metric);
            self.folder.log(&Metric::Step(metric))?;
            if state.step.is_multiple_of(self.plan.checkpoint_every) {
                self.folder.checkpoint(self.learner, self.tokenizer, state)?;
            }
            if state.step.is_multiple_of(self.plan.eval_every) && state.step < self.plan.schedule.steps {
                self.evaluate(state)?;
            }
        }
        if self.stop.load(Ordering::Relaxed) {
            ending = Ending::Stopped;
        }
        Ok(ending)
    }

    /// Saves what was learnt before an error, and adds to the error where it is, or that it is lost.
    fn save_after(self, error: anyhow::Error, state: &State) -> anyhow::Error {
        self.progress.finish();
        let step = state.step;
        if step == 0 {
            return error;
        }
        match self.folder.checkpoint(self.learner, self.tokenizer, state) {
            Ok(path) => error
                .context(format!("the run ended after step {step}, and its model is in {}", path.display())),
            Err(lost) => {
                let left = match latest_checkpoint(self.folder.path()) {
                    Ok(path) => format!("the last checkpoint is {}", path.display()),
                    Err(_) => "there is no checkpoint".to_owned(),
                };
                error.context(format!(
                    "the run ended after step {step}; {left}, as this step's failed ({lost:#})"
                ))
            }
        }
    }

    fn close(
        mut self,
        state: &State,
        threshold: Option<f32>,
        supply: &Supply,
        ending: Ending,
    ) -> anyhow::Result<Outcome> {
        if state.step == 0 && ending != Ending::Stopped {
            let error = "the stream ended without a single document of two tokens or more";
            return Err(Failure::Data(error.to_owned()).into());
        }
        if state.step > 0 {
            self.folder.checkpoint(self.learner, self.tokenizer, state)?;
            let evaluated =
                state.step.is_multiple_of(self.plan.eval_every) && state.step < self.plan.schedule.steps;
            if !evaluated {
                self.evaluate(state)?;
            }
            let objective = self.plan.objective.clone();
            let rule = PictureRule { objective, threshold, turn: self.turn(state.step) };
            let picture = supply.picture().draw(self.learner, self.tokenizer, &rule, self.plan.shape.len);
            self.folder.write_picture(&picture)?;
        }
        self.progress.finish();
        Ok(Outcome { steps: state.step, tokens: state.tokens, tokens_kept: state.tokens_kept, ending })
    }

    fn turn(&self, step: u64) -> Turn {
        Turn { seed: self.plan.seed, step, steps: self.plan.schedule.steps, micro_batch: 0 }
    }

    /// One optimizer step. Where micro-batches compete with one another, each runs forward once more, after the
    /// losses of all have decided.
    fn step(
        &mut self,
        batch: &[PackedBatch],
        step: u64,
        sources: &[String],
        thresholds: &mut Thresholds,
    ) -> anyhow::Result<StepMetric> {
        let turn = self.turn(step);
        let Plan { objective, schedule, shape, .. } = &self.plan;
        let mut needs = objective.needs();
        let mut books = Books::new(objective);
        let mut decided = None;
        if batch.len() > 1 && objective.needs_whole_batch(step) {
            let measured: Vec<Measured> =
                batch.iter().map(|packed| self.learner.measure(&packed.batch, needs)).collect();
            let signals: Vec<Signals<'_>> = measured
                .iter()
                .zip(batch)
                .map(|(measured, packed)| measured.signals(&packed.batch))
                .collect();
            decided = Some(objective.select(&signals, shape.len, turn, thresholds).into_iter());
            needs = Needs::default();
        }
        for (micro_batch, packed) in (0..).zip(batch) {
            self.learner.accumulate(&packed.batch, needs, &mut |measured| {
                let choice = if let Some(choices) = &mut decided {
                    choices.next()
                } else {
                    let turn = Turn { micro_batch, ..turn };
                    objective.select(&[measured.signals(&packed.batch)], shape.len, turn, thresholds).pop()
                };
                let choice: Choice = choice.unwrap_or_default();
                books.add(packed, &measured.losses, &choice, sources);
                choice.kept
            });
        }
        let learning_rate = schedule.at(step);
        let StepOutcome { kept_loss, kept, gradient_norm } = self.learner.update(learning_rate);
        if kept == 0 && !(objective.may_keep_nothing() && books.has_scored()) {
            bail!(
                "step {step} found no token to learn from: no score of its batch is a number; if the selection and the \
                 topic are as intended, lower --learning-rate"
            );
        }
        if kept > 0 && !(kept_loss.is_finite() && gradient_norm.is_finite()) {
            bail!(
                "step {step} is not finite (loss {kept_loss}, gradient norm {gradient_norm}) and was not taken; lower \
                 --learning-rate or lengthen --warmup-steps, and start again"
            );
        }
        let loss = (kept > 0).then_some(kept_loss);
        Ok(StepMetric { step, loss, learning_rate, gradient_norm, ..books.into_metric() })
    }

    fn evaluate(&mut self, state: &State) -> anyhow::Result<()> {
        for set in self.evals {
            let Some(loss) = set.loss(self.learner, self.stop) else { break };
            self.progress.say(&format!("step {}: loss {:.4} on {}", state.step, loss.loss, loss.set));
            self.folder.log(&Metric::Eval(EvalMetric {
                step: state.step,
                tokens: state.tokens,
                set: loss.set,
                loss: loss.loss,
                predictions: loss.predictions,
            }))?;
        }
        Ok(())
    }
}
