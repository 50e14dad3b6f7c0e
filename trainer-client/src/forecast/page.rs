//! A forecast in words and tables.

use super::estimate::Standing;
use super::outcome::{Forecast, MapCell, MapRule, Verdict};
use super::sample::{Ending, TOKENS_MAX};
use super::sources::{ADAPTIVE, AgainstBase, RULES, SourceForecast};
use super::words::{interval, list, nats, optional, percent, ratio, signed};
use crate::report::columns::columns;

/// All of it, for a terminal.
pub fn page(forecast: &Forecast) -> String {
    let mut parts = vec![forecast.headline.clone(), sample(forecast)];
    parts.push(match forecast.verdict {
        Verdict::NoBaseModel => reference_table(forecast),
        _ => loss_table(forecast),
    });
    if forecast.verdict != Verdict::NoBaseModel {
        parts.push(kept_table(forecast));
        parts.extend(map(forecast));
    }
    let limits = forecast.limits.iter().map(|limit| format!("- {limit}"));
    parts.push(
        ["What this does not know".to_owned()].into_iter().chain(limits).collect::<Vec<_>>().join("\n"),
    );
    parts.join("\n\n")
}

/// What was looked at.
fn sample(forecast: &Forecast) -> String {
    let about = &forecast.about;
    let what = match forecast.ending {
        Ending::Full => "the first of each partition",
        Ending::StreamEnded => "all there are",
        Ending::TokensMax => "as many as fit in memory",
        Ending::Stopped => "stopped by a signal",
    };
    let all = &forecast.all;
    let mut facts = vec![format!(
        "Sample: {} documents of {} ({what}), {} predicted tokens",
        forecast.documents_read, about.documents_of, all.tokens
    )];
    facts.extend(forecast.reference_model.map(|model| format!("reference model {}", model.short())));
    if let (Some(base), Some(len)) = (&about.base_model, about.sequence_length) {
        facts.push(format!("base model {base}, in sequences of {len} tokens"));
    }
    let mut sentences = vec![format!("{}.", facts.join("; "))];
    if forecast.ending == Ending::TokensMax {
        sentences.push(format!("It ends at {TOKENS_MAX} tokens, whose losses are held in memory."));
    }
    let compared = all.against_base.as_ref().map_or(all.tokens, |found| found.compared_tokens);
    if compared < all.tokens {
        sentences.push(format!(
            "{} of the tokens are left out below, for a sequence holds less context than the reference read them with; a run \
             cannot choose them either.",
            all.tokens - compared
        ));
    }
    sentences.join(" ")
}

/// Sources by what the reference says alone.
fn reference_table(forecast: &Forecast) -> String {
    let header = ["source", "documents", "tokens", "of all", "reference loss"].map(str::to_owned);
    let row = |source: &SourceForecast| {
        let mut row = counts(source).to_vec();
        row.push(optional(source.reference_loss, nats));
        row
    };
    let mut rows = vec![header.to_vec()];
    rows.extend(forecast.sources.iter().chain([&forecast.all]).map(row));
    format!("Mean losses in nats\n{}", columns(&rows, 1).trim_end())
}

/// Sources by what both models say.
fn loss_table(forecast: &Forecast) -> String {
    let header = [
        "source",
        "the reference is",
        "documents",
        "tokens",
        "of all",
        "base",
        "reference",
        "excess",
        "95 %",
    ];
    let row = |source: &SourceForecast| {
        let [name, documents, tokens, share] = counts(source);
        let Some(found) = &source.against_base else {
            return vec![name, "not comparable".to_owned(), documents, tokens, share];
        };
        let AgainstBase { base_loss, excess, .. } = found;
        let standing = match excess.standing() {
            Standing::Better => "better",
            Standing::Worse => "worse",
            Standing::Unclear => "not shown better",
        };
        vec![
            name,
            standing.to_owned(),
            documents,
            tokens,
            share,
            nats(*base_loss),
            optional(source.reference_loss, nats),
            signed(excess.mean),
            interval(excess).unwrap_or_else(|| "too few documents".to_owned()),
        ]
    };
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(forecast.sources.iter().chain([&forecast.all]).map(row));
    format!(
        "Mean losses in nats; excess is the base model's loss less the reference's, with its interval over documents\n{}",
        columns(&rows, 2).trim_end()
    )
}

