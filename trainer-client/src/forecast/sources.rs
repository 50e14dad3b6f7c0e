//! What a sample comes to, source by source.

use std::collections::BTreeMap;

use serde::Serialize;
use sluice_feed::select::{Objective, Rule, Scope, Score, Selection, Signals, Thresholds, Turn};

use super::estimate::Estimate;
use super::sample::{Compared, DocumentSums, Sample};

/// The rules that are tried, as `--keep` takes them; the first is the one that needs no share.
pub const RULES: [&str; 3] = [ADAPTIVE, "0.6", "0.3"];
/// The rule that keeps what the reference predicts better.
pub const ADAPTIVE: &str = "adaptive";

/// What is known of the documents of one source, or of all.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SourceForecast {
    /// Its name.
    pub source: String,
    /// Documents of which a token is predicted.
    pub documents: u64,
    /// Tokens that are predicted.
    pub tokens: u64,
    /// Their share of the sample's.
    pub share_of_tokens: f64,
    /// Mean loss of the reference in nats, over the tokens that are compared; absent where there are none.
    pub reference_loss: Option<f64>,
    /// What the base model says; absent without one, and where no token can be compared.
    #[serde(flatten)]
    pub against_base: Option<AgainstBase>,
}

/// What the base model and the reference say of the same tokens. Losses are means in nats.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AgainstBase {
    /// Tokens that are compared: those that both models read under the same context.
    pub compared_tokens: u64,
    /// Loss of the base model.
    pub base_loss: f64,
    /// The base model's loss less the reference's.
    pub excess: Estimate,
    /// Share of the tokens that the base model predicts better than the reference does (excess below 0).
    pub share_below_zero: f64,
    /// What each of [`RULES`] would keep at the first step, if the sample were that step.
    pub kept: BTreeMap<&'static str, Kept>,
    /// Mean excess of the tokens that [`ADAPTIVE`] would keep; absent where it keeps none.
    pub excess_of_kept: Option<f64>,
    /// Mean excess of those that it would not keep.
    pub excess_of_rest: Option<f64>,
}

/// What a rule keeps of a source.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Kept {
    /// Tokens.
    pub tokens: u64,
    /// Their share of the source's tokens that are compared.
    pub share_of_source: f64,
    /// Their share of all tokens that the rule keeps.
    pub share_of_kept: f64,
}

/// The sources of a sample, the one with the highest mean excess first (without a base model the largest), and all of them
/// together.
pub fn by_source(sample: &Sample) -> anyhow::Result<(Vec<SourceForecast>, SourceForecast)> {
    let tallies = sample.has_base.then(|| Tallies::of(sample)).transpose()?;
    let tokens: u64 = sample.documents.iter().map(|document| document.tokens).sum();
    let of = |source: String, documents: &[&DocumentSums], index: Option<usize>| {
        let against_base = tallies.as_ref().and_then(|tallies| against_base(documents, tallies, index));
        let own: u64 = documents.iter().map(|document| document.tokens).sum();
        let compared: u64 = documents.iter().map(|document| document.compared).sum();
        let reference: f64 = documents.iter().map(|document| document.reference).sum();
        SourceForecast {
            source,
            documents: documents.iter().filter(|document| document.tokens > 0).count() as u64,
            tokens: own,
            share_of_tokens: share(own, tokens),
            reference_loss: (compared > 0).then(|| reference / compared as f64),
            against_base,
        }
    };
    let all: Vec<&DocumentSums> = sample.documents.iter().collect();
    let mut sources: Vec<SourceForecast> = sample
        .names
        .names()
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let own: Vec<&DocumentSums> =
                all.iter().copied().filter(|document| usize::from(document.source) == index).collect();
            of(name.clone(), &own, Some(index))
        })
        .filter(|source| source.documents > 0)
        .collect();
    let rank = |source: &SourceForecast| {
        let excess = source.against_base.as_ref().map(|found| found.excess.mean);
        // A source of which nothing can be compared comes last.
        (excess.unwrap_or(f64::NEG_INFINITY), source.tokens)
    };
    sources.sort_by(|left, right| {
        let (left, right) = (rank(left), rank(right));
        right.0.total_cmp(&left.0).then(right.1.cmp(&left.1))
    });
    Ok((sources, of("all".to_owned(), &all, None)))
}

