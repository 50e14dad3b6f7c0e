//! Whose losses a stream carries: of one reference model, or of those that were allowed, each under one policy.

use std::collections::BTreeMap;

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::ContextPolicy;

use super::error::{Origin, StreamError};

/// How reference models saw their documents, by fingerprint.
pub type Contexts = BTreeMap<Fingerprint, ContextPolicy>;

/// What the documents of a stream have shown so far. They are looked at in the order in which they are handed out, so that
/// what is refused does not depend on which partition answered first.
#[derive(Clone, Debug, Default)]
pub struct Provenance {
    /// Whether records of several models are taken.
    allows_several: bool,
    reference_model: Option<Fingerprint>,
    contexts: Contexts,
}

impl Provenance {
    /// What is known already of a stream that goes on.
    pub fn new(allows_several: bool, reference_model: Option<Fingerprint>, contexts: Contexts) -> Self {
        Self { allows_several, reference_model, contexts }
    }

    /// The reference model of the first scored document.
    pub fn reference_model(&self) -> Option<Fingerprint> {
        self.reference_model
    }

    /// How each reference model saw its documents.
    pub fn contexts(&self) -> &Contexts {
        &self.contexts
    }

    /// Refuses losses that are not to be compared with those before: of another model, or of the same one under more or
    /// less context.
    pub fn admit(
        &mut self,
        found: Fingerprint,
        context: ContextPolicy,
        origin: impl Fn() -> Origin,
    ) -> Result<(), StreamError> {
        let expected = *self.reference_model.get_or_insert(found);
        if found != expected && !self.allows_several {
            return Err(StreamError::ForeignReference { origin: origin(), found, expected });
        }
        let expected = *self.contexts.entry(found).or_insert(context);
        if context == expected {
            Ok(())
        } else {
            Err(StreamError::ForeignContext { origin: origin(), found: context, expected })
        }
    }
}
