//! Names of where documents come from, bounded in number: metrics are kept per source.

/// Most sources told apart; the rest share one name.
const SOURCES_MAX: usize = 16;

/// Name under which the sources past the limit are counted together.
const REST: &str = "(other sources)";

/// Name of documents that say nothing of their source.
const UNNAMED: &str = "(no source)";

/// Gives each source name a small index, in order of appearance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceNames {
    names: Vec<String>,
}

impl SourceNames {
    /// Index of a source; every name past the sixteenth shares the last index.
    pub fn index(&mut self, source: &str) -> u16 {
        let source = if source.is_empty() { UNNAMED } else { source };
        if let Some(index) = self.names.iter().position(|name| name == source) {
            return index as u16;
        }
        if self.names.len() < SOURCES_MAX {
            self.names.push(source.to_owned());
        } else if self.names.len() == SOURCES_MAX {
            self.names.push(REST.to_owned());
        }
        (self.names.len() - 1) as u16
    }

    /// Names given before, in the order of their indices.
    pub fn from_names(names: Vec<String>) -> Self {
        Self { names }
    }

    /// Names in the order of their indices.
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

#[cfg(test)]
mod tests {
    use super::{SOURCES_MAX, SourceNames};

    #[test]
    fn names_past_the_limit_share_an_index() {
        let mut sources = SourceNames::default();
        let indices: Vec<u16> =
            (0..SOURCES_MAX + 3).map(|number| sources.index(&number.to_string())).collect();
        assert_eq!(indices[..SOURCES_MAX], (0..SOURCES_MAX as u16).collect::<Vec<_>>());
        assert!(indices[SOURCES_MAX..].iter().all(|&index| index == SOURCES_MAX as u16));
        assert_eq!(sources.index("0"), 0);
        assert_eq!(sources.names().len(), SOURCES_MAX + 1);
    }
}
