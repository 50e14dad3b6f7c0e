//! What students begin with and train on.

use serde::{Serialize, Serializer};

/// What students begin with and train on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// From fresh weights on one part of mathematics in five.
    Scratch,
    /// As in the paper: a base model, trained on general text, goes on with noisy mathematics, with noise inside its
    /// documents; the reference is the same base model, trained on with curated mathematics.
    Continual,
    /// The models of the one, the text of the other: a base model goes on with one part of mathematics in five. It tells what
    /// the beginning brings from what the stream brings.
    ContinualMixed,
    /// A cell of the map: a base model goes on with a stream of which so many tokens of a hundred are in documents of
    /// mathematics, with this inside them.
    Map(u8, Noise),
}

/// What stands inside documents of mathematics beside mathematics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noise {
    /// Nothing.
    None,
    /// The beginning of an unrelated document.
    Unrelated,
    /// Wrong numbers and mistyped words: so many words of a hundred.
    Corrupted(u8),
}

impl Noise {
    /// Its name, as in files and tables.
    pub fn name(self) -> String {
        match self {
            Self::None => "none".to_owned(),
            Self::Unrelated => "unrelated".to_owned(),
            Self::Corrupted(percent) => format!("corrupted-{percent}"),
        }
    }
}

impl Setting {
    /// Its name, as in topics and folders.
    pub fn name(self) -> String {
        match self {
            Self::Scratch => "scratch".to_owned(),
            Self::Continual => "continual".to_owned(),
            Self::ContinualMixed => "continual-mixed".to_owned(),
            Self::Map(percent, noise) => format!("map-{percent:02}-{}", noise.name()),
        }
    }

    /// What it is, in a headline.
    pub fn description(self) -> String {
        match self {
            Self::Scratch => "from fresh weights, a fifth of the stream is mathematics".to_owned(),
            Self::Continual => {
                "a base model of general text goes on with noisy mathematics, as in the paper".to_owned()
            }
            Self::ContinualMixed => {
                "that base model goes on with a stream of which a fifth is mathematics".to_owned()
            }
            Self::Map(percent, noise) => {
                let inside = match noise {
                    Noise::None => "nothing else inside it".to_owned(),
                    Noise::Unrelated => "unrelated text inside it".to_owned(),
                    Noise::Corrupted(words) => format!("{words} % of its words wrong"),
                };
                format!(
                    "that base model goes on with a stream of which {percent} % is mathematics, with {inside}"
                )
            }
        }
    }

    /// The file of the corpus that its students train on.
    pub fn corpus(self) -> String {
        match self {
            Self::Scratch | Self::ContinualMixed => "mixed.jsonl".to_owned(),
            Self::Continual => "noisy.jsonl".to_owned(),
            Self::Map(..) => format!("{}.jsonl", self.name()),
        }
    }

    /// The topic of its documents, before they are scored.
    pub fn topic(self) -> String {
        format!("{}.documents", self.name())
    }

    /// Whether its students and its references begin with a base model.
    pub fn has_base(self) -> bool {
        self != Self::Scratch
    }

    /// Whether it is a cell of the map.
    pub fn is_of_map(self) -> bool {
        matches!(self, Self::Map(..))
    }
}

impl Serialize for Setting {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name())
    }
}
