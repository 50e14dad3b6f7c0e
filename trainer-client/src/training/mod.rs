//! The training loop: micro-batches in, the current losses to a selection, a step, and the books.

mod books;
pub mod evaluate;
pub mod files;
pub mod learner;
mod plan;
pub mod schedule;
pub mod setup;
mod step;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::Serialize;
use sluice_feed::batch::PackedBatch;
use sluice_feed::feed::{Alone, Feed, Step};
use sluice_feed::sources::SourceNames;
use sluice_schemas::record::{Bos, ContextPolicy};

use crate::failure::Failure;
use crate::run::checkpoints::{Best, DataState, Reached, latest_checkpoint};
use crate::run::folder::RunFolder;
use crate::run::metrics::{EvalMetric, Metric, ScoresMetric, StepMetric};
use crate::run::picture::{PictureDocuments, PictureRule};
use crate::run::record::RunRecord;
use crate::text::TextTokenizer;
use crate::watch::process::own_cpu_seconds;
use crate::watch::progress::Progress;
use crate::watch::stage::Stage;
use crate::watch::telemetry::Telemetry;
use evaluate::{EvalSet, policy_of};
use learner::Learner;
pub use plan::Plan;
use step::Stepper;

/// Steps one after the other without a token to learn from, of which people should know.
const BARREN_STEPS: u64 = 10;

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
    /// Where its micro-batches come from.
    pub feed: Feed,
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
    /// What Prometheus sees.
    pub telemetry: Telemetry,
}

/// Where a run begins: with its record if it is a new one.
struct Start {
    record: Option<RunRecord>,
    reached: Reached,
    seen: Seen,
}

/// What of the stream has been looked at, apart from learning from it.
#[derive(Debug, Default)]
struct Seen {
    sources: SourceNames,
    picture: PictureDocuments,
}

