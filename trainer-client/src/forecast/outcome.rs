//! What a sample comes to: which sources a run can learn from, whether it can be expected to help, and where the stream lies in
//! the map.

use serde::Serialize;
use sluice_schemas::fingerprint::Fingerprint;

use super::estimate::{Estimate, Standing};
use super::headline;
use super::map::{Map, Noise, RuleRatio};
use super::sample::{DocumentSums, Ending, Sample};
use super::sources::{AgainstBase, SourceForecast, by_source, share};

/// What the sample was taken of, as people gave it.
#[derive(Clone, Debug, Serialize)]
pub struct About {
    /// What the documents are of: a topic, a file, so many files.
    pub documents_of: String,
    /// Folder of the model that is to be trained.
    pub base_model: Option<String>,
    /// Tokens of a sequence that it was measured in.
    pub sequence_length: Option<usize>,
    /// Sources that the run is meant for.
    pub target_sources: Vec<String>,
    /// The command that makes a forecast with a base model, where there is none.
    #[serde(skip)]
    pub with_base: String,
}

/// Whether selection can be expected to help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nobody can say without the model that is to be trained.
    NoBaseModel,
    /// A source that the run is meant for is not in the sample.
    TargetNotSeen,
    /// The reference is not better than the base model: on no source, or not on one that the run is meant for.
    NotExpectedToHelp,
    /// The reference is better on what the run is meant for, or on some source.
    MayHelp,
}

/// What the run is for: the sources that were named, or else those on which the reference is better.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Target {
    /// Their names.
    pub sources: Vec<String>,
    /// Mean excess in nats of all of them together, over the tokens that are compared.
    pub excess: Estimate,
    /// Share of the sample's predicted tokens that is in their documents.
    pub share_of_tokens: f64,
    /// Share of the tokens there, as far as they are compared, that the base model predicts better.
    pub share_below_zero: f64,
}

/// What the map says of streams like this one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MapRow {
    /// The command that made the map.
    pub command: String,
    /// What was trained for it.
    pub model: String,
    /// Share of the target in the nearest streams, in tokens of a hundred.
    pub rarity_percent: u8,
    /// Whether the target is rarer or more frequent here than in any stream of the map.
    pub is_outside: bool,
    /// A stream for each level of noise.
    pub cells: Vec<MapCell>,
}

/// A stream of the map.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MapCell {
    /// What stood inside the target's documents.
    pub noise: Noise,
    /// Interval of what is chance; an absent end is "never".
    pub null: [Option<f64>; 2],
    /// Each rule's ratio, and whether it says nothing.
    pub rules: Vec<MapRule>,
}

/// What a rule took in a stream of the map.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MapRule {
    /// The ratio.
    #[serde(flatten)]
    pub ratio: RuleRatio,
    /// Whether its interval overlaps that of chance.
    pub says_nothing: bool,
}

/// All that is said.
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    /// What it comes to, in a sentence or two.
    pub headline: String,
    /// The same for programs.
    pub verdict: Verdict,
    /// What was asked.
    #[serde(flatten)]
    pub about: About,
    /// The model that scored the first document.
    pub reference_model: Option<Fingerprint>,
    /// Documents that were read.
    pub documents_read: u64,
    /// Why there are no more.
    pub ending: Ending,
    /// All sources together.
    pub all: SourceForecast,
    /// Each source, the one with the highest mean excess first.
    pub sources: Vec<SourceForecast>,
    /// What the run is for; absent without a base model, and where there is no such source.
    pub target: Option<Target>,
    /// Whether the map has been measured in this build.
    pub is_map_measured: bool,
    /// What the map says; absent where it is not measured, or there is no target.
    pub map: Option<MapRow>,
    /// What all of this does not know.
    pub limits: Vec<String>,
}

impl Forecast {
    /// What a sample comes to. Fails where it holds no token that the reference predicts, or none that can be compared.
    pub fn of(sample: &Sample, about: About, map: &Map) -> anyhow::Result<Self> {
        let (sources, all) = by_source(sample)?;
        anyhow::ensure!(
            all.reference_loss.is_some(),
            "the sample holds no token that can be compared: its {} documents have {} predicted tokens, and none with a \
             reference loss under the context that a sequence gives it; read more with --documents, or longer sequences with \
             --sequence-length",
            sample.documents.len(),
            all.tokens
        );
        let target = sample.has_base.then(|| Target::of(sample, &sources, &about.target_sources)).flatten();
        let (verdict, headline) = verdict(sample, (&sources, &all), target.as_ref(), &about);
        let row = target.as_ref().and_then(|target| MapRow::near(map, target.share_of_tokens));
        let is_map_measured = !map.cells.is_empty();
        Ok(Self {
            headline,
            verdict,
            reference_model: sample.reference_model,
            documents_read: sample.documents.len() as u64,
            ending: sample.ending,
            limits: headline::limits(sample.has_base, row.as_ref().map(|row| row.model.as_str())),
            about,
            all,
            sources,
            target,
            is_map_measured,
            map: row,
        })
    }
}

