//! What the runs came to: numbers out of their folders, compared with the plain run of the same seed.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use sluice_trainer::model::cost::Cost;
use sluice_trainer::run::learning_curve::LearningCurve;
use sluice_trainer::run::metrics::EvalMetric;
use sluice_trainer::run::recorded::RecordedRun;

use super::parts::{base_folder, reference_folder};
use super::plan::{BATCH_SIZE, Group, Kind, Plan, SEQUENCE_LENGTH, Setting, Student};
use super::stages::{TARGET, read_scoring};

/// Everything that is written down.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Results {
    /// The command that made it.
    pub command: String,
    /// Whether somebody has written down beside it what it says.
    #[serde(skip)]
    pub has_findings: bool,
    /// Processor cores of the machine.
    pub cores: usize,
    /// What was done.
    pub plan: Plan,
    /// By setting, what was done before its students.
    pub settings: BTreeMap<&'static str, SettingResults>,
    /// The students.
    pub groups: Vec<GroupResults>,
}

/// A setting's reference, and scoring with it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SettingResults {
    /// Training of the reference; of the base model too, where there is one, which plain training begins with as well.
    pub reference: Effort,
    /// Loss of the reference on held-out mathematics at its end, nats.
    pub reference_loss: f64,
    /// The base model.
    pub base: Option<Effort>,
    /// Scoring of the corpus.
    pub scoring: Effort,
    /// Tokens that went through the reference: windows of a long document overlap.
    pub scoring_model_tokens: u64,
}

/// What something took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Effort {
    /// Tokens: predictions of a run, tokens of scored documents.
    pub tokens: u64,
    /// Floating point operations, from the shapes.
    pub flops: f64,
    /// Wall time.
    pub seconds: f64,
    /// CPU time.
    pub cpu_seconds: f64,
}

/// Students of one size on one stream.
#[derive(Clone, Debug, Serialize)]
pub(super) struct GroupResults {
    /// What they train on.
    pub setting: Setting,
    /// Their size.
    pub size: &'static str,
    /// Weights, embeddings included.
    pub parameters: usize,
    /// What each kind came to over the seeds.
    pub rows: Vec<Row>,
    /// Tokens that a plain run takes to the end of another seed's plain run, over that run's own, for every pair: what of a
    /// ratio is chance.
    pub null: Null,
    /// Each run.
    pub runs: Vec<RunResults>,
}

/// Plain training measured against plain training.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Null {
    /// Of the pairs that reached the other's end.
    pub tokens_ratio: Option<Stat>,
    /// All pairs.
    pub pairs: usize,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RunResults {
    /// What it learnt from.
    pub kind: String,
    /// Its seed.
    pub seed: u64,
    /// Training.
    pub effort: Effort,
    /// Tokens that it learnt from.
    pub tokens_kept: u64,
    /// Losses on each evaluation set.
    pub curve: Vec<EvalMetric>,
    /// Training loss of unselected tokens over the last quarter of the steps, nats.
    pub unselected_loss: Option<f64>,
    /// What it took to come down to the end of the plain run's curve of its seed ([`LearningCurve`]), over what the plain run
    /// took; absent where it never did.
    pub to_plain: Option<Ratios>,
}

/// Shares of the plain run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Ratios {
    /// Tokens.
    pub tokens: f64,
    /// Floating point operations without scoring.
    pub flops: f64,
    /// And with the scoring of as many tokens.
    pub flops_with_scoring: f64,
    /// CPU time without scoring.
    pub cpu: f64,
    /// And with it.
    pub cpu_with_scoring: f64,
    /// Wall time without scoring.
    pub wall: f64,
    /// And with it.
    pub wall_with_scoring: f64,
}

/// A mean over seeds, and the standard deviation of a sample; absent without a value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Stat {
    pub mean: f64,
    /// Absent of one value.
    pub deviation: Option<f64>,
    pub values: usize,
}

/// One kind of student, over the seeds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub kind: String,
    /// Share asked for, if it is `slm`.
    pub slm_keep: Option<f64>,
    /// Whether it chooses by scores.
    pub is_scored: bool,
    /// Share of the tokens that were kept.
    pub kept: Option<Stat>,
    pub runs: usize,
    /// Final loss by evaluation set, nats.
    pub losses: BTreeMap<String, Stat>,
    /// Final loss on held-out mathematics less that of the plain run of the same seed, nats.
    pub difference: Option<Stat>,
    /// Share of held-out answers of which it is sure at the end.
    pub sure: Option<Stat>,
    pub unselected_loss: Option<Stat>,
    pub tokens_ratio: Option<Stat>,
    pub flops_ratio: Option<Stat>,
    pub flops_ratio_with_scoring: Option<Stat>,
    pub cpu_ratio: Option<Stat>,
    pub cpu_ratio_with_scoring: Option<Stat>,
    pub wall_ratio: Option<Stat>,
    pub wall_ratio_with_scoring: Option<Stat>,
}