impl Training<'_> {
    /// Trains a new run until the steps are done, the stream ends or the run is asked to stop; a checkpoint follows in
    /// each case, and where an error ends the run after a step. `run.json` is written once the first batch has shown
    /// that the stream fits the tokenizer.
    pub fn run(self, record: RunRecord) -> anyhow::Result<Outcome> {
        self.go(Start { record: Some(record), reached: Reached::default(), seen: Seen::default() })
    }

    /// As [`Training::run`], from a checkpoint on that the learner has loaded and the feed stands at, with the names of
    /// sources and the documents of the picture that it holds.
    pub fn resume(
        self,
        reached: Reached,
        sources: Vec<String>,
        picture: PictureDocuments,
    ) -> anyhow::Result<Outcome> {
        let seen = Seen { sources: SourceNames::from_names(sources), picture };
        self.go(Start { record: None, reached, seen })
    }

    fn go(mut self, start: Start) -> anyhow::Result<Outcome> {
        let Start { record, mut reached, mut seen } = start;
        let first = reached.step;
        match self.take_steps(record, &mut seen, &mut reached) {
            Ok(ending) => self.close(first, &reached, &seen, ending),
            Err(error) => Err(self.save_after(error, first, &reached, &seen)),
        }
    }

    /// Steps until something ends them. After an error the weights are those of `reached`, and so is what the feed holds:
    /// no step is taken by half.
    fn take_steps(
        &mut self,
        mut record: Option<RunRecord>,
        seen: &mut Seen,
        reached: &mut Reached,
    ) -> anyhow::Result<Ending> {
        let steps = self.plan.schedule.steps;
        let mut documents = self.feed.documents();
        let mut barren = 0;
        if record.is_none() && self.is_due(reached.step) {
            // What a stop has cut short.
            self.evaluate(reached, seen)?;
        }
        while reached.step < steps {
            self.telemetry.enter(Stage::Data);
            let (started, cpu_before) = (Instant::now(), own_cpu_seconds());
            let next = self.feed.next_step(&mut Alone)?;
            let (waited, cpu_waited) = (started.elapsed().as_secs_f64(), own_cpu_seconds() - cpu_before);
            let documents_before = std::mem::replace(&mut documents, self.feed.documents());
            self.telemetry.documents(documents - documents_before);
            self.telemetry.set_buffered(self.feed.buffered());
            let batch = match next {
                Step::Batches(batch) => batch,
                Step::Ended => return Ok(Ending::StreamEnded),
                Step::Stopped => return Ok(Ending::Stopped),
            };
            if self.stop.load(Ordering::Relaxed) {
                self.feed.put_back(batch);
                return Ok(Ending::Stopped);
            }
            if let Some(mut record) = record.take() {
                for notice in self.feed.notices() {
                    tracing::warn!("{notice}");
                }
                record.reference_model = self.feed.reference_model();
                self.folder.write_record(&record)?;
                self.telemetry.begin(&record, self.folder.path(), reached.step);
                // Of the model that the run began with no checkpoint is kept, for its micro-batches are taken already.
                self.evaluate_all(reached)?;
            }
            let (step_started, cpu_before) = (Instant::now(), own_cpu_seconds());
            let thresholds = reached.thresholds;
            let (mut metric, scores) = match self.step(&batch, reached, &mut seen.sources) {
                Ok(done) => done,
                Err(error) => {
                    // The step was not taken, so a checkpoint must hold its micro-batches.
                    reached.thresholds = thresholds;
                    self.feed.put_back(batch);
                    return Err(error);
                }
            };
            metric.data_wait_seconds = waited;
            metric.seconds = waited + step_started.elapsed().as_secs_f64();
            metric.cpu_seconds = cpu_waited + own_cpu_seconds() - cpu_before;
            for packed in &batch {
                seen.picture.offer(packed);
            }
            reached.step += 1;
            let tokens = batch.iter().map(|packed| packed.batch.predictions() as u64).sum();
            reached.tokens += tokens;
            reached.tokens_kept += metric.kept;
            reached.threshold = metric.threshold;
            (metric.tokens, metric.tokens_kept) = (reached.tokens, reached.tokens_kept);
            barren = if metric.kept == 0 { barren + 1 } else { 0 };
            if barren == BARREN_STEPS {
                tracing::warn!(
                    "none of the last {BARREN_STEPS} steps had a token to learn from; look at the threshold, and at whether \
                     sequences are shorter than the reference's windows (--unequal-contexts)"
                );
            }
            self.telemetry.enter(Stage::Log);
            self.telemetry.step(&metric, tokens, self.plan.keep_ratio(reached.step));
            self.progress.step(&metric);
            self.folder.log_documents(reached.step, &batch)?;
            self.folder.log(&Metric::Step(metric))?;
            if let Some(scores) = scores {
                self.folder.log(&Metric::Scores(scores))?;
            }
            // Before the checkpoint, so that a run that goes on from there has nothing to catch up on.
            if self.is_due(reached.step) && reached.step < steps {
                self.evaluate(reached, seen)?;
            }
            if reached.step.is_multiple_of(self.plan.checkpoint_every) && reached.step < steps {
                self.checkpoint(reached, seen)?;
            }
        }
        Ok(if self.stop.load(Ordering::Relaxed) { Ending::Stopped } else { Ending::Finished })
    }

    fn checkpoint(&mut self, reached: &Reached, seen: &Seen) -> anyhow::Result<PathBuf> {
        self.telemetry.enter(Stage::Checkpoint);
        let started = Instant::now();
        let data = DataState {
            feed: self.feed.snapshot(),
            sources: seen.sources.names().to_vec(),
            picture: seen.picture.clone(),
        };
        let written = self.folder.checkpoint(self.learner, self.tokenizer, reached, &data);
        self.telemetry.checkpoint(reached.step, started.elapsed(), written.is_ok());
        written
    }

    /// Saves what was learnt before an error, and adds to the error where it is, or that it is lost.
    fn save_after(
        mut self,
        error: anyhow::Error,
        first: u64,
        reached: &Reached,
        seen: &Seen,
    ) -> anyhow::Error {
        self.progress.finish();
        let step = reached.step;
        if step == first {
            return error;
        }
        match self.checkpoint(reached, seen) {
            Ok(path) => error
                .context(format!("the run ended after step {step}, and its model is in {}", path.display())),
            Err(lost) => {
                let left = match latest_checkpoint(self.folder.path()) {
                    Ok(Some(path)) => format!("the last checkpoint is {}", path.display()),
                    _ => "there is no checkpoint".to_owned(),
                };
                error.context(format!(
                    "the run ended after step {step}; {left}, as this step's failed ({lost:#})"
                ))
            }
        }
    }

    /// The end of a run that began after step `first`.
    fn close(
        mut self,
        first: u64,
        reached: &Reached,
        seen: &Seen,
        ending: Ending,
    ) -> anyhow::Result<Outcome> {
        let Reached { step, tokens, tokens_kept, threshold, .. } = *reached;
        if step == 0 && ending != Ending::Stopped {
            let error = "the stream ended without a single document of two tokens or more";
            return Err(Failure::Data(error.to_owned()).into());
        }
        if step > 0 {
            self.evaluate(reached, seen)?;
        }
        if step > first {
            self.checkpoint(reached, seen)?;
        }
        if step > 0 {
            let objective = self.plan.objective.clone();
            let row_len = self.feed.shape().len;
            let rule = PictureRule { objective, threshold, turn: self.plan.turn(step) };
            self.telemetry.enter(Stage::Evaluate);
            let picture = seen.picture.draw(self.learner, self.tokenizer, &rule, row_len);
            self.folder.write_picture(&picture)?;
        }
        self.progress.finish();
        // A run whose last evaluation was cut short is not at its end.
        let is_missing = |set: &EvalSet| self.folder.evaluated(step, &set.name).is_none();
        let is_cut_short = self.stop.load(Ordering::Relaxed) && self.evals.iter().any(is_missing);
        let ending = if is_cut_short { Ending::Stopped } else { ending };
        Ok(Outcome { steps: step, tokens, tokens_kept, ending })
    }

    fn step(
        &mut self,
        batch: &[PackedBatch],
        reached: &mut Reached,
        sources: &mut SourceNames,
    ) -> anyhow::Result<(StepMetric, Option<ScoresMetric>)> {
        let (plan, row_len) = (&self.plan, self.feed.shape().len);
        let stepper = Stepper { learner: &mut *self.learner, plan, row_len, telemetry: &self.telemetry };
        stepper.take(reached.step + 1, batch, &mut reached.thresholds, sources)
    }

    /// Whether there is an evaluation after a step.
    fn is_due(&self, step: u64) -> bool {
        step > 0 && (step.is_multiple_of(self.plan.eval_every) || step == self.plan.schedule.steps)
    }

    /// What held-out text is read with: what the reference reads with, as far as a sequence holds it.
    fn eval_policy(&self) -> ContextPolicy {
        let len = self.feed.shape().len;
        let own = policy_of(len);
        let Some(context) = self.feed.contexts().into_values().next() else { return own };
        let smallest = 2 + usize::from(context.bos != Bos::None);
        if (smallest..=len).contains(&(context.window as usize)) {
            context
        } else if smallest <= len {
            ContextPolicy { bos: context.bos, ..own }
        } else {
            own
        }
    }

    /// Evaluates what is not evaluated yet after this step, and keeps the model where it is the best so far.
    fn evaluate(&mut self, reached: &Reached, seen: &Seen) -> anyhow::Result<()> {
        self.evaluate_all(reached)?;
        let Some(set) = &self.plan.best_by else { return Ok(()) };
        let Some(loss) = self.folder.evaluated(reached.step, set) else { return Ok(()) };
        if self.folder.best().is_some_and(|best| best.set == *set && best.loss <= loss) {
            return Ok(());
        }
        let best = Best { step: reached.step, set: set.clone(), loss };
        self.checkpoint(reached, seen)?;
        self.folder.keep_best(best)
    }

    fn evaluate_all(&mut self, reached: &Reached) -> anyhow::Result<()> {
        self.telemetry.enter(Stage::Evaluate);
        let policy = self.eval_policy();
        for (index, set) in self.evals.iter().enumerate() {
            if self.folder.evaluated(reached.step, &set.name).is_some() {
                continue;
            }
            let Some(losses) = set.token_losses(self.learner, policy, self.stop)? else { break };
            let loss = set.summary(policy, &losses);
            self.folder.log_token_losses((index, &set.name), reached.step, &losses)?;
            self.progress.say(&format!("step {}: loss {:.4} on {}", reached.step, loss.loss, loss.set));
            let metric = EvalMetric {
                step: reached.step,
                tokens: reached.tokens,
                set: loss.set,
                loss: loss.loss,
                predictions: loss.predictions,
                sure: loss.sure,
            };
            self.telemetry.evaluated(&metric);
            self.folder.log(&Metric::Eval(metric))?;
        }
        Ok(())
    }
}
