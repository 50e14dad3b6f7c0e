//! What the runs came to: numbers out of their folders, and each kind of student against plain training.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use sluice_trainer::model::cost::Cost;
use sluice_trainer::run::checkpoints::Best;
use sluice_trainer::run::recorded::RecordedRun;

use super::arms::{Effort, Ratios, Sample};
use super::bootstrap::{self, Estimates};
use super::designs::{Experiment, KEEP};
use super::group::{Group, SEQUENCE_LENGTH};
use super::kind::Kind;
use super::parts::{base_folder, reference_folder};
use super::plan::{Plan, Student, TARGET};
use super::reference::{Reference, Stream};
use super::rows::{Chosen, Row};
use super::setting::Setting;
use super::stages::{read_prepared, read_scoring, read_templates};
use super::templates::{Half, Template, Templates};
use super::texts::{Prepared, Text};
use super::tokens;
use super::tried::{RunResults, Tried, best_rates};

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
    /// How intervals were made.
    pub bootstrap: Bootstrap,
    /// The held-out problems.
    pub templates: Vec<Template>,
    /// By stream, what was done before its students.
    pub streams: BTreeMap<String, StreamResults>,
    /// The students.
    pub groups: Vec<GroupResults>,
}

/// How intervals were made: [`bootstrap`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Bootstrap {
    pub seed: u64,
    pub draws: usize,
    pub coverage: f64,
}

/// A stream's reference, and scoring with it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct StreamResults {
    /// Training of the reference; of the base model too, where there is one, which plain training begins with as well.
    pub reference: Effort,
    /// Loss on held-out mathematics of the checkpoint that scores, nats.
    pub reference_loss: f64,
    /// The step that it is of: the best on the half of the templates that chooses, or the last.
    pub reference_step: u64,
    /// Loss on held-out mathematics of the base model that the reference begins with, nats.
    pub base_loss: Option<f64>,
    /// The base model.
    pub base: Option<Effort>,
    /// Scoring of the corpus.
    pub scoring: Effort,
    /// Tokens that went through the reference: windows of a long document overlap.
    pub scoring_model_tokens: u64,
    /// The texts of the controls, by their names.
    pub texts: BTreeMap<String, Text>,
    /// Scoring of the corpus with the reference and with the base model, to choose whole documents.
    pub document_scoring: Option<Effort>,
}

/// Students of one size on one stream.
#[derive(Clone, Debug, Serialize)]
pub(super) struct GroupResults {
    /// What they train on.
    pub setting: Setting,
    /// Who scores it.
    pub reference: Reference,
    /// The name of both together.
    pub stream: String,
    /// Their size.
    pub size: &'static str,
    /// Weights, embeddings included.
    pub parameters: usize,
    /// What each kind came to over the seeds, at its best learning rate; the reference's run last.
    pub rows: Vec<Row>,
    /// Plain training against itself with other seeds: what of a ratio is chance.
    pub null: Estimates,
    /// The rules that the choosing half of the templates chooses.
    pub chosen: Chosen,
    /// Each run.
    pub runs: Vec<RunResults>,
}

impl Results {
    /// Whether a group has several shares of one kind, to draw a line through.
    pub fn has_shares(&self) -> bool {
        let shares = |group: &GroupResults| group.rows.iter().filter(|row| row.slm_keep.is_some()).count();
        self.groups.iter().any(|group| shares(group) > 1)
    }

    /// Reads the folders of a finished experiment.
    pub fn read(plan: &Plan, out: &Path, command: &str) -> Result<Self> {
        let templates = read_templates(out)?;
        let mut streams = BTreeMap::new();
        for stream in plan.streams() {
            streams.insert(stream.name(), read_stream(plan, out, stream)?);
        }
        let mut groups = Vec::new();
        for group in &plan.groups {
            groups.push(read_group(plan, out, group, &streams[&group.stream.name()], &templates)?);
        }
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let bootstrap =
            Bootstrap { seed: bootstrap::SEED, draws: bootstrap::DRAWS, coverage: bootstrap::COVERAGE };
        Ok(Self {
            command: command.to_owned(),
            has_findings: false,
            cores,
            plan: plan.clone(),
            bootstrap,
            templates: templates.list,
            streams,
            groups,
        })
    }
}

fn read_stream(plan: &Plan, out: &Path, stream: Stream) -> Result<StreamResults> {
    let size = plan.reference_size(stream);
    let cost = Cost::of(&plan.config(size), SEQUENCE_LENGTH);
    let scoring = read_scoring(out, stream)?;
    let folder = out.join(reference_folder(stream, size));
    let run = RecordedRun::read(&folder)?;
    let served = if stream.reference.is_best() {
        let best = Best::read(&folder)?.context("the reference kept no best checkpoint")?;
        run.evals(TARGET).find(|eval| eval.step == best.step)
    } else {
        run.evals(TARGET).last()
    };
    let served = served.context("the reference was not evaluated where it is used")?.clone();
    let is_trained = stream.setting.has_base() && plan.basis.pretrained.is_none();
    let base = if is_trained { Some(RecordedRun::read(&out.join(base_folder(size)))?) } else { None };
    let before = match &base {
        Some(base) => base.evals(TARGET).last(),
        None => run.evals(TARGET).find(|eval| eval.step == 0 && stream.setting.has_base()),
    };
    let flops = cost.scoring(scoring.model_tokens);
    let prepared = if plan.has_own_texts(stream) { Some(read_prepared(out, stream.setting)?) } else { None };
    let document_scoring = prepared.as_ref().map(|Prepared { scoring_seconds: (seconds, cpu), .. }| Effort {
        tokens: scoring.tokens,
        // Two models of one shape read the same windows.
        flops: 2.0 * flops,
        seconds: *seconds,
        cpu_seconds: *cpu,
    });
    Ok(StreamResults {
        reference: Effort::of(&run, cost),
        reference_loss: served.loss,
        reference_step: served.step,
        base_loss: before.map(|eval| eval.loss),
        base: base.map(|base| Effort::of(&base, cost)),
        scoring: Effort {
            tokens: scoring.tokens,
            flops,
            seconds: scoring.seconds,
            cpu_seconds: scoring.cpu_seconds,
        },
        scoring_model_tokens: scoring.model_tokens,
        texts: prepared.map(|prepared| prepared.texts).unwrap_or_default(),
        document_scoring,
    })
}