impl Results {
    /// Reads the folders of a finished experiment.
    pub fn read(plan: &Plan, out: &Path, command: &str) -> Result<Self> {
        let reference = Cost::of(&plan.reference.config(plan.vocabulary), SEQUENCE_LENGTH);
        let mut settings = BTreeMap::new();
        for setting in plan.settings() {
            let scoring = read_scoring(out, setting)?;
            let run = RecordedRun::read(&out.join(reference_folder(setting)))?;
            let base = if setting.has_base() {
                Some(effort(&RecordedRun::read(&out.join(base_folder()))?, reference))
            } else {
                None
            };
            settings.insert(
                setting.name(),
                SettingResults {
                    reference: effort(&run, reference),
                    reference_loss: run.evals(TARGET).last().context("the reference was not evaluated")?.loss,
                    base,
                    scoring: Effort {
                        tokens: scoring.tokens,
                        flops: reference.scoring(scoring.model_tokens),
                        seconds: scoring.seconds,
                        cpu_seconds: scoring.cpu_seconds,
                    },
                    scoring_model_tokens: scoring.model_tokens,
                },
            );
        }
        let students = plan.students();
        let mut groups = Vec::new();
        for group in &plan.groups {
            let scoring = settings[group.setting.name()].scoring;
            let students = students.iter().filter(|student| student.group == *group);
            groups.push(read_group(plan, out, group, students.collect(), scoring)?);
        }
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self {
            command: command.to_owned(),
            has_findings: false,
            cores,
            plan: plan.clone(),
            settings,
            groups,
        })
    }
}

fn read_group(
    plan: &Plan,
    out: &Path,
    group: &Group,
    students: Vec<&Student>,
    scoring: Effort,
) -> Result<GroupResults> {
    let config = group.size.config(plan.vocabulary);
    let cost = Cost::of(&config, SEQUENCE_LENGTH);
    let mut recorded = Vec::new();
    for student in students {
        recorded.push((student, RecordedRun::read(&out.join(student.folder()))?));
    }
    let mut runs = Vec::new();
    for (student, run) in &recorded {
        let plain = recorded
            .iter()
            .find(|(other, _)| other.kind == Kind::Plain && other.seed == student.seed)
            .map(|(_, run)| run)
            .context("every seed has a plain run")?;
        let goal = LearningCurve::of(plain.evals(TARGET));
        let end = goal.end().context("the plain run was not evaluated")?;
        let plain_effort = effort(plain, cost);
        let effort = effort(run, cost);
        // Neither control looks at a score.
        let scoring = if student.kind.is_scored() { scoring } else { Effort::default() };
        let to_plain = LearningCurve::of(run.evals(TARGET))
            .tokens_to(end.loss)
            .map(|tokens| Ratios::of((tokens, effort), (end.tokens, plain_effort), scoring));
        runs.push(RunResults {
            kind: student.kind.name(),
            seed: student.seed,
            effort,
            tokens_kept: run.steps().last().map_or(0, |step| step.tokens_kept),
            curve: run.all_evals().cloned().collect(),
            unselected_loss: last_quarter(run),
            to_plain,
        });
    }
    let plains: Vec<LearningCurve> = recorded
        .iter()
        .filter(|(student, _)| student.kind == Kind::Plain)
        .map(|(_, run)| LearningCurve::of(run.evals(TARGET)))
        .collect();
    let null = null(&plains);
    let rows = group.kinds.iter().map(|kind| Row::of(*kind, &runs)).collect();
    Ok(GroupResults {
        setting: group.setting,
        size: group.size.name,
        parameters: config.parameters(),
        rows,
        null,
        runs,
    })
}

/// Each plain run against the end of every other.
fn null(plains: &[LearningCurve]) -> Null {
    let pairs = || {
        let others = |index: usize| plains.iter().enumerate().filter(move |(other, _)| *other != index);
        plains
            .iter()
            .enumerate()
            .flat_map(move |(index, run)| others(index).map(move |(_, other)| (run, other)))
    };
    Null {
        tokens_ratio: stat(pairs().filter_map(|(run, other)| run.tokens_to_end_of(other))),
        pairs: pairs().count(),
    }
}

impl Ratios {
    /// What a run takes to so many tokens, over what the plain run takes to so many of its own.
    fn of((tokens, run): (f64, Effort), (plain_tokens, plain): (f64, Effort), scoring: Effort) -> Self {
        let share = tokens / run.tokens as f64;
        let plain_share = plain_tokens / plain.tokens as f64;
        let scored = if scoring.tokens == 0 { 0.0 } else { tokens / scoring.tokens as f64 };
        let ratio = |of: fn(Effort) -> f64, scored: f64| {
            (of(run) * share + of(scoring) * scored) / (of(plain) * plain_share)
        };
        Self {
            tokens: tokens / plain_tokens,
            flops: ratio(|effort| effort.flops, 0.0),
            flops_with_scoring: ratio(|effort| effort.flops, scored),
            cpu: ratio(|effort| effort.cpu_seconds, 0.0),
            cpu_with_scoring: ratio(|effort| effort.cpu_seconds, scored),
            wall: ratio(|effort| effort.seconds, 0.0),
            wall_with_scoring: ratio(|effort| effort.seconds, scored),
        }
    }
}

