//! Names of where documents come from, bounded in number: metrics are kept per source.

/// Most sources told apart where nobody asks for more; the rest share one name.
const SOURCES_MAX: usize = 16;

/// Name under which the sources past the limit are counted together.
const REST: &str = "(other sources)";

/// Name of documents that say nothing of their source.
const UNNAMED: &str = "(no source)";

/// Gives each source name a small index, in order of appearance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceNames {
    names: Vec<String>,
    sources_max: u16,
}

impl Default for SourceNames {
    /// Tells sixteen sources apart.
    fn default() -> Self {
        Self::at_most(SOURCES_MAX as u16)
    }
}

impl SourceNames {
    /// Tells so many sources apart.
    pub fn at_most(sources_max: u16) -> Self {
        Self { names: vec![], sources_max }
    }

    /// Index of a source; every name past the last that is told apart shares the index after it.
    pub fn index(&mut self, source: &str) -> u16 {
        let source = if source.is_empty() { UNNAMED } else { source };
        if let Some(index) = self.names.iter().position(|name| name == source) {
            return index as u16;
        }
        let sources_max = usize::from(self.sources_max);
        if self.names.len() < sources_max {
            self.names.push(source.to_owned());
        } else if self.names.len() == sources_max {
            self.names.push(REST.to_owned());
        }
        (self.names.len() - 1) as u16
    }

    /// Names given before, in the order of their indices.
    pub fn from_names(names: Vec<String>) -> Self {
        Self { names, ..Self::default() }
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

        let mut two = SourceNames::at_most(2);
        assert_eq!(["a", "b", "c", "", "a"].map(|name| two.index(name)), [0, 1, 2, 2, 0]);
    }
}
