//! Rows back to documents: gathers the losses of a document's windows and makes its record when all are there.

use bytes::Bytes;
use sluice_schemas::record::{ContextPolicy, LossFormat, Losses, RecordError, ScoredDocument};

use crate::batch::Batch;
use crate::ledger::Ticket;
use crate::score::{ModelIdentity, Scores};
use crate::sink::{DeadLetter, Outcome, Scored};
use crate::source::Job;

/// What every scored record says beside its losses.
#[derive(Clone, Copy, Debug)]
pub struct RecordPolicy {
    /// The model's fingerprint and precision go into the record.
    pub model: ModelIdentity,
    /// How the model sees a document.
    pub context: ContextPolicy,
    /// Layout of the losses.
    pub loss_format: LossFormat,
    /// Whether entropies are recorded.
    pub entropies: bool,
}

/// A document whose losses are coming in.
#[derive(Debug)]
pub struct Assembly {
    job: Job,
    /// One for each token; NaN where none has come yet, and for ever at the first.
    losses: Vec<f32>,
    entropies: Vec<f32>,
    missing: usize,
    failure: Option<(&'static str, String)>,
}

impl Assembly {
    /// A document of which no token is scored yet.
    pub fn new(job: Job) -> Self {
        let tokens = job.document.tokens.len();
        Self {
            job,
            losses: vec![f32::NAN; tokens],
            entropies: vec![f32::NAN; tokens],
            missing: tokens.saturating_sub(1),
            failure: None,
        }
    }

    /// Whether nothing is missing any more.
    pub fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Marks the document as one that the model cannot score.
    pub fn fail(&mut self, reason: &'static str, detail: String) {
        self.failure = Some((reason, detail));
        self.missing = 0;
    }

    /// The document's ticket and what becomes of it.
    pub fn finish(self, policy: &RecordPolicy) -> (Ticket, Outcome) {
        let ticket = self.job.ticket;
        let (key, origin) = (self.job.key.clone(), self.job.payload.clone());
        let dead = |reason, detail: &str| Outcome::DeadLetter(DeadLetter::new(key, origin, reason, detail));
        if let Some((reason, detail)) = self.failure {
            return (ticket, dead(reason, &detail));
        }
        match self.record(policy) {
            Ok(scored) => (ticket, Outcome::Scored(scored)),
            Err(error) => (ticket, dead(error.code(), &error.to_string())),
        }
    }

    fn record(self, policy: &RecordPolicy) -> Result<Scored, RecordError> {
        let reference_losses = Losses::new(&self.losses, policy.loss_format)?;
        let reference_entropies =
            policy.entropies.then(|| Losses::new(&self.entropies, policy.loss_format)).transpose()?;
        let document = self.job.document;
        let key = self.job.key.unwrap_or_else(|| Bytes::copy_from_slice(document.id.as_bytes()));
        let tokens = document.tokens.len();
        let record = ScoredDocument {
            document,
            reference_losses,
            reference_entropies,
            reference_model: policy.model.fingerprint,
            context: policy.context,
            precision: policy.model.precision,
        };
        Ok(Scored { key, payload: record.encode(), origin: self.job.payload, tokens })
    }
}

/// Hands the scores of `batch` to the documents they belong to; `Window::document` is an index into `assemblies`,
/// where a document that was given up is missing.
pub fn scatter(batch: &Batch, scores: &Scores, assemblies: &mut [Option<Assembly>]) {
    let mut next = 0;
    for window in &batch.windows {
        let scored = window.first_scored..window.span.end;
        let from = next..next + scored.len();
        next = from.end;
        let Some(assembly) = &mut assemblies[window.document] else { continue };
        assembly.missing -= scored.len();
        assembly.losses[scored.clone()].copy_from_slice(&scores.losses[from.clone()]);
        if !scores.entropies.is_empty() {
            assembly.entropies[scored].copy_from_slice(&scores.entropies[from]);
        }
    }
}