impl Row {
    fn of(kind: Kind, all: &[RunResults]) -> Self {
        let name = kind.name();
        let runs: Vec<&RunResults> = all.iter().filter(|run| run.kind == name).collect();
        let ratio =
            |value: fn(&Ratios) -> f64| stat(runs.iter().filter_map(|run| run.to_plain.as_ref()).map(value));
        let last = |run: &RunResults, set: &str| run.curve.iter().rfind(|eval| eval.set == set).cloned();
        let mut losses = BTreeMap::new();
        for eval in runs.iter().flat_map(|run| &run.curve) {
            if !losses.contains_key(&eval.set) {
                let finals = runs.iter().filter_map(|run| Some(last(run, &eval.set)?.loss));
                losses.extend(stat(finals).map(|stat| (eval.set.clone(), stat)));
            }
        }
        let differences = runs.iter().filter_map(|run| {
            let plain = all.iter().find(|other| other.kind == "plain" && other.seed == run.seed)?;
            Some(last(run, TARGET)?.loss - last(plain, TARGET)?.loss)
        });
        Self {
            kind: name.clone(),
            slm_keep: if let Kind::Slm(keep) = kind { Some(keep) } else { None },
            is_scored: kind.is_scored(),
            kept: stat(runs.iter().map(|run| run.tokens_kept as f64 / run.effort.tokens as f64)),
            runs: runs.len(),
            losses,
            difference: stat(differences),
            sure: stat(runs.iter().filter_map(|run| last(run, "answers")?.sure)),
            unselected_loss: stat(runs.iter().filter_map(|run| run.unselected_loss)),
            tokens_ratio: ratio(|ratios| ratios.tokens),
            flops_ratio: ratio(|ratios| ratios.flops),
            flops_ratio_with_scoring: ratio(|ratios| ratios.flops_with_scoring),
            cpu_ratio: ratio(|ratios| ratios.cpu),
            cpu_ratio_with_scoring: ratio(|ratios| ratios.cpu_with_scoring),
            wall_ratio: ratio(|ratios| ratios.wall),
            wall_ratio_with_scoring: ratio(|ratios| ratios.wall_with_scoring),
        }
    }
}

/// What a run took, by its metrics and the shape of its model.
fn effort(run: &RecordedRun, cost: Cost) -> Effort {
    let steps = run.steps().count() as u64;
    let (tokens, kept) = run.steps().last().map_or((0, 0), |step| (step.tokens, step.tokens_kept));
    let positions = steps * (BATCH_SIZE * SEQUENCE_LENGTH) as u64;
    Effort {
        tokens,
        flops: cost.training(positions, tokens, kept, run.record.backward()),
        seconds: run.steps().map(|step| step.seconds).sum(),
        cpu_seconds: run.steps().map(|step| step.cpu_seconds).sum(),
    }
}

fn last_quarter(run: &RecordedRun) -> Option<f64> {
    let steps: Vec<_> = run.steps().collect();
    let last = &steps[steps.len() - steps.len().div_ceil(4)..];
    stat(last.iter().filter_map(|step| step.loss_unselected)).map(|stat| stat.mean)
}

/// Mean and spread of what there is.
pub(super) fn stat(values: impl Iterator<Item = f64>) -> Option<Stat> {
    let values: Vec<f64> = values.collect();
    let count = values.len() as f64;
    if values.is_empty() {
        return None;
    }
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt());
    Some(Stat { mean, deviation, values: values.len() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::{Effort, Ratios, stat};

    #[test]
    fn spread_is_that_of_a_sample() {
        let stat3 = stat([1.0, 2.0, 6.0].into_iter()).unwrap();
        // Mean 3, squares 4 + 1 + 9 = 14, over 2.
        assert!((stat3.mean - 3.0).abs() < 1e-12 && (stat3.deviation.unwrap() - 7f64.sqrt()).abs() < 1e-12);
        assert_eq!(stat([5.0].into_iter()).unwrap().deviation, None);
        assert_eq!(stat(std::iter::empty()), None);
    }

    #[test]
    fn scoring_is_counted_for_the_tokens_that_were_needed() {
        let effort =
            |tokens, flops, cpu_seconds| Effort { tokens, flops, seconds: 2.0 * cpu_seconds, cpu_seconds };
        // Half of the run's 100 tokens; scoring cost 1 FLOP and 0.1 s a token.
        let ratios = Ratios::of(
            (50.0, effort(100, 80.0, 40.0)),
            (100.0, effort(100, 100.0, 50.0)),
            effort(200, 200.0, 20.0),
        );
        let expected = [0.5, 0.4, 0.9, 0.4, 0.5, 0.4, 0.5];
        let Ratios { tokens, flops, flops_with_scoring, cpu, cpu_with_scoring, wall, wall_with_scoring } =
            ratios;
        let found = [tokens, flops, flops_with_scoring, cpu, cpu_with_scoring, wall, wall_with_scoring];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{ratios:?}");
        }
    }
}
