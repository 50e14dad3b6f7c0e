//! The numbers behind the page: what each run came to, and how it stands to the plain one.

use sluice_feed::select::Objective;

use crate::model::ModelConfig;
use crate::model::cost::Cost;
use crate::run::learning_curve::LearningCurve;
use crate::run::metrics::{EvalMetric, Metric, ScoresMetric, StepMetric};
use crate::run::recorded::RecordedRun;

/// Runs side by side.
pub(super) struct Comparison<'a> {
    /// In the order given.
    pub runs: Vec<RunSummary<'a>>,
    /// Names of all evaluation sets, in order of first appearance; the first is the target.
    pub sets: Vec<&'a str>,
}

/// One run in numbers.
pub(super) struct RunSummary<'a> {
    pub run: &'a RecordedRun,
    pub steps: Vec<&'a StepMetric>,
    evals: Vec<&'a EvalMetric>,
    pub scores: Vec<&'a ScoresMetric>,
    /// Tokens needed to reach the end of the plain run's curve on the target set, over the tokens the plain run took to it.
    pub tokens_to_plain: Option<f64>,
    /// The same in floating point operations, with a forward pass of the reference over all that was seen, where the run looks at
    /// its losses; absent without the reference's shape.
    pub compute_to_plain: Option<f64>,
}

impl<'a> Comparison<'a> {
    pub fn of(runs: &'a [RecordedRun], scored_by: Option<&ModelConfig>) -> Self {
        let mut summaries: Vec<RunSummary<'a>> = runs.iter().map(RunSummary::of).collect();
        let mut sets = Vec::new();
        for eval in summaries.iter().flat_map(|run| &run.evals) {
            if !sets.contains(&eval.set.as_str()) {
                sets.push(eval.set.as_str());
            }
        }
        let mut comparison = Self { runs: vec![], sets };
        if let Some(&target) = comparison.sets.first() {
            let plain = summaries.iter().find(|run| run.is_plain());
            if let Some((plain, plain_flops)) =
                plain.map(|run| (LearningCurve::of(run.evals(target)), run.flops_per_token(scored_by)))
            {
                for run in summaries.iter_mut().filter(|run| !run.is_plain()) {
                    run.tokens_to_plain = LearningCurve::of(run.evals(target)).tokens_to_end_of(&plain);
                    let flops = run.flops_per_token(scored_by).zip(plain_flops);
                    run.compute_to_plain =
                        run.tokens_to_plain.zip(flops).map(|(tokens, (own, plain))| tokens * own / plain);
                }
            }
        }
        comparison.runs = summaries;
        comparison
    }

    /// The first run that learns from every token of the stream.
    pub fn plain(&self) -> Option<&RunSummary<'a>> {
        self.runs.iter().find(|run| run.is_plain())
    }

    /// Whether the compute of some run can be told.
    pub fn knows_compute(&self) -> bool {
        self.runs.iter().any(|run| run.compute_to_plain.is_some())
    }

    /// Runs that leave tokens out.
    pub fn selecting(&self) -> impl Iterator<Item = (usize, &RunSummary<'a>)> {
        self.runs.iter().enumerate().filter(|(_, run)| run.run.record.objective != Objective::Clm)
    }
}

impl<'a> RunSummary<'a> {
    fn of(run: &'a RecordedRun) -> Self {
        let mut steps = Vec::new();
        let mut evals = Vec::new();
        let mut scores = Vec::new();
        for metric in &run.metrics {
            match metric {
                Metric::Step(step) => steps.push(step),
                Metric::Eval(eval) => evals.push(eval),
                Metric::Scores(metric) => scores.push(metric),
            }
        }
        Self { run, steps, evals, scores, tokens_to_plain: None, compute_to_plain: None }
    }

    pub fn name(&self) -> &'a str {
        &self.run.name
    }

    pub fn is_plain(&self) -> bool {
        self.run.record.objective == Objective::Clm && self.run.record.command == "run"
    }

    /// Evaluations on one set, in order.
    pub fn evals(&self, set: &str) -> impl Iterator<Item = &'a EvalMetric> {
        self.evals.iter().copied().filter(move |eval| eval.set == set)
    }

    pub fn final_loss(&self, set: &str) -> Option<f64> {
        self.evals(set).last().map(|eval| eval.loss)
    }

    pub fn best_loss(&self, set: &str) -> Option<f64> {
        self.evals(set).map(|eval| eval.loss).min_by(f64::total_cmp)
    }

    /// Predictions seen.
    pub fn tokens(&self) -> u64 {
        self.steps.last().map_or(0, |step| step.tokens)
    }

    /// Predictions learnt from.
    pub fn tokens_kept(&self) -> u64 {
        self.steps.last().map_or(0, |step| step.tokens_kept)
    }

    /// Floating point operations for each token seen, scoring included, where the shape of the reference is known.
    fn flops_per_token(&self, scored_by: Option<&ModelConfig>) -> Option<f64> {
        let record = &self.run.record;
        let config: ModelConfig = serde_json::from_value(record.settings.get("model")?.clone()).ok()?;
        let of_step = record.batch_size * record.accumulate * record.sequence_length;
        let positions = (self.steps.len() * of_step) as u64;
        let training = Cost::of(&config, record.sequence_length).training(
            positions,
            self.tokens(),
            self.tokens_kept(),
            record.backward(),
        );
        let is_scored =
            record.objective.selection().is_some_and(|selection| selection.score.looks_at_reference());
        // What was read twice was scored twice.
        let scoring =
            if is_scored { Cost::of(scored_by?, record.sequence_length).scoring(positions) } else { 0.0 };
        (self.tokens() > 0).then(|| (training + scoring) / self.tokens() as f64)
    }

    /// Wall time of all steps, without evaluations.
    pub fn seconds(&self) -> f64 {
        self.steps.iter().map(|step| step.seconds).sum()
    }
}
