//! Rows back to documents: gathers the losses of a document's windows, in whatever order batches come back, and makes
//! its record when all are there.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use sluice_schemas::record::{
    AttributedDocument, ContextPolicy, LossFormat, Losses, RecordError, ScoredDocument, TokenAttribute,
};

use crate::batch::{Batch, TokenClass, Window, windows_of};
use crate::job::Job;
use crate::ledger::Ticket;
use crate::outcome::{DeadLetter, Outcome, Scored};
use crate::score::{ModelIdentity, Scores, probability};

/// What every scored record says beside its losses.
#[derive(Clone, Debug)]
pub struct RecordPolicy {
    /// The model's fingerprint and precision go into the record.
    pub model: ModelIdentity,
    /// How the model sees a document.
    pub context: ContextPolicy,
    /// Layout of the losses, or of the attribute.
    pub loss_format: LossFormat,
    /// Whether entropies are recorded.
    pub entropies: bool,
    /// The class whose probability is recorded, where the model is a token classifier.
    pub class: Option<TokenClass>,
}

/// A document and what becomes of it.
pub type Finished = (Ticket, Outcome);

/// The documents whose losses are coming in.
#[derive(Debug)]
pub struct Assembler {
    policy: RecordPolicy,
    /// By the number that their windows carry. Numbers are never used twice, so a batch that comes back late cannot
    /// meet another document.
    documents: HashMap<u64, Assembly>,
    numbers: u64,
}

impl Assembler {
    /// An assembler without documents.
    pub fn new(policy: RecordPolicy) -> Self {
        Self { policy, documents: HashMap::new(), numbers: 0 }
    }

    /// Takes a document in and cuts it into windows. One without any, such as one of a single token, is finished
    /// before the model has run.
    pub fn add(&mut self, job: Job) -> (Vec<Window>, Option<Finished>) {
        let number = self.numbers;
        self.numbers += 1;
        let tokens: Arc<[u32]> = job.document.tokens.iter().collect();
        let windows = windows_of(number, &tokens, self.policy.context, self.policy.class.as_ref());
        let assembly = Assembly::new(job, &windows);
        if windows.is_empty() {
            return (windows, Some(assembly.finish(&self.policy)));
        }
        self.documents.insert(number, assembly);
        (windows, None)
    }

    /// Whether the windows of `document` are still to be scored, as far as `is_wanted` says; one that is not is given up.
    pub fn wants(&mut self, document: u64, is_wanted: impl FnOnce(Ticket) -> bool) -> bool {
        let Some(assembly) = self.documents.get(&document) else { return false };
        let wanted = is_wanted(assembly.job.ticket);
        if !wanted {
            self.documents.remove(&document);
        }
        wanted
    }

    /// Gives up every document that is not wanted any more.
    pub fn retain(&mut self, is_wanted: impl Fn(Ticket) -> bool) {
        self.documents.retain(|_, assembly| is_wanted(assembly.job.ticket));
    }

    /// Whether losses of `document` are still taken in.
    pub fn has(&self, document: u64) -> bool {
        self.documents.contains_key(&document)
    }

    /// Notes that the model has taken a window of `document`; its ticket where that was the last that waited.
    pub fn hand_over(&mut self, document: u64) -> Option<Ticket> {
        let assembly = self.documents.get_mut(&document)?;
        assembly.waiting = assembly.waiting.checked_sub(1)?;
        (assembly.waiting == 0).then_some(assembly.job.ticket)
    }

    /// Notes that the model is to take a window of `document` once more, for the batch that it was in has failed.
    pub fn take_back(&mut self, document: u64) {
        if let Some(assembly) = self.documents.get_mut(&document) {
            assembly.waiting += 1;
        }
    }

    /// Hands the scores of `batch` to the documents they belong to, and gives out those that are finished.
    pub fn scored(&mut self, batch: &Batch, scores: &Scores) -> Vec<Finished> {
        let mut next = 0;
        let mut finished = Vec::new();
        for window in &batch.windows {
            let scored = window.scored();
            let from = next..next + scored.len();
            next = from.end;
            // A document that was given up is missing.
            let Some(assembly) = self.documents.get_mut(&window.document) else { continue };
            assembly.missing -= scored.len();
            assembly.losses[scored.clone()].copy_from_slice(&scores.losses[from.clone()]);
            if !scores.entropies.is_empty() {
                assembly.entropies[scored].copy_from_slice(&scores.entropies[from]);
            }
            if assembly.missing == 0 {
                let assembly = self.documents.remove(&window.document);
                finished.extend(assembly.map(|assembly| assembly.finish(&self.policy)));
            }
        }
        finished
    }

    /// Gives a document up that the model cannot score.
    pub fn failed(&mut self, document: u64, reason: &'static str, detail: &str) -> Option<Finished> {
        let Assembly { job, .. } = self.documents.remove(&document)?;
        Some((job.ticket, Outcome::DeadLetter(DeadLetter::new(job.key, job.payload, reason, detail))))
    }
}

/// A document whose losses are coming in.
#[derive(Debug)]
struct Assembly {
    job: Job,
    /// One for each token; NaN where none has come yet, and for ever at a first token without a prediction.
    losses: Vec<f32>,
    entropies: Vec<f32>,
    missing: usize,
    /// Whether a window gives the loss of the first token.
    is_first_predicted: bool,
    /// Windows that the model has not taken yet.
    waiting: usize,
}

impl Assembly {
    fn new(job: Job, windows: &[Window]) -> Self {
        let tokens = job.document.tokens.len();
        Self {
            job,
            losses: vec![f32::NAN; tokens],
            entropies: vec![f32::NAN; tokens],
            missing: windows.iter().map(|window| window.scored().len()).sum(),
            is_first_predicted: windows.first().is_some_and(|window| window.first_scored == 0),
            waiting: windows.len(),
        }
    }

    fn finish(self, policy: &RecordPolicy) -> Finished {
        let ticket = self.job.ticket;
        let (key, origin) = (self.job.key.clone(), self.job.payload.clone());
        match self.record(policy) {
            Ok(scored) => (ticket, Outcome::Scored(scored)),
            Err(error) => {
                let letter = DeadLetter::new(key, origin, error.code(), &error.to_string());
                (ticket, Outcome::DeadLetter(letter))
            }
        }
    }

    fn record(self, policy: &RecordPolicy) -> Result<Scored, RecordError> {
        match &policy.class {
            None => self.record_of_losses(policy),
            Some(class) => self.record_of_attribute(policy, class),
        }
    }

    fn record_of_attribute(self, policy: &RecordPolicy, class: &TokenClass) -> Result<Scored, RecordError> {
        let values: Vec<f32> = self.losses.iter().copied().map(probability).collect();
        let attribute = TokenAttribute::new(class.name.clone(), class.index, &values, policy.loss_format)?;
        let document = self.job.document;
        let key = self.job.key.unwrap_or_else(|| Bytes::copy_from_slice(document.id.as_bytes()));
        let tokens = document.tokens.len();
        let record = AttributedDocument {
            document,
            attribute,
            reference_model: policy.model.fingerprint,
            context: policy.context,
            precision: policy.model.precision,
        };
        Ok(Scored { key, payload: record.encode(), origin: self.job.payload, tokens })
    }

    fn record_of_losses(self, policy: &RecordPolicy) -> Result<Scored, RecordError> {
        let packed = |values: &[f32]| Losses::scored(values, policy.loss_format, self.is_first_predicted);
        let reference_losses = packed(&self.losses)?;
        let reference_entropies = policy.entropies.then(|| packed(&self.entropies)).transpose()?;
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
