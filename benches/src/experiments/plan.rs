//! What an experiment trains, and how large everything is.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Serialize;
use sluice_trainer::model::ModelConfig;

use super::designs::Experiment;
use super::group::{Group, PRETRAINED, Size};
use super::kind::Kind;
use super::options::Options;
use super::reference::{Reference, Stream};
use super::setting::Setting;

/// Name of the first evaluation set, which decides.
pub(super) const TARGET: &str = "math";
/// Documents that wait to be drawn from, so that every seed has an order of its own.
pub const SHUFFLE_BUFFER: usize = 256;

/// One run of an experiment.
#[derive(Clone, Debug, PartialEq)]
pub struct Student {
    /// The group it belongs to.
    pub group: Group,
    /// What it learns from.
    pub kind: Kind,
    /// Its learning rate, where several are tried.
    pub learning_rate: Option<f64>,
    /// Its seed.
    pub seed: u64,
}

impl Student {
    /// Its folder below that of the experiments. One to which it is all the same who scores is trained once for all references.
    pub fn folder(&self) -> PathBuf {
        let Group { stream, size, .. } = &self.group;
        let stream = if self.kind.depends_on_reference() { stream.name() } else { stream.setting.name() };
        let rate = self.learning_rate.map_or(String::new(), |rate| format!("-rate-{rate}"));
        let run = format!("{}{rate}-seed-{}", self.kind.name(), self.seed);
        Path::new("runs").join(format!("{stream}-{}", size.name)).join(run)
    }
}

/// What all experiments in one folder have in common. Of two with another basis no part is the same.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Basis {
    /// Token ids of the tokenizer that is trained.
    pub vocabulary: usize,
    /// Partitions of the topics that students read.
    pub partitions: usize,
    /// The size of the reference models.
    pub reference: Size,
    /// The size of the one that is smaller than its students.
    pub small_reference: Size,
    /// Steps of a base model, at most one pass over the general text.
    pub base_steps: u64,
    /// Passes of a reference over its curated text, as in the paper.
    pub reference_epochs: u64,
    /// Highest learning rate of models that begin with fresh weights.
    pub learning_rate: f64,
    /// Highest learning rate of models that go on from others.
    pub learning_rate_continual: f64,
    /// The shape of the pretrained model that every model goes on from, if there is one.
    pub pretrained: Option<ModelConfig>,
    /// Whether all is small, to see that it works and no more.
    pub is_quick: bool,
}

/// The whole experiment. Two with one plan are the same.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Which one it is.
    pub experiment: Experiment,
    /// What it shares with the others.
    #[serde(flatten)]
    pub basis: Basis,
    /// Learning rates of each kind of student, of which its best is reported; where there is none, those of the basis.
    pub learning_rates: Vec<f64>,
    /// The students.
    pub groups: Vec<Group>,
}

impl Plan {
    /// What is asked for.
    pub fn of(options: &Options) -> anyhow::Result<Self> {
        for (index, rate) in options.learning_rates.iter().enumerate() {
            if !(rate.is_finite() && *rate > 0.0) || options.learning_rates[..index].contains(rate) {
                bail!("--learning-rates {rate}: give numbers above 0, each once, such as 5e-4,1e-3");
            }
        }
        let quick = options.is_quick;
        let pretrained = options.base.as_deref().map(ModelConfig::read).transpose();
        let pretrained = pretrained.context("give the folder of a checkpoint to --base")?;
        let (small_reference, reference) = match (&pretrained, Experiment::sizes(quick)) {
            (Some(_), _) => (PRETRAINED, PRETRAINED),
            (None, [small, reference, ..]) => (small, reference),
        };
        let own_vocabulary = if quick { 1024 } else { 4096 };
        let basis = Basis {
            vocabulary: pretrained.as_ref().map_or(own_vocabulary, |config| config.vocab_size),
            partitions: if quick { 4 } else { 16 },
            reference,
            small_reference,
            base_steps: if quick { 12 } else { 400 },
            reference_epochs: if pretrained.is_some() { 2 } else { 3 },
            learning_rate: 2e-3,
            // Far from its end, a model bears higher rates than one that others have trained well.
            learning_rate_continual: if pretrained.is_some() { 2e-4 } else { 1e-3 },
            pretrained,
            is_quick: quick,
        };
        let mut groups = options.experiment.groups(quick);
        if let Some(seeds) = options.seeds {
            for group in &mut groups {
                group.seeds = (1..=seeds).collect();
            }
        }
        let learning_rates = options.learning_rates.clone();
        Self { experiment: options.experiment, basis, learning_rates, groups }.only(&options.settings)
    }

