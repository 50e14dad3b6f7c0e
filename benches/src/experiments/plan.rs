//! What the first experiment trains, and how large everything is.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::bail;
use serde::Serialize;
use sluice_trainer::model::{ModelConfig, Variant};

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

/// What a student learns from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Every token.
    Plain,
    /// A share of the tokens, drawn at random.
    Random(f64),
    /// The share of the tokens with the highest excess loss.
    Slm(f64),
    /// Every token that the reference predicts better than the student does (`--keep adaptive`).
    Adaptive,
}

impl Kind {
    /// Its name, as in folders and tables.
    pub fn name(self) -> String {
        match self {
            Self::Plain => "plain".to_owned(),
            Self::Random(keep) => format!("random-{:.0}", 100.0 * keep),
            Self::Slm(keep) => format!("slm-{:.0}", 100.0 * keep),
            Self::Adaptive => "adaptive".to_owned(),
        }
    }

    /// Whether it looks at scores, so that scoring is a cost of it.
    pub fn is_scored(self) -> bool {
        matches!(self, Self::Slm(_) | Self::Adaptive)
    }

    /// Flags of `sluice-train run`.
    pub fn flags(self) -> Vec<String> {
        let (objective, keep) = match self {
            Self::Plain => ("clm", None),
            Self::Random(keep) => ("random", Some(keep.to_string())),
            Self::Slm(keep) => ("slm", Some(keep.to_string())),
            Self::Adaptive => ("slm", Some("adaptive".to_owned())),
        };
        let mut flags = vec!["--objective".to_owned(), objective.to_owned()];
        if let Some(keep) = keep {
            flags.extend(["--keep".to_owned(), keep]);
        }
        flags
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
    /// Its seed.
    pub seed: u64,
}

impl Student {
    /// Its folder below that of the experiment.
    pub fn folder(&self) -> std::path::PathBuf {
        let Group { setting, size, .. } = &self.group;
        let run = format!("{}-seed-{}", self.kind.name(), self.seed);
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
    /// The students.
    pub groups: Vec<Group>,
    /// Whether all is small, to see that it works and no more.
    pub is_quick: bool,
}

const SMALL: Size = Size { name: "2M", hidden: 128, layers: 4, heads: 4 };
const LARGE: Size = Size { name: "10M", hidden: 320, layers: 6, heads: 5 };

impl Plan {
    /// All of it: hours on two cores, which are estimated before the first run.
    pub fn full() -> Self {
        use Kind::{Adaptive, Plain, Random, Slm};
        let group = |setting, size, kinds: &[Kind], steps, eval_every| Group {
            setting,
            size,
            kinds: kinds.to_vec(),
            steps,
            eval_every,
            // A run of the small size takes a quarter of a minute.
            seeds: if size == SMALL { (1..=5).collect() } else { (1..=3).collect() },
        };
        let controls = [Plain, Random(KEEP), Slm(KEEP), Adaptive];
        let sweep = |further: &[f64]| -> Vec<Kind> {
            controls.iter().copied().chain(further.iter().map(|&keep| Slm(keep))).collect()
        };
        Self {
            vocabulary: 4096,
            partitions: 16,
            reference: SMALL,
            base_steps: 400,
            reference_epochs: 3,
            learning_rate: 2e-3,
            learning_rate_continual: 1e-3,
            groups: vec![
                group(Setting::Continual, SMALL, &sweep(&[0.8, 0.4, 0.3, 0.1]), 200, 10),
                group(Setting::ContinualMixed, SMALL, &sweep(&[0.3]), 200, 10),
                group(Setting::Scratch, SMALL, &sweep(&[0.8, 0.4, 0.3]), 320, 16),
                group(Setting::Scratch, LARGE, &sweep(&[0.3]), 320, 16),
            ],
            is_quick: false,
        }
    }

    /// All of it in a few minutes, with models that learn next to nothing.
    pub fn quick() -> Self {
        let tiny = |name, hidden, layers| Size { name, hidden, layers, heads: 2 };
        let (small, large) = (tiny("tiny", 32, 2), tiny("small", 64, 2));
        let full = Self::full();
        let groups = full.groups.iter().map(|group| Group {
            size: if group.size == SMALL { small } else { large },
            kinds: group.kinds.iter().copied().filter(|kind| *kind != Kind::Slm(0.4)).take(4).collect(),
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
    pub fn only(mut self, settings: &[String]) -> anyhow::Result<Self> {
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
                    students.push(Student { group: group.clone(), kind, seed });
                }
            }
        }
        students
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
