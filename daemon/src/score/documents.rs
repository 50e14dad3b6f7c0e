//! Whole documents at once, without Kafka: for the command line, tests and measurements.

use std::sync::Arc;

use sluice_schemas::record::ContextPolicy;

use super::{Score, probability};
use crate::batch::{Ladder, TokenClass, plan, windows_of};

/// The scores of one document's tokens.
#[derive(Clone, Debug)]
pub struct DocumentScores {
    /// Losses in nats, one for each token; NaN where nothing stood before it. Of a token classifier those of its class.
    pub losses: Vec<f32>,
    /// Entropies in nats, likewise; empty where the scorer gives none.
    pub entropies: Vec<f32>,
}

impl DocumentScores {
    /// Probabilities of a token classifier's class, one for each token.
    pub fn probabilities(&self) -> Vec<f32> {
        self.losses.iter().copied().map(probability).collect()
    }

    /// The losses of the tokens that have a prediction.
    pub fn predicted(&self) -> impl Iterator<Item = f32> + '_ {
        self.losses.iter().copied().filter(|loss| !loss.is_nan())
    }
}

/// Scores `documents` in batches of at most `tokens_max` padded tokens.
pub fn score_documents(
    scorer: &mut dyn Score,
    documents: &[Arc<[u32]>],
    policy: ContextPolicy,
    tokens_max: usize,
    ladder: Ladder,
) -> anyhow::Result<Vec<DocumentScores>> {
    classify_documents(scorer, documents, (policy, None), tokens_max, ladder)
}

/// The same of a token classifier, for the class that is asked for: its losses.
pub fn classify_documents(
    scorer: &mut dyn Score,
    documents: &[Arc<[u32]>],
    (policy, class): (ContextPolicy, Option<&TokenClass>),
    tokens_max: usize,
    ladder: Ladder,
) -> anyhow::Result<Vec<DocumentScores>> {
    let mut scores: Vec<DocumentScores> = documents
        .iter()
        .map(|tokens| DocumentScores { losses: vec![f32::NAN; tokens.len()], entropies: Vec::new() })
        .collect();
    let all = (0..).zip(documents).flat_map(|(id, tokens)| windows_of(id, tokens, policy, class)).collect();
    for batch in plan(all, tokens_max, ladder) {
        let scored = scorer.score(&batch)?;
        let mut next = 0;
        for window in &batch.windows {
            let document = &mut scores[window.document as usize];
            let (to, from) = (window.scored(), next..next + window.scored().len());
            next = from.end;
            document.losses[to.clone()].copy_from_slice(&scored.losses[from.clone()]);
            if !scored.entropies.is_empty() {
                document.entropies.resize(document.losses.len(), f32::NAN);
                document.entropies[to].copy_from_slice(&scored.entropies[from]);
            }
        }
    }
    Ok(scores)
}