/// What a first step would keep.
fn kept_table(forecast: &Forecast) -> String {
    let mut header: Vec<String> =
        ["source", "adaptive keeps", "excess of those", "of the rest"].map(str::to_owned).to_vec();
    header.extend(RULES.iter().map(|rule| format!("part of {rule}'s")));
    let row = |source: &SourceForecast| {
        let found = source.against_base.as_ref()?;
        let mut row = vec![source.source.clone()];
        row.push(optional(found.kept.get(ADAPTIVE).map(|kept| kept.share_of_source), percent));
        row.push(optional(found.excess_of_kept, signed));
        row.push(optional(found.excess_of_rest, signed));
        let shares = RULES.iter().map(|rule| found.kept.get(rule).map(|kept| kept.share_of_kept));
        row.extend(shares.map(|share| optional(share, percent)));
        Some(row)
    };
    let mut rows = vec![header];
    rows.extend(forecast.sources.iter().chain([&forecast.all]).filter_map(row));
    format!(
        "What a first step would keep: by `--keep adaptive` (an excess of at least 0, and no less than 5 % of all tokens) the \
         share of each source's tokens; and of all that `--keep adaptive`, 0.6 and 0.3 keep, the part that falls on it\n{}",
        columns(&rows, 1).trim_end()
    )
}

/// Where the stream lies in the map.
fn map(forecast: &Forecast) -> Vec<String> {
    if !forecast.is_map_measured {
        return vec![
            "The map of streams in which selection pays has not been measured in this build, so nothing is said of it.".to_owned(),
        ];
    }
    let (Some(target), Some(row)) = (&forecast.target, &forecast.map) else {
        return vec![
            "The map is not looked at, for there is no source on which selection may help.".to_owned(),
        ];
    };
    let names: Vec<&str> = target.sources.iter().map(String::as_str).collect();
    let outside = if row.is_outside { ", beyond which this stream lies" } else { "" };
    let place = format!(
        "In the map: {} of the tokens are of {}; the nearest row of the map is {} %{outside}. {} of the tokens there have an \
         excess below 0. That may be noise inside the documents, or text that the reference is no better at, and cannot be told \
         from losses: all levels of noise are listed.",
        percent(target.share_of_tokens),
        list(&names),
        row.rarity_percent,
        percent(target.share_below_zero)
    );
    let header = ["noise inside documents", "rule", "tokens", "95 %", "null", ""].map(str::to_owned);
    let mut rows = vec![header.to_vec()];
    rows.extend(row.cells.iter().flat_map(|cell| cell.rules.iter().map(|rule| map_row(cell, rule))));
    let table = format!(
        "Tokens to plain training's final loss on the target, over plain training's (`{}`); the null is plain training against \
         itself\n{}",
        row.command,
        columns(&rows, 2).trim_end()
    );
    vec![place, table]
}

fn map_row(cell: &MapCell, rule: &MapRule) -> Vec<String> {
    let [low, high] = cell.null;
    let word = match rule.ratio.tokens {
        _ if rule.says_nothing => "says nothing",
        Some(ratio) if ratio < 1.0 => "fewer tokens",
        _ => "more tokens",
    };
    vec![
        cell.noise.words().to_owned(),
        rule.ratio.rule.clone(),
        ratio(rule.ratio.tokens),
        format!("{} to {}", ratio(rule.ratio.low), ratio(rule.ratio.high)),
        format!("{} to {}", ratio(low), ratio(high)),
        word.to_owned(),
    ]
}

/// Name, documents, tokens and their share.
fn counts(source: &SourceForecast) -> [String; 4] {
    [
        source.source.clone(),
        source.documents.to_string(),
        source.tokens.to_string(),
        percent(source.share_of_tokens),
    ]
}