impl Target {
    fn of(sample: &Sample, sources: &[SourceForecast], named: &[String]) -> Option<Self> {
        let is_target = |source: &&SourceForecast| {
            if named.is_empty() {
                standing(source) == Some(Standing::Better)
            } else {
                named.contains(&source.source)
            }
        };
        let own: Vec<&SourceForecast> = sources.iter().filter(is_target).collect();
        let names = sample.names.names();
        let is_own = |document: &&DocumentSums| {
            own.iter().any(|source| source.source == names[usize::from(document.source)])
        };
        let sums: Vec<(f64, u64)> =
            sample.documents.iter().filter(is_own).map(DocumentSums::excess).collect();
        let excess = Estimate::of(&sums)?;
        let compared: Vec<&AgainstBase> =
            own.iter().filter_map(|source| source.against_base.as_ref()).collect();
        let below_zero: f64 =
            compared.iter().map(|found| found.share_below_zero * found.compared_tokens as f64).sum();
        let compared_tokens: u64 = compared.iter().map(|found| found.compared_tokens).sum();
        let tokens = sources.iter().map(|source| source.tokens).sum();
        Some(Self {
            sources: own.iter().map(|source| source.source.clone()).collect(),
            excess,
            share_of_tokens: share(own.iter().map(|source| source.tokens).sum(), tokens),
            share_below_zero: below_zero / compared_tokens as f64,
        })
    }
}

impl MapRow {
    fn near(map: &Map, share: f64) -> Option<Self> {
        let near = map.near(share)?;
        let rule =
            |ratio: &RuleRatio, null| MapRule { ratio: ratio.clone(), says_nothing: ratio.overlaps(null) };
        let cells = near.cells.iter().map(|cell| MapCell {
            noise: cell.noise,
            null: cell.null,
            rules: cell.rules.iter().map(|ratio| rule(ratio, cell.null)).collect(),
        });
        Some(Self {
            command: map.command.clone(),
            model: map.model.clone(),
            rarity_percent: near.rarity_percent,
            is_outside: near.is_outside,
            cells: cells.collect(),
        })
    }
}

fn standing(source: &SourceForecast) -> Option<Standing> {
    source.against_base.as_ref().map(|found| found.excess.standing())
}

/// What it comes to, and that in words. A source that was named and has too few documents for an interval is judged by all that
/// were named.
fn verdict(
    sample: &Sample,
    (sources, all): (&[SourceForecast], &SourceForecast),
    target: Option<&Target>,
    about: &About,
) -> (Verdict, String) {
    if !sample.has_base {
        return (Verdict::NoBaseModel, headline::no_base_model(&about.with_base));
    }
    let is_named = |source: &&SourceForecast| about.target_sources.contains(&source.source);
    let are_named = !about.target_sources.is_empty();
    let candidates: Vec<&SourceForecast> =
        sources.iter().filter(|source| !are_named || is_named(source)).collect();
    let is_seen = |name: &&String| candidates.iter().any(|source| source.source == **name);
    let unseen: Vec<&String> = about.target_sources.iter().filter(|name| !is_seen(name)).collect();
    if !unseen.is_empty() {
        return (Verdict::TargetNotSeen, headline::not_seen(&unseen, sources, sample.documents.len()));
    }
    let all_named = target.filter(|_| are_named).map(|target| target.excess.standing());
    let is_better = |source: &&SourceForecast| {
        let found = source.against_base.as_ref().map(|found| found.excess);
        let is_too_few = found.is_some_and(|excess| excess.low.is_none());
        let standing = if is_too_few { all_named } else { found.map(|excess| excess.standing()) };
        standing == Some(Standing::Better)
    };
    let (better, others): (Vec<&SourceForecast>, Vec<&SourceForecast>) =
        candidates.into_iter().partition(is_better);
    // Of all sources some are always worse; of those that were named none may be.
    if better.is_empty() || (are_named && !others.is_empty()) {
        let named = if are_named { others.as_slice() } else { &[] };
        return (Verdict::NotExpectedToHelp, headline::not_expected(named));
    }
    (Verdict::MayHelp, headline::may_help(&better, all, are_named))
}

#[cfg(test)]
#[path = "outcome_tests.rs"]
mod tests;
