//! What goes with a committed offset as its metadata: the ids of the topics that it speaks of.

use std::fmt;

/// What stands before the id of the topic that the offset is one of. Earlier versions look for it at the beginning, and take
/// an offset for a person's where it is not there.
const DOCUMENTS: &str = "topic-id=";
/// What stands before the id of the topic that everything below the offset was published to.
const SCORED: &str = "scored-topic-id=";
const BETWEEN: char = ',';

/// The topics of a committed offset. Brokers before Kafka 2.8 tell no ids, and a person who sets an offset gives none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The id of the documents topic.
    pub documents: Option<String>,
    /// The id of the scored topic, where something was published to it.
    pub scored: Option<String>,
}

impl Mark {
    /// Of a committed offset's metadata.
    pub fn parse(metadata: &str) -> Self {
        let id = |before: &str| {
            let mut parts = metadata.split(BETWEEN);
            parts.find_map(|part| part.strip_prefix(before)).map(str::to_owned)
        };
        Self { documents: id(DOCUMENTS), scored: id(SCORED) }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [(SCORED, &self.scored), (DOCUMENTS, &self.documents)];
        let mut known = parts.iter().filter_map(|(before, id)| Some((before, id.as_ref()?)));
        if let Some((before, id)) = known.next() {
            write!(f, "{before}{id}")?;
        }
        for (before, id) in known {
            write!(f, "{BETWEEN}{before}{id}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_committed_is_read_again() {
        let (documents, scored) = (Some("5v5NtFUqT4CYhVXEZV3Wbw".to_owned()), Some("0pCyJ8".to_owned()));
        for mark in [
            Mark::default(),
            Mark { documents: documents.clone(), scored: None },
            Mark { documents: None, scored: scored.clone() },
            Mark { documents, scored },
        ] {
            assert_eq!(Mark::parse(&mark.to_string()), mark);
        }
        assert_eq!(Mark::parse("topic-id=a").documents.as_deref(), Some("a"), "as earlier versions wrote it");
        assert_eq!(Mark::parse("somebody's note"), Mark::default());
    }
}
