//! The training loop: micro-batches in, the current losses to a selection, a step, and the books.

mod books;
pub mod evaluate;
pub mod learner;
pub mod schedule;
pub mod setup;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::bail;
use serde::Serialize;
use sluice_feed::batch::PackedBatch;
use sluice_feed::feed::{Alone, Feed, Step};
use sluice_feed::select::{Choice, KeepRatio, Needs, Objective, Score, Signals, Turn};
use sluice_feed::sources::SourceNames;

use crate::failure::Failure;
use crate::run::checkpoints::{DataState, Reached, latest_checkpoint};
use crate::run::folder::RunFolder;
use crate::run::metrics::{EvalMetric, Metric, ScoresMetric, StepMetric};
use crate::run::picture::{PictureDocuments, PictureRule};
use crate::run::record::RunRecord;
use crate::text::TextTokenizer;
use crate::watch::process::own_cpu_seconds;
use crate::watch::progress::Progress;
use crate::watch::telemetry::{Refused, Stage, Telemetry};
use books::Books;
use evaluate::EvalSet;
use learner::{Learner, Measured, StepOutcome};
use schedule::Schedule;

/// What a run does with its micro-batches.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is minimised.
    pub objective: Objective,
    /// Learning rates, and the most steps to take.
    pub schedule: Schedule,
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
                self.evaluate(reached)?;
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
            batch.iter().for_each(|packed| seen.picture.offer(packed));
            reached.step += 1;
            let tokens = batch.iter().map(|packed| packed.batch.predictions() as u64).sum();
            reached.tokens += tokens;
            reached.tokens_kept += metric.kept;
            reached.threshold = metric.threshold;
            (metric.tokens, metric.tokens_kept) = (reached.tokens, reached.tokens_kept);
            self.telemetry.enter(Stage::Log);
            self.telemetry.step(&metric, tokens, self.keep_ratio(reached.step));
            self.progress.step(&metric);
            self.folder.log_documents(reached.step, &batch)?;
            self.folder.log(&Metric::Step(metric))?;
            if let Some(scores) = scores {
                self.folder.log(&Metric::Scores(scores))?;
            }
            // Before the checkpoint, so that a run that goes on from there has nothing to catch up on.
            if reached.step.is_multiple_of(self.plan.eval_every) && reached.step < steps {
                self.evaluate(reached)?;
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

    /// The share of tokens that a step is to keep; `None` where a threshold decides.
    fn keep_ratio(&self, step: u64) -> Option<f64> {
        let Plan { objective, schedule, .. } = &self.plan;
        match objective.selection() {
            None => Some(KeepRatio::ALL.get()),
            Some(selection) => selection.keep_at(step, schedule.steps).map(KeepRatio::get),
        }
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
        let Plan { schedule, eval_every, .. } = self.plan;
        if step > first {
            let is_evaluated = step.is_multiple_of(eval_every) && step < schedule.steps;
            if !is_evaluated {
                self.evaluate(reached)?;
            }
            self.checkpoint(reached, seen)?;
        }
        if step > 0 {
            let objective = self.plan.objective.clone();
            let row_len = self.feed.shape().len;
            let rule = PictureRule { objective, threshold, turn: self.turn(step) };
            self.telemetry.enter(Stage::Evaluate);
            let picture = seen.picture.draw(self.learner, self.tokenizer, &rule, row_len);
            self.folder.write_picture(&picture)?;
        }
        self.progress.finish();
        Ok(Outcome { steps: step, tokens, tokens_kept, ending })
    }

    fn turn(&self, step: u64) -> Turn {
        Turn { seed: self.plan.seed, step, steps: self.plan.schedule.steps, micro_batch: 0 }
    }

    /// One optimizer step. Where micro-batches compete with one another, each runs forward once more, after the
    /// losses of all have decided.
    fn step(
        &mut self,
        batch: &[PackedBatch],
        reached: &mut Reached,
        sources: &mut SourceNames,
    ) -> anyhow::Result<(StepMetric, Option<ScoresMetric>)> {
        let step = reached.step + 1;
        let thresholds = &mut reached.thresholds;
        let turn = self.turn(step);
        let Plan { objective, schedule, .. } = &self.plan;
        let row_len = self.feed.shape().len;
        let mut needs = objective.needs();
        let mut books = Books::new(objective);
        if self.counts_scores(step) {
            books = books.counting_scores();
        }
        let mut decided = None;
        if batch.len() > 1 && objective.needs_whole_batch(step) {
            self.telemetry.enter(Stage::Forward);
            let measured: Vec<Measured> =
                batch.iter().map(|packed| self.learner.measure(&packed.batch, needs)).collect();
            let signals: Vec<Signals<'_>> = measured
                .iter()
                .zip(batch)
                .map(|(measured, packed)| measured.signals(&packed.batch))
                .collect();
            self.telemetry.enter(Stage::Select);
            decided = Some(objective.select(&signals, row_len, turn, thresholds).into_iter());
            needs = Needs::default();
        }
        let telemetry = &self.telemetry;
        for (micro_batch, packed) in (0..).zip(batch) {
            telemetry.enter(Stage::Forward);
            self.learner.accumulate(&packed.batch, needs, &mut |measured| {
                telemetry.enter(Stage::Select);
                let choice = if let Some(choices) = &mut decided {
                    choices.next()
                } else {
                    let turn = Turn { micro_batch, ..turn };
                    objective.select(&[measured.signals(&packed.batch)], row_len, turn, thresholds).pop()
                };
                let choice: Choice = choice.unwrap_or_default();
                books.add(packed, &measured.losses, &choice, sources);
                telemetry.enter(Stage::Backward);
                choice.kept
            });
        }
        telemetry.enter(Stage::Optimizer);
        let learning_rate = schedule.at(step);
        let StepOutcome { kept_loss, kept, gradient_norm } = self.learner.update(learning_rate);
        if kept == 0 && !(objective.may_keep_nothing() && books.has_scored()) {
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

    /// Whether a step's scores are written down: at the first step, at every evaluation and at the last.
    fn counts_scores(&self, step: u64) -> bool {
        let Plan { objective, schedule, eval_every, .. } = &self.plan;
        let is_scored = objective.selection().is_some_and(|selection| selection.score != Score::Random);
        is_scored && (step == 1 || step == schedule.steps || step.is_multiple_of(*eval_every))
    }

    fn evaluate(&mut self, reached: &Reached) -> anyhow::Result<()> {
        self.telemetry.enter(Stage::Evaluate);
        for (index, set) in self.evals.iter().enumerate() {
            let Some(losses) = set.token_losses(self.learner, self.stop) else { break };
            let loss = set.summary(&losses);
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