/// Counts over single tokens, by the index of their source.
struct Tallies {
    /// With an excess below 0.
    below_zero: Vec<u64>,
    /// Kept by each of [`RULES`].
    kept: [Vec<u64>; RULES.len()],
    /// Sums of the excess of what [`ADAPTIVE`] keeps, and of all.
    excess_of_kept: Vec<f64>,
    excess: Vec<f64>,
}

impl Tallies {
    fn of(sample: &Sample) -> anyhow::Result<Self> {
        let sources = sample.names.names().len();
        let Compared { base, reference, sources: source_of } = &sample.compared;
        let excess_of = |token: usize| base[token] - reference[token];
        let mut tallies = Self {
            below_zero: vec![0; sources],
            kept: std::array::from_fn(|_| vec![0; sources]),
            excess_of_kept: vec![0.0; sources],
            excess: vec![0.0; sources],
        };
        for (token, &source) in source_of.iter().enumerate() {
            let excess = excess_of(token);
            tallies.below_zero[usize::from(source)] += u64::from(excess < 0.0);
            tallies.excess[usize::from(source)] += f64::from(excess);
        }
        for (rule, kept) in RULES.iter().zip(&mut tallies.kept) {
            for token in choose(&sample.compared, rule)? {
                let source = usize::from(source_of[token as usize]);
                kept[source] += 1;
                if *rule == ADAPTIVE {
                    tallies.excess_of_kept[source] += f64::from(excess_of(token as usize));
                }
            }
        }
        Ok(tallies)
    }
}

/// The tokens that a run with this `--keep` would learn from, if they were all of its step.
fn choose(compared: &Compared, rule: &str) -> anyhow::Result<Vec<u32>> {
    let rule: Rule = rule.parse().map_err(anyhow::Error::msg)?;
    let objective =
        Objective::Slm(Selection { score: Score::Excess, rule, scope: Scope::MicroBatch, warmup_steps: 0 });
    let signals = Signals { loss: &compared.base, reference_loss: &compared.reference, ..Signals::default() };
    let turn = Turn { seed: 0, step: 1, steps: 1, micro_batch: 0 };
    let row_len = compared.base.len().max(1);
    let choices = objective.select(&[signals], row_len, turn, &Thresholds::default());
    Ok(choices.into_iter().flat_map(|choice| choice.kept).collect())
}

/// What is known of the documents of the source with this index, or of all.
fn against_base(documents: &[&DocumentSums], tallies: &Tallies, index: Option<usize>) -> Option<AgainstBase> {
    let sums: Vec<(f64, u64)> = documents.iter().map(|document| document.excess()).collect();
    let excess = Estimate::of(&sums)?;
    let compared_tokens: u64 = sums.iter().map(|(_, tokens)| tokens).sum();
    let count = |counts: &[u64]| index.map_or_else(|| counts.iter().sum(), |index| counts[index]);
    let sum = |sums: &[f64]| index.map_or_else(|| sums.iter().sum(), |index| sums[index]);
    let kept: BTreeMap<&'static str, Kept> = RULES
        .into_iter()
        .zip(&tallies.kept)
        .map(|(rule, counts)| {
            let tokens = count(counts);
            let share_of_kept = share(tokens, counts.iter().sum());
            (rule, Kept { tokens, share_of_source: share(tokens, compared_tokens), share_of_kept })
        })
        .collect();
    let adaptive = count(&tallies.kept[0]);
    let excess_of_kept = sum(&tallies.excess_of_kept);
    let mean = |sum: f64, tokens: u64| (tokens > 0).then(|| sum / tokens as f64);
    Some(AgainstBase {
        compared_tokens,
        base_loss: documents.iter().map(|document| document.base).sum::<f64>() / compared_tokens as f64,
        excess,
        share_below_zero: share(count(&tallies.below_zero), compared_tokens),
        kept,
        excess_of_kept: mean(excess_of_kept, adaptive),
        excess_of_rest: mean(sum(&tallies.excess) - excess_of_kept, compared_tokens - adaptive),
    })
}

/// A part of a whole; 0 of nothing.
pub(super) fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