    /// The same plan with the groups of these settings alone; all of them where none is named.
    fn only(mut self, settings: &[String]) -> anyhow::Result<Self> {
        let name = |group: &Group| group.stream.setting.name();
        let known: BTreeSet<String> = self.groups.iter().map(name).collect();
        if let Some(unknown) = settings.iter().find(|name| !known.contains(name.as_str())) {
            let known: Vec<String> = known.into_iter().collect();
            bail!(
                "experiment {} has no setting {unknown:?}: give one of {}",
                self.experiment.name(),
                known.join(", ")
            );
        }
        self.groups.retain(|group| settings.is_empty() || settings.contains(&name(group)));
        Ok(self)
    }

    /// Every seed that a group has.
    pub fn seeds(&self) -> BTreeSet<u64> {
        self.groups.iter().flat_map(|group| &group.seeds).copied().collect()
    }

    /// Every run, in the order in which they are done: a seed after the other, so that an experiment that is cut short has
    /// whole seeds. What two groups share comes once.
    pub fn students(&self) -> Vec<Student> {
        let mut students = Vec::new();
        let mut folders = BTreeSet::new();
        for seed in self.seeds() {
            for group in self.groups.iter().filter(|group| group.seeds.contains(&seed)) {
                for &kind in &group.kinds {
                    let of_kind = self.rates().into_iter().map(|learning_rate| Student {
                        group: group.clone(),
                        kind,
                        learning_rate,
                        seed,
                    });
                    students.extend(of_kind.filter(|student| folders.insert(student.folder())));
                }
            }
        }
        students
    }

    /// Learning rates of each kind of student; `None` is that of its setting.
    pub fn rates(&self) -> Vec<Option<f64>> {
        if self.learning_rates.is_empty() {
            vec![None]
        } else {
            self.learning_rates.iter().copied().map(Some).collect()
        }
    }

    /// The learning rate of a setting where no other is asked for.
    pub fn learning_rate_of(&self, setting: Setting) -> f64 {
        if setting.has_base() { self.basis.learning_rate_continual } else { self.basis.learning_rate }
    }

    /// The shape of models of this size.
    pub fn config(&self, size: Size) -> ModelConfig {
        self.basis.pretrained.clone().unwrap_or_else(|| size.config(self.basis.vocabulary))
    }

    /// The size of a stream's reference.
    pub fn reference_size(&self, stream: Stream) -> Size {
        match stream.reference {
            Reference::CuratedSmall => self.basis.small_reference,
            _ => self.basis.reference,
        }
    }

    /// What the groups of a stream have.
    fn kinds_of(&self, stream: Stream) -> impl Iterator<Item = Kind> {
        let own = self.groups.iter().filter(move |group| group.stream == stream);
        own.flat_map(|group| group.kinds.iter().copied())
    }

    /// Steps between the evaluations of a stream's students, and of its reference.
    pub fn eval_every(&self, stream: Stream) -> u64 {
        let own = self.groups.iter().filter(|group| group.stream == stream);
        own.map(|group| group.eval_every).min().unwrap_or(1)
    }

    /// Whether a stream has students that read a text of their own.
    pub fn has_own_texts(&self, stream: Stream) -> bool {
        self.kinds_of(stream).any(Kind::has_own_text)
    }

    /// Whether a stream has students that look at the reference's entropies.
    pub fn needs_entropies(&self, stream: Stream) -> bool {
        self.kinds_of(stream).any(Kind::needs_entropies)
    }

    /// Sizes of which a base model is trained, each once.
    pub fn bases(&self) -> Vec<Size> {
        if self.basis.pretrained.is_some() {
            return vec![];
        }
        let with_base = self.groups.iter().filter(|group| group.stream.setting.has_base());
        distinct(with_base.flat_map(|group| [self.reference_size(group.stream), group.size]))
    }

    /// Every size that is trained.
    pub fn sizes(&self) -> Vec<Size> {
        distinct(self.groups.iter().flat_map(|group| [self.reference_size(group.stream), group.size]))
    }

    /// The streams that have students, in the order of the groups.
    pub fn streams(&self) -> Vec<Stream> {
        distinct(self.groups.iter().map(|group| group.stream))
    }
}

/// Each once, where it comes first.
fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}
