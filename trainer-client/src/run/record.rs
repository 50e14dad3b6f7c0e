//! What was asked of a run: `run.json`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sluice_feed::select::Objective;
use sluice_schemas::fingerprint::Fingerprint;

use crate::model::backward::Backward;
use crate::training::schedule::Schedule;

/// The setting of `run.json` that says what gradients flow through.
pub const BACKWARD_KEY: &str = "backward";

/// The content of `run.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunRecord {
    /// The command that made the run: `run` or `reference`.
    pub command: String,
    /// What is minimised.
    pub objective: Objective,
    /// Seed of initial weights, shuffles and random draws.
    pub seed: u64,
    /// Sequences in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in an optimizer step.
    pub accumulate: usize,
    /// Tokens in a sequence.
    pub sequence_length: usize,
    /// The learning rate over the run, and its length in steps.
    pub schedule: Schedule,
    /// Fingerprint of the tokenizer.
    pub tokenizer: Fingerprint,
    /// Fingerprint of the model that made the reference losses; absent without such losses.
    pub reference_model: Option<Fingerprint>,
    /// Digest of the weights file before the first step: equal for runs that started alike.
    pub initial_weights: Fingerprint,
    /// The rest of the settings, for people: model, optimizer, stream.
    pub settings: BTreeMap<String, serde_json::Value>,
    /// Versions of what ran.
    pub versions: BTreeMap<String, String>,
}

impl RunRecord {
    /// What gradients flow through; in runs of before there was such a setting they were exact.
    pub fn backward(&self) -> Backward {
        let backward = self.settings.get(BACKWARD_KEY).cloned();
        backward.and_then(|name| serde_json::from_value(name).ok()).unwrap_or_default()
    }

    /// Name of the first setting in which a run that is to go on after `step` differs from this one; `None` if the steps up to
    /// there would have been the same. Where to read and how often to look may differ, and so may what is yet to come of the
    /// learning rate: a run can be made longer where that changes nothing of its past.
    pub fn first_difference(&self, other: &Self, step: u64) -> Option<&'static str> {
        let keep_at = |record: &Self, step: u64| {
            let keep = record.objective.selection()?.keep_at(step, record.schedule.steps)?;
            Some(keep.get().to_bits())
        };
        let setting = |name: &str| self.settings.get(name) == other.settings.get(name);
        let of_stream = |name: &str| {
            let stream = |record: &Self| record.settings.get("stream").and_then(|s| s.get(name).cloned());
            stream(self) == stream(other)
        };
        // Runs of before there was such a setting were in single precision.
        let precision = |record: &Self| record.settings.get("precision").cloned().unwrap_or("f32".into());
        [
            ("the command", self.command == other.command),
            ("the selection (--objective, --score, --keep, --scope ...)", self.objective == other.objective),
            ("--seed", self.seed == other.seed),
            ("--batch-size", self.batch_size == other.batch_size),
            ("--accumulate", self.accumulate == other.accumulate),
            ("--sequence-length", self.sequence_length == other.sequence_length),
            (
                "the learning rate, its schedule or --steps",
                self.schedule == other.schedule || self.schedule.agrees_up_to(&other.schedule, step),
            ),
            (
                "--steps, over which --keep falls,",
                (1..=step).all(|step| keep_at(self, step) == keep_at(other, step)),
            ),
            ("--tokenizer", self.tokenizer == other.tokenizer),
            ("the model", setting("model")),
            ("the optimizer", setting("optimizer")),
            ("--backward", self.backward() == other.backward()),
            ("--precision", precision(self) == precision(other)),
            ("--attend-across-documents, --first-token or --unequal-contexts", setting("packing")),
            ("--history or --history-decay", setting("history")),
            ("--topic", of_stream("topic")),
            ("--epochs, --until-end or --follow", of_stream("extent")),
            ("--shuffle-buffer", of_stream("shuffle_buffer")),
            ("the documents of the topic", of_stream("documents") && of_stream("tokens")),
        ]
        .into_iter()
        .find_map(|(name, is_same)| (!is_same).then_some(name))
    }
}
