//! Who scores a stream.

use serde::Serialize;

use super::setting::Setting;

/// What a reference model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reference {
    /// Trained on with curated mathematics, as in the paper.
    Curated,
    /// The same of a smaller model.
    CuratedSmall,
    /// The base model as it is: it knows general text and nothing more.
    General,
    /// Trained on with curated text of another domain than the target: the documentation of web services.
    Mismatched,
    /// Trained on with the stream itself, as in the paper's self-reference.
    OwnStream,
}

impl Reference {
    /// Its name, as in folders and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Curated => "curated",
            Self::CuratedSmall => "curated-small",
            Self::General => "general",
            Self::Mismatched => "mismatched",
            Self::OwnStream => "own-stream",
        }
    }

    /// Whether held-out mathematics chooses its checkpoint. Whoever has no curated mathematics takes the last one.
    pub fn is_best(self) -> bool {
        matches!(self, Self::Curated | Self::CuratedSmall)
    }
}

/// A stream of documents and the reference that scores it: what students read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stream {
    /// The documents, and what the models begin with.
    pub setting: Setting,
    /// Who scores.
    pub reference: Reference,
}

impl Stream {
    /// Its name, as in topics and folders: that of the setting, where the reference is the paper's.
    pub fn name(self) -> String {
        match self.reference {
            Reference::Curated => self.setting.name(),
            other => format!("{}-by-{}", self.setting.name(), other.name()),
        }
    }

    /// The topic of its scored documents.
    pub fn topic(self) -> String {
        format!("{}.scored", self.name())
    }

    /// The name of its reference in folders: there is one for each beginning, and for each stream that it learns itself.
    pub fn reference_name(self) -> String {
        match (self.reference, self.setting.has_base()) {
            (Reference::Curated, true) => Setting::Continual.name(),
            (Reference::Curated, false) => Setting::Scratch.name(),
            (Reference::OwnStream, _) => self.name(),
            (other, _) => other.name().to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::setting::{Noise, Setting};
    use super::{Reference, Stream};

    #[test]
    fn streams_are_told_apart_and_references_are_shared_where_they_are_the_same() {
        let stream = |setting, reference| Stream { setting, reference };
        let cell = Setting::Map(1, Noise::Corrupted(10));
        let streams = [
            stream(Setting::Scratch, Reference::Curated),
            stream(Setting::Continual, Reference::Curated),
            stream(cell, Reference::Curated),
            stream(Setting::Continual, Reference::OwnStream),
            stream(Setting::ContinualMixed, Reference::OwnStream),
            stream(Setting::Continual, Reference::General),
        ];
        assert_eq!(
            streams.map(Stream::name),
            [
                "scratch",
                "continual",
                "map-01-corrupted-10",
                "continual-by-own-stream",
                "continual-mixed-by-own-stream",
                "continual-by-general"
            ]
        );
        assert_eq!(
            streams.map(Stream::reference_name),
            [
                "scratch",
                "continual",
                "continual",
                "continual-by-own-stream",
                "continual-mixed-by-own-stream",
                "general"
            ]
        );
    }
}
