//! The training loop: documents to batches, the current losses to a selection, a step, and the books.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::bail;
use serde::Serialize;

use crate::batch::Batch;
use crate::evaluate::EvalSet;
use crate::failure::Failure;
use crate::learner::{Learner, StepOutcome};
use crate::metrics::{EvalMetric, Metric, SourceCount, StepMetric};
use crate::pack::{BatchShape, PackedBatch, Packer};
use crate::picture::{Choice, PictureDocuments};
use crate::progress::Progress;
use crate::run_folder::{RunFolder, RunRecord, State, latest_checkpoint};
use crate::schedule::Schedule;
use crate::select::Objective;
use crate::stream::{DocumentStream, StreamError};
use crate::text::TextTokenizer;

/// What a run does, apart from where its documents come from.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What is minimised.
    pub objective: Objective,
    /// Learning rates, and the most steps to take.
    pub schedule: Schedule,
    /// Shape of a batch.
    pub shape: BatchShape,
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
        let mut state = State { step: 0, tokens: 0, tokens_kept: 0, position: self.stream.position() };
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
            let packed = supply.next_batch(self.stream)?;
            let waited = started.elapsed().as_secs_f64();
            let Some(packed) = packed else {
                ending = Ending::StreamEnded;
                break;
            };
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            if state.step == 0 {
                record.reference_model = self.stream.reference_model();
                self.folder.write_record(&record)?;
                self.evaluate(state)?;
            }
            let step_started = Instant::now();
            let mut metric = self.step(&packed, state.step + 1, supply.packer.sources().names())?;
            metric.data_wait_seconds = waited;
            metric.seconds = waited + step_started.elapsed().as_secs_f64();
            state.step += 1;
            state.tokens += packed.batch.predictions() as u64;
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
            let choice =
                Choice { objective: self.plan.objective, threshold, seed: self.plan.seed, step: state.step };
            let picture = supply.picture.draw(self.learner, self.tokenizer, &choice, self.plan.shape.len);
            self.folder.write_picture(&picture)?;
        }
        self.progress.finish();
        Ok(Outcome { steps: state.step, tokens: state.tokens, tokens_kept: state.tokens_kept, ending })
    }

    fn step(&mut self, packed: &PackedBatch, step: u64, sources: &[String]) -> anyhow::Result<StepMetric> {
        let learning_rate = self.plan.schedule.at(step);
        let Plan { objective, seed, .. } = self.plan;
        let mut books = Books::default();
        let outcome = self.learner.step(&packed.batch, learning_rate, &mut |current| {
            let kept = objective.select(current, &packed.batch.reference, seed, step);
            books = Books::of(objective, packed, current, &kept, sources);
            kept
        });
        let StepOutcome { kept_loss, gradient_norm, .. } = outcome;
        if books.selected.count == 0 {
            bail!(
                "step {step} found no token to learn from: no loss of its batch is a number; if --keep and the topic \
                 are as intended, lower --learning-rate"
            );
        }
        if !kept_loss.is_finite() || !gradient_norm.is_finite() {
            bail!(
                "step {step} is not finite (loss {kept_loss}, gradient norm {gradient_norm}) and was not taken; lower \
                 --learning-rate or lengthen --warmup-steps, and start again"
            );
        }
        Ok(StepMetric { step, loss: kept_loss, learning_rate, gradient_norm, ..books.into_metric() })
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

/// Batches from a stream, in stream order, with an eye on documents for the token picture.
struct Supply {
    packer: Packer,
    picture: PictureDocuments,
}

impl Supply {
    fn new(shape: BatchShape) -> Self {
        Self { packer: Packer::new(shape), picture: PictureDocuments::default() }
    }

    fn next_batch(&mut self, stream: &mut dyn DocumentStream) -> Result<Option<PackedBatch>, StreamError> {
        loop {
            if let Some(packed) = self.packer.next_batch() {
                return Ok(Some(packed));
            }
            match stream.next_document()? {
                Some(document) => {
                    self.picture.offer(&document);
                    self.packer.push(&document);
                }
                None => return Ok(self.packer.flush()),
            }
        }
    }
}

/// Batches of this shape that a stream fills, counted by packing it.
pub fn count_batches(stream: &mut dyn DocumentStream, shape: BatchShape) -> Result<u64, StreamError> {
    let mut supply = Supply::new(shape);
    let mut batches = 0;
    while supply.next_batch(stream)?.is_some() {
        batches += 1;
    }
    Ok(batches)
}

/// Sums over one batch, under the model before the step.
#[derive(Clone, Debug, Default)]
struct Books {
    selected: Mean,
    unselected: Mean,
    scored: u64,
    threshold: Option<f32>,
    sources: BTreeMap<String, SourceCount>,
}

impl Books {
    fn of(
        objective: Objective,
        packed: &PackedBatch,
        current: &[f32],
        kept: &[u32],
        sources: &[String],
    ) -> Self {
        let Batch { reference, .. } = &packed.batch;
        let mut books = Self::default();
        let mut counts = vec![SourceCount::default(); sources.len()];
        let mut kept = kept.iter().map(|&index| index as usize).peekable();
        for (index, (&current, &reference)) in current.iter().zip(reference).enumerate() {
            let is_kept = kept.next_if_eq(&index).is_some();
            if current.is_nan() {
                continue;
            }
            let is_eligible = objective.is_eligible(current, reference);
            if is_kept { &mut books.selected } else { &mut books.unselected }.add(current);
            books.scored += u64::from(is_eligible);
            if is_kept && matches!(objective, Objective::Slm { .. }) {
                let excess = current - reference;
                books.threshold = Some(books.threshold.map_or(excess, |lowest| lowest.min(excess)));
            }
            if let Some(count) =
                packed.source_at(index).and_then(|source| counts.get_mut(usize::from(source)))
            {
                count.kept += u64::from(is_kept);
                count.scored += u64::from(is_eligible);
            }
        }
        books.sources = sources.iter().cloned().zip(counts).filter(|(_, count)| count.scored > 0).collect();
        books
    }

    fn into_metric(self) -> StepMetric {
        let all = Mean {
            sum: self.selected.sum + self.unselected.sum,
            count: self.selected.count + self.unselected.count,
        };
        StepMetric {
            step: 0,
            tokens: 0,
            tokens_kept: 0,
            loss: 0.0,
            loss_all: all.get().unwrap_or(0.0),
            loss_selected: self.selected.get(),
            loss_unselected: self.unselected.get(),
            threshold: self.threshold,
            kept: self.selected.count,
            scored: self.scored,
            learning_rate: 0.0,
            gradient_norm: 0.0,
            seconds: 0.0,
            data_wait_seconds: 0.0,
            sources: self.sources,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, value: f32) {
        self.sum += f64::from(value);
        self.count += 1;
    }

    fn get(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}
