//! How long an experiment will take: a few steps of each size are timed before it begins, and the times of finished runs
//! correct the estimate.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::random::SplitMix64;
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig};
use sluice_trainer::training::learner::Learner;

use super::group::{BATCH_SIZE, SEQUENCE_LENGTH, Size};
use super::plan::{Plan, Student};

/// Steps that are timed of each size, after one that is not.
const TIMED_STEPS: usize = 3;
/// Start of a program, reading the topic, and the checkpoints.
const RUN_SECONDS: f64 = 3.0;
/// What corpus, tokenizer, scoring, the controls' texts and results take beside the models, for all streams together.
const REST_SECONDS: f64 = 150.0;

/// Seconds of a step and of an evaluation, by size.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    costs: BTreeMap<&'static str, (f64, f64)>,
    estimated: f64,
    taken: f64,
}

impl Budget {
    /// Times a few steps of each size on this machine, as it is now. `predictions` are those of an evaluation.
    pub fn measure(plan: &Plan, predictions: u64) -> Result<Self> {
        let mut costs = BTreeMap::new();
        for size in plan.sizes() {
            costs.insert(size.name, time(plan.config(size), predictions)?);
        }
        Ok(Self { costs, estimated: 0.0, taken: 0.0 })
    }

    fn seconds(&self, size: Size, steps: u64, eval_every: u64) -> f64 {
        let (step, evaluation) = self.costs.get(size.name).copied().unwrap_or_default();
        let evaluations = 1 + steps.div_ceil(eval_every);
        RUN_SECONDS + steps as f64 * step + evaluations as f64 * evaluation
    }

    fn of(&self, student: &Student) -> f64 {
        let group = &student.group;
        self.seconds(group.size, group.steps, group.eval_every)
    }

    /// Says how long it will take.
    pub fn say_start(&self, plan: &Plan, todo: &[&Student]) {
        for (size, (step, evaluation)) in &self.costs {
            super::stages::say(&format!(
                "a step of {size} takes {step:.2} s here now, an evaluation {evaluation:.1} s"
            ));
        }
        let students: f64 = todo.iter().map(|student| self.of(student)).sum();
        let steps = plan.basis.base_steps;
        let bases: f64 = plan.bases().into_iter().map(|size| self.seconds(size, steps, steps)).sum();
        // A reference takes at most as many steps as a base model.
        let references = plan.streams().into_iter().filter(|stream| !stream.setting.is_of_map());
        let references: f64 = references
            .map(|stream| self.seconds(plan.reference_size(stream), steps, plan.eval_every(stream)))
            .sum();
        let is_new = todo.len() == plan.students().len();
        let rest = if is_new { bases + references + REST_SECONDS } else { REST_SECONDS };
        super::stages::say(&format!("{} runs to go, about {} in all", todo.len(), minutes(students + rest)));
    }

    /// Time that these runs will take, in words.
    pub fn left(&self, todo: &[&Student]) -> String {
        let estimate: f64 = todo.iter().map(|student| self.of(student)).sum();
        let correction = if self.estimated > 0.0 { self.taken / self.estimated } else { 1.0 };
        format!("about {} left", minutes(estimate * correction))
    }

    /// Notes what a run took.
    pub fn took(&mut self, student: &Student, seconds: f64) {
        self.estimated += self.of(student);
        self.taken += seconds;
    }
}

fn minutes(seconds: f64) -> String {
    let minutes = (seconds / 60.0).ceil() as u64;
    if minutes < 60 {
        format!("{minutes} min")
    } else {
        format!("{} h {:02} min", minutes / 60, minutes % 60)
    }
}

/// Seconds of a step that keeps every token, and of an evaluation.
fn time(config: ModelConfig, predictions: u64) -> Result<(f64, f64)> {
    let vocabulary = config.vocab_size;
    let mut learner = BurnLearner::new(config, AdamWConfig::default(), 1)?;
    let batch = random_batch(vocabulary);
    let all: Vec<u32> =
        (0..).zip(&batch.targets).filter(|&(_, &target)| target != NO_TARGET).map(|(at, _)| at).collect();
    let mut steps = Vec::new();
    for _ in 0..=TIMED_STEPS {
        let started = Instant::now();
        learner.step(&batch, 1e-3, &mut |_| all.clone());
        steps.push(started.elapsed().as_secs_f64());
    }
    let started = Instant::now();
    learner.losses(&batch);
    let forward = started.elapsed().as_secs_f64();
    let mut timed = steps.split_off(1);
    timed.sort_by(f64::total_cmp);
    Ok((timed[TIMED_STEPS / 2], forward * predictions as f64 / all.len() as f64))
}

fn random_batch(vocabulary: usize) -> Batch {
    let mut random = SplitMix64::keyed(1, 0);
    let positions = BATCH_SIZE * SEQUENCE_LENGTH;
    let tokens: Vec<u32> = (0..positions).map(|_| random.below(vocabulary) as u32).collect();
    let mut targets: Vec<u32> = tokens[1..].to_vec();
    targets.push(NO_TARGET);
    for row in targets.chunks_mut(SEQUENCE_LENGTH) {
        row[SEQUENCE_LENGTH - 1] = NO_TARGET;
    }
    Batch {
        rows: BATCH_SIZE,
        len: SEQUENCE_LENGTH,
        tokens,
        targets,
        segments: vec![1; positions],
        positions: (0..positions).map(|index| (index % SEQUENCE_LENGTH) as u32).collect(),
        reference: vec![f32::NAN; positions],
        reference_entropy: vec![f32::NAN; positions],
        attribute: vec![f32::NAN; positions],
    }
}
