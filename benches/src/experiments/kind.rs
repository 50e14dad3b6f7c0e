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
    /// Every token that the reference predicts better than the student does (`--keep adaptive`).
    Adaptive(Backward),
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

impl Kind {
    /// Its name, as in folders and tables.
    pub fn name(self) -> String {
        let kept = |backward| if backward == Backward::Kept { "-kept" } else { "" };
        match self {
            Self::Plain => "plain".to_owned(),
            Self::Random(keep) => format!("random-{:.0}", 100.0 * keep),
            Self::Slm(keep, backward) => format!("slm-{:.0}{}", 100.0 * keep, kept(backward)),
            Self::Adaptive(backward) => format!("adaptive{}", kept(backward)),
            Self::Curated => "curated".to_owned(),
            Self::StreamAndCurated => "stream-and-curated".to_owned(),
            Self::Documents(keep) => format!("documents-{:.0}", 100.0 * keep),
            Self::Oracle => "oracle".to_owned(),
        }
    }

    /// Whether it chooses tokens by scores: a rule among which the best is sought, and to which scoring is a cost.
    pub fn is_scored(self) -> bool {
        matches!(self, Self::Slm(..) | Self::Adaptive(_))
    }

    /// Whether it reads another text than the stream as it is.
    pub fn has_own_text(self) -> bool {
        matches!(self, Self::Curated | Self::StreamAndCurated | Self::Documents(_) | Self::Oracle)
    }

    /// Flags of `sluice-train run`.
    pub fn flags(self) -> Vec<String> {
        let (objective, keep, backward) = match self {
            Self::Random(keep) => ("random", Some(keep.to_string()), Backward::Exact),
            Self::Slm(keep, backward) => ("slm", Some(keep.to_string()), backward),
            Self::Adaptive(backward) => ("slm", Some("adaptive".to_owned()), backward),
            _ => ("clm", None, Backward::Exact),
        };
        let mut flags = vec!["--objective".to_owned(), objective.to_owned()];
        if let Some(keep) = keep {
            flags.extend(["--keep".to_owned(), keep]);
        }
        if backward == Backward::Kept {
            flags.extend(["--backward".to_owned(), backward.name().to_owned()]);
        }
        flags
    }
}

#[cfg(test)]
mod tests {
    use super::{Backward, Kind};

    #[test]
    fn names_tell_kinds_apart_and_flags_say_what_the_names_do() {
        let kinds = [
            Kind::Plain,
            Kind::Random(0.6),
            Kind::Slm(0.3, Backward::Exact),
            Kind::Slm(0.3, Backward::Kept),
            Kind::Adaptive(Backward::Exact),
            Kind::Adaptive(Backward::Kept),
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
        // A control learns from every token of what it reads.
        for control in kinds.into_iter().filter(|kind| kind.has_own_text()) {
            assert_eq!(control.flags(), ["--objective", "clm"]);
            assert!(!control.is_scored());
        }
    }
}
