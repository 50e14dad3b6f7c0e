//! What the first experiment trains, and how large everything is.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::bail;
use serde::Serialize;
use sluice_trainer::model::{Backward, ModelConfig, Variant};

use super::kind::Kind;
use super::options::Options;

/// Name of the first evaluation set, which decides.
pub(super) const TARGET: &str = "math";
/// Tokens in a sequence, for every model of the experiment.
pub const SEQUENCE_LENGTH: usize = 256;
/// Sequences in a step.
pub const BATCH_SIZE: usize = 8;
/// Documents that wait to be drawn from, so that every seed has an order of its own.
pub const SHUFFLE_BUFFER: usize = 256;
/// Share that the paper keeps, and the control draws at random.
pub const KEEP: f64 = 0.6;

/// A model size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Size {
    /// What it is called: about how many parameters.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
}

impl Size {
    /// The shape of the model, with a head of its own.
    pub fn config(self, vocabulary: usize) -> ModelConfig {
        ModelConfig {
            vocab_size: vocabulary,
            hidden_size: self.hidden,
            intermediate_size: (self.hidden * 8).div_ceil(3).next_multiple_of(64),
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.heads,
            max_position_embeddings: SEQUENCE_LENGTH,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            variant: Variant::default(),
        }
    }
}

/// What students begin with and train on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Setting {
    /// From fresh weights on one part of mathematics in five.
    Scratch,
    /// As in the paper: a base model, trained on general text, goes on with noisy mathematics, with noise inside its
    /// documents; the reference is the same base model, trained on with curated mathematics.
    Continual,
    /// The models of the one, the text of the other: a base model goes on with one part of mathematics in five. It tells what
    /// the beginning brings from what the stream brings.
    ContinualMixed,
}

impl Setting {
    /// Its name, as in topics and folders.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scratch => "scratch",
            Self::Continual => "continual",
            Self::ContinualMixed => "continual-mixed",
        }
    }

    /// The file of the corpus that its students train on.
    pub fn corpus(self) -> &'static str {
        match self {
            Self::Scratch | Self::ContinualMixed => "mixed.jsonl",
            Self::Continual => "noisy.jsonl",
        }
    }

    /// Its topics: what is scored, and what comes of it.
    pub fn topics(self) -> (String, String) {
        (format!("{}.documents", self.name()), format!("{}.scored", self.name()))
    }

    /// Whether its students and its reference begin with the base model.
    pub fn has_base(self) -> bool {
        self != Self::Scratch
    }
}

/// Students of one size on one stream: each kind with each seed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Group {
    /// What they train on.
    pub setting: Setting,
    /// How large they are.
    pub size: Size,
    /// What each learns from.
    pub kinds: Vec<Kind>,
    /// Steps of each.
    pub steps: u64,
    /// Steps between evaluations.
    pub eval_every: u64,
    /// A run of each kind with each.
    pub seeds: Vec<u64>,
}

/// One run of the experiment.
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
    /// Its folder below that of the experiment.
    pub fn folder(&self) -> std::path::PathBuf {
        let Group { setting, size, .. } = &self.group;
        let rate = self.learning_rate.map_or(String::new(), |rate| format!("-rate-{rate}"));
        let run = format!("{}{rate}-seed-{}", self.kind.name(), self.seed);
        Path::new("runs").join(format!("{}-{}", setting.name(), size.name)).join(run)
    }
}

/// The whole experiment. Two with one plan are the same.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Token ids of the tokenizer that is trained.
    pub vocabulary: usize,
    /// Partitions of the topics that students read.
    pub partitions: usize,
    /// The size of the reference models, and of the base model.
    pub reference: Size,
    /// Steps of the base model, at most one pass over the general text.
    pub base_steps: u64,
    /// Passes of the reference over the curated text, as in the paper.
    pub reference_epochs: u64,
    /// Highest learning rate of models that begin with fresh weights.
    pub learning_rate: f64,
    /// Highest learning rate of models that go on from others.
    pub learning_rate_continual: f64,
    /// Learning rates of each kind of student, of which its best is reported; where there is none, those above.
    pub learning_rates: Vec<f64>,
    /// The students.
    pub groups: Vec<Group>,
    /// Whether all is small, to see that it works and no more.
    pub is_quick: bool,
}

const SMALL: Size = Size { name: "2M", hidden: 128, layers: 4, heads: 4 };
const LARGE: Size = Size { name: "10M", hidden: 320, layers: 6, heads: 5 };

impl Plan {
    /// What is asked for.
    pub fn of(options: &Options) -> anyhow::Result<Self> {
        for (index, rate) in options.learning_rates.iter().enumerate() {
            if !(rate.is_finite() && *rate > 0.0) || options.learning_rates[..index].contains(rate) {
                bail!("--learning-rates {rate}: give numbers above 0, each once, such as 5e-4,1e-3");
            }
        }
        let plan = if options.is_quick { Self::quick(options) } else { Self::full(options) };
        let mut plan = Self { learning_rates: options.learning_rates.clone(), ..plan };
        if let Some(seeds) = options.seeds {
            for group in &mut plan.groups {
                group.seeds = (1..=seeds).collect();
            }
        }
        plan.only(&options.settings)
    }

