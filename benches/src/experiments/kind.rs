//! What students learn from: rules that choose tokens, and controls.

use serde::Serialize;
use sluice_trainer::model::Backward;

/// What a student learns from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Every token.
    Plain,
    /// A share of the tokens, drawn at random.
    Random(f64),
    /// The share of the tokens with the highest excess loss.
    Slm(f64, Backward),
    /// The same with a share that changes over the run, as `--keep` takes it.
    Scheduled(&'static str),
    /// Every token that the reference predicts better than the student does (`--keep adaptive`).
    Adaptive(Backward),
    /// The share of the tokens that the reference alone chooses, as in the paper's self-reference.
    Own(OwnScore, f64),
    /// Every token of the curated text, and of nothing else.
    Curated,
    /// Every token of the stream and the curated text, mixed.
    StreamAndCurated,
    /// Every token of whole documents: those with the highest mean excess loss against the base model, as many as hold this
    /// share of the stream's tokens.
    Documents(f64),
    /// Every token of the documents that hold mathematics, by their source.
    Oracle,
}

/// How a reference alone chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OwnScore {
    /// The lowest losses.
    Loss,
    /// The lowest entropies.
    Entropy,
    /// Those that are among the lowest by both, of which each keeps the share.
    Intersection,
    /// Those that are among the lowest by one of them.
    Union,
}

impl OwnScore {
    /// As `--score` takes it.
    fn flag(self) -> &'static str {
        match self {
            Self::Loss => "reference-loss",
            Self::Entropy => "reference-entropy",
            Self::Intersection => "intersection",
            Self::Union => "union",
        }
    }
}

impl Kind {
    /// Its name, as in folders and tables.
    pub fn name(self) -> String {
        let kept = |backward| if backward == Backward::Kept { "-kept" } else { "" };
        match self {
            Self::Plain => "plain".to_owned(),
            Self::Random(keep) => format!("random-{}", percent(keep)),
            Self::Slm(keep, backward) => format!("slm-{}{}", percent(keep), kept(backward)),
            Self::Scheduled(rule) => format!("slm-{}", rule.replace([':', ',', '='], "-")),
            Self::Adaptive(backward) => format!("adaptive{}", kept(backward)),
            Self::Own(score, keep) => format!("{}-{}", score.flag(), percent(keep)),
            Self::Curated => "curated".to_owned(),
            Self::StreamAndCurated => "stream-and-curated".to_owned(),
            Self::Documents(keep) => format!("documents-{}", percent(keep)),
            Self::Oracle => "oracle".to_owned(),
        }
    }

    /// Whether it chooses tokens by scores: a rule among which the best is sought, and to which scoring is a cost.
    pub fn is_scored(self) -> bool {
        matches!(self, Self::Slm(..) | Self::Scheduled(_) | Self::Adaptive(_) | Self::Own(..))
    }

    /// Whether it needs the reference's entropies.
    pub fn needs_entropies(self) -> bool {
        matches!(self, Self::Own(OwnScore::Entropy | OwnScore::Intersection | OwnScore::Union, _))
    }

    /// Whether who scores makes a difference to it.
    pub fn depends_on_reference(self) -> bool {
        self.is_scored() || matches!(self, Self::Documents(_))
    }

    /// Whether it reads another text than the stream as it is.
    pub fn has_own_text(self) -> bool {
        matches!(self, Self::Curated | Self::StreamAndCurated | Self::Documents(_) | Self::Oracle)
    }

    /// Flags of `sluice-train run`.
    pub fn flags(self) -> Vec<String> {
        let slm = ["--objective", "slm"].as_slice();
        let (words, keep, backward) = match self {
            Self::Random(keep) => {
                (["--objective", "random"].as_slice(), Some(keep.to_string()), Backward::Exact)
            }
            Self::Slm(keep, backward) => (slm, Some(keep.to_string()), backward),
            Self::Scheduled(rule) => (slm, Some(rule.to_owned()), Backward::Exact),
            Self::Adaptive(backward) => (slm, Some("adaptive".to_owned()), backward),
            Self::Own(score, keep) => {
                let words = ["--objective", "slm", "--score", score.flag()].map(str::to_owned);
                return words.into_iter().chain(["--keep".to_owned(), keep.to_string()]).collect();
            }
            _ => (["--objective", "clm"].as_slice(), None, Backward::Exact),
        };
        let mut flags: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        if let Some(keep) = keep {
            flags.extend(["--keep".to_owned(), keep]);
        }
        if backward == Backward::Kept {
            flags.extend(["--backward".to_owned(), backward.name().to_owned()]);
        }
        flags
    }
}

fn percent(share: f64) -> String {
    format!("{:.0}", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::{Backward, Kind, OwnScore};

    #[test]
    fn names_tell_kinds_apart_and_flags_say_what_the_names_do() {
        let kinds = [
            Kind::Plain,
            Kind::Random(0.6),
            Kind::Slm(0.3, Backward::Exact),
            Kind::Slm(0.3, Backward::Kept),
            Kind::Scheduled("linear:0.8:0.4"),
            Kind::Scheduled("linear:0.8:0.2"),
            Kind::Adaptive(Backward::Exact),
            Kind::Adaptive(Backward::Kept),
            Kind::Own(OwnScore::Loss, 0.7),
            Kind::Own(OwnScore::Entropy, 0.7),
            Kind::Own(OwnScore::Intersection, 0.7),
            Kind::Own(OwnScore::Union, 0.7),
            Kind::Curated,
            Kind::StreamAndCurated,
            Kind::Documents(0.6),
            Kind::Oracle,
        ];
        let mut names: Vec<String> = kinds.iter().map(|kind| kind.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), kinds.len());
        let kept = Kind::Slm(0.3, Backward::Kept);
        assert_eq!(kept.name(), "slm-30-kept");
        assert_eq!(kept.flags(), ["--objective", "slm", "--keep", "0.3", "--backward", "kept"]);
        let own = Kind::Own(OwnScore::Intersection, 0.7);
        assert_eq!(own.flags(), ["--objective", "slm", "--score", "intersection", "--keep", "0.7"]);
        let falling = Kind::Scheduled("steps:0.8,100=0.4");
        assert_eq!(falling.name(), "slm-steps-0.8-100-0.4");
        assert_eq!(falling.flags(), ["--objective", "slm", "--keep", "steps:0.8,100=0.4"]);
        // A control learns from every token of what it reads.
        for control in kinds.into_iter().filter(|kind| kind.has_own_text()) {
            assert_eq!(control.flags(), ["--objective", "clm"]);
            assert!(!control.is_scored());
        }
    }
}