impl StreamResults {
    /// The scoring that a kind of student needs before it can read its text; its tokens are those of that text.
    fn scoring_of(&self, kind: Kind) -> Effort {
        match kind {
            kind if kind.is_scored() => self.scoring,
            // All of the stream is scored, and a part of it is read.
            Kind::Documents(_) => self.document_scoring.map_or(Effort::default(), |scoring| Effort {
                tokens: self.texts.get(&kind.name()).map_or(scoring.tokens, |text| text.tokens),
                ..scoring
            }),
            _ => Effort::default(),
        }
    }
}

fn read_group(
    plan: &Plan,
    out: &Path,
    group: &Group,
    stream: &StreamResults,
    templates: &Templates,
) -> Result<GroupResults> {
    let config = plan.config(group.size);
    let cost = Cost::of(&config, SEQUENCE_LENGTH);
    let reference_size = plan.reference_size(group.stream);
    let reference_folder = out.join(reference_folder(group.stream, reference_size));
    let reference = RecordedRun::read(&reference_folder)?;
    let selected = if plan.experiment == Experiment::Tokens {
        // Every student begins with the same model.
        let first = Student {
            group: group.clone(),
            kind: Kind::Plain,
            learning_rate: plan.rates()[0],
            seed: group.seeds[0],
        };
        let first = RecordedRun::read(&out.join(first.folder()))?;
        Some(tokens::selected(&first, (&reference_folder, &reference), KEEP)?)
    } else {
        None
    };
    let looked_at = (templates, selected.as_deref());
    let mut tried = Vec::new();
    for &kind in &group.kinds {
        for learning_rate in plan.rates() {
            let mut runs = Vec::new();
            for &seed in &group.seeds {
                let student = Student { group: group.clone(), kind, learning_rate, seed };
                runs.push((seed, RecordedRun::read(&out.join(student.folder()))?));
            }
            let rate = learning_rate.unwrap_or_else(|| plan.learning_rate_of(group.stream.setting));
            let named = (kind.name(), Some(kind), rate);
            tried.push(Tried::of(named, &runs, (cost, stream.scoring_of(kind)), looked_at)?);
        }
    }
    // The base model was trained before the students begin; its run is no student's.
    if group.size == reference_size && group.stream.reference != Reference::General {
        let seed = reference.record.seed;
        let named = ("reference".to_owned(), None, plan.learning_rate_of(group.stream.setting));
        tried.push(Tried::of(named, &[(seed, reference)], (cost, Effort::default()), looked_at)?);
    }
    let weights = [Half::Choosing, Half::Reporting].map(|half| weights(templates, half));
    let best = best_rates(&tried, &weights[0]);
    let plain = best.iter().copied().find(|&index| tried[index].asked == Some(Kind::Plain));
    let plain = plain.context("every group has plain runs")?;
    for index in 0..tried.len() {
        let found: Vec<Option<Ratios>> = (0..tried[index].runs.len())
            .map(|seed| tried[index].arm.against(&tried[plain].arm, &Sample::of_seed(seed, &weights[1])))
            .map(|found| found.and_then(|found| found.ratios))
            .collect();
        for (run, to_plain) in tried[index].runs.iter_mut().zip(found) {
            run.to_plain = to_plain;
        }
    }
    let plain = &tried[plain];
    let rows: Vec<Row> = best.iter().map(|&index| Row::of(&tried[index], plain, &weights)).collect();
    Ok(GroupResults {
        setting: group.stream.setting,
        reference: group.stream.reference,
        stream: group.stream.name(),
        size: group.size.name,
        parameters: config.parameters(),
        chosen: Chosen::among(&rows),
        rows,
        null: bootstrap::null(&plain.arm, &weights[1]),
        runs: tried.into_iter().flat_map(|tried| tried.runs).collect(),
    })
}

impl GroupResults {
    /// Its name, as in tables and file names.
    pub fn name(&self) -> String {
        format!("{}-{}", self.stream, self.size)
    }

    /// Plain training.
    pub fn plain(&self) -> Option<&Row> {
        self.rows.iter().find(|row| row.kind == "plain")
    }

    /// Tokens and steps of a run.
    pub fn length(&self) -> (u64, u64) {
        let first = self.runs.first();
        first.map_or((0, 0), |run| (run.effort.tokens, run.curve.last().map_or(0, |eval| eval.step)))
    }
}

/// The tokens of each template of a half; none of the others.
fn weights(templates: &Templates, half: Half) -> Vec<f64> {
    let weight = |template: &Template| if template.half == half { template.predictions as f64 } else { 0.0 };
    templates.list.iter().map(weight).collect()
}