    /// All of it; the time that it takes is estimated before the first run.
    fn full(options: &Options) -> Self {
        use Kind::{Adaptive, Curated, Documents, Oracle, Plain, Random, StreamAndCurated};
        let slm = |keep| Kind::Slm(keep, Backward::Exact);
        let slm_kept = |keep| Kind::Slm(keep, Backward::Kept);
        let group = |setting, size, shares: &[f64], swept: &[f64], further: &[Kind], (steps, eval_every)| {
            let swept = if options.has_sweep { swept } else { &[] };
            let common = [Plain, Random(KEEP), slm(KEEP), Adaptive(Backward::Exact)];
            let shares = shares.iter().chain(swept).map(|&keep| slm(keep));
            Group {
                setting,
                size,
                kinds: common.into_iter().chain(shares).chain(further.iter().copied()).collect(),
                steps,
                eval_every,
                // A run of the small size takes a quarter of a minute.
                seeds: if size == SMALL { (1..=5).collect() } else { (1..=3).collect() },
            }
        };
        let mut controls =
            vec![Adaptive(Backward::Kept), slm_kept(0.3), Curated, StreamAndCurated, Documents(KEEP), Oracle];
        if options.has_sweep {
            controls.push(slm_kept(KEEP));
        }
        let mut groups = vec![
            group(Setting::Continual, SMALL, &[0.3, 0.1], &[0.8, 0.4], &controls, (200, 10)),
            group(Setting::ContinualMixed, SMALL, &[0.3], &[], &[], (200, 10)),
            group(Setting::Scratch, SMALL, &[0.3], &[0.8, 0.4], &[], (320, 16)),
        ];
        if options.has_larger {
            groups.push(group(Setting::Scratch, LARGE, &[0.3], &[], &[], (320, 16)));
        }
        Self {
            vocabulary: 4096,
            partitions: 16,
            reference: SMALL,
            base_steps: 400,
            reference_epochs: 3,
            learning_rate: 2e-3,
            learning_rate_continual: 1e-3,
            learning_rates: vec![],
            groups,
            is_quick: false,
        }
    }

    /// All of it in a few minutes, with models that learn next to nothing.
    fn quick(options: &Options) -> Self {
        let tiny = |name, hidden, layers| Size { name, hidden, layers, heads: 2 };
        let (small, large) = (tiny("tiny", 32, 2), tiny("small", 64, 2));
        let full = Self::full(options);
        let is_further_share = |kind: &Kind| {
            matches!(kind, Kind::Slm(_, Backward::Exact)) && *kind != Kind::Slm(KEEP, Backward::Exact)
        };
        let groups = full.groups.iter().map(|group| Group {
            size: if group.size == SMALL { small } else { large },
            kinds: group.kinds.iter().copied().filter(|kind| !is_further_share(kind)).collect(),
            steps: 12,
            eval_every: 4,
            seeds: vec![1, 2],
            ..group.clone()
        });
        Self {
            vocabulary: 1024,
            partitions: 4,
            reference: small,
            base_steps: 12,
            groups: groups.collect(),
            is_quick: true,
            ..full.clone()
        }
    }

    /// The same plan with the groups of these settings alone; all of them where none is named.
    fn only(mut self, settings: &[String]) -> anyhow::Result<Self> {
        let known: BTreeSet<&str> = self.groups.iter().map(|group| group.setting.name()).collect();
        if let Some(unknown) = settings.iter().find(|name| !known.contains(name.as_str())) {
            let known: Vec<&str> = known.into_iter().collect();
            bail!("there is no setting {unknown:?}: give one of {}", known.join(", "));
        }
        self.groups
            .retain(|group| settings.is_empty() || settings.iter().any(|name| name == group.setting.name()));
        Ok(self)
    }

    /// Every seed that a group has.
    pub fn seeds(&self) -> BTreeSet<u64> {
        self.groups.iter().flat_map(|group| &group.seeds).copied().collect()
    }

    /// Every run, in the order in which they are done: a seed after the other, so that an experiment that is cut short has
    /// whole seeds.
    pub fn students(&self) -> Vec<Student> {
        let mut students = Vec::new();
        for seed in self.seeds() {
            for group in self.groups.iter().filter(|group| group.seeds.contains(&seed)) {
                for &kind in &group.kinds {
                    students.extend(self.rates().into_iter().map(|learning_rate| Student {
                        group: group.clone(),
                        kind,
                        learning_rate,
                        seed,
                    }));
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
        if setting.has_base() { self.learning_rate_continual } else { self.learning_rate }
    }

    /// Steps between the evaluations of a setting's students, and of its reference.
    pub fn eval_every(&self, setting: Setting) -> u64 {
        let own = self.groups.iter().filter(|group| group.setting == setting);
        own.map(|group| group.eval_every).min().unwrap_or(1)
    }

    /// Whether a setting has students that read a text of their own.
    pub fn has_own_texts(&self, setting: Setting) -> bool {
        let own = self.groups.iter().filter(|group| group.setting == setting);
        own.flat_map(|group| &group.kinds).any(|kind| kind.has_own_text())
    }

    /// Every size that is trained.
    pub fn sizes(&self) -> Vec<Size> {
        let mut sizes = vec![self.reference];
        for group in &self.groups {
            if !sizes.contains(&group.size) {
                sizes.push(group.size);
            }
        }
        sizes
    }

    /// The settings that have students.
    pub fn settings(&self) -> Vec<Setting> {
        let all = [Setting::Scratch, Setting::Continual, Setting::ContinualMixed];
        all.into_iter().filter(|setting| self.groups.iter().any(|group| group.setting == *setting)).collect()
    }
}
