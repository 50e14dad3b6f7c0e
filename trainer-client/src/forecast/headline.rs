//! What a forecast comes to, in a sentence or two, and what it does not know.

use super::estimate::Standing;
use super::sources::{ADAPTIVE, SourceForecast};
use super::words::{list, percent, with_interval};

/// Share of the tokens from which on a target that nobody has named is most of the stream.
const MOST: f64 = 0.5;

/// Without the model that is to be trained.
pub(super) fn no_base_model(command: &str) -> String {
    format!(
        "Without the model that will be trained nobody can say what would be kept, for a token is chosen by the difference of \
         both models' losses. Give that model with --init:\n    {command}"
    )
}

/// Where the sample holds nothing of a target.
pub(super) fn not_seen(unseen: &[&String], sources: &[SourceForecast], documents: usize) -> String {
    let found: Vec<&str> = sources.iter().map(|source| source.source.as_str()).collect();
    let names: Vec<&str> = unseen.iter().map(|name| name.as_str()).collect();
    format!(
        "None of the {documents} documents is of {}, so nothing can be said of it: check --target-source (the sources are {}), \
         or read more with --documents.",
        list(&names),
        list(&found)
    )
}

/// Where the reference is not better: on these sources, which were asked for, or on none at all.
pub(super) fn not_expected(targets: &[&SourceForecast]) -> String {
    if targets.is_empty() {
        return "Selection cannot be expected to help: on no source does the sample show the reference to be better than the \
                base model (a mean excess above 0, with its interval), so its losses do not say what is worth learning."
            .to_owned();
    }
    let names: Vec<&str> = targets.iter().map(|source| source.source.as_str()).collect();
    let found: Vec<String> = targets
        .iter()
        .map(|source| {
            let name = if targets.len() > 1 { format!("{}: ", source.source) } else { String::new() };
            let Some(found) = &source.against_base else { return format!("{name}no token can be compared") };
            let what = match (found.excess.standing(), found.excess.low) {
                (Standing::Worse, _) => "it is worse",
                (_, None) => "too few documents to tell, see --documents",
                _ => "it is not shown to be better",
            };
            format!("{name}{what}, mean excess {}", with_interval(&found.excess))
        })
        .collect();
    format!(
        "Selection cannot be expected to help on {}: the sample does not show the reference to be better there than the base \
         model ({}), and where it is not, its losses do not say what is worth learning.",
        list(&names),
        found.join("; ")
    )
}

/// Where the reference is better on these sources, which were named or found.
pub(super) fn may_help(better: &[&SourceForecast], all: &SourceForecast, are_named: bool) -> String {
    let names: Vec<&str> = better.iter().map(|source| source.source.as_str()).collect();
    let share: f64 = better.iter().map(|source| source.share_of_tokens).sum();
    let kept_of = |source: &SourceForecast| {
        source.against_base.as_ref().and_then(|found| found.kept.get(ADAPTIVE).copied())
    };
    let kept = kept_of(all).map_or(0.0, |kept| kept.share_of_source);
    let there: f64 = better.iter().filter_map(|source| kept_of(source)).map(|kept| kept.share_of_kept).sum();
    let most = if share > MOST && !are_named {
        " That is most of the stream, so there is little to leave out: name what the run is for with --target-source."
    } else {
        ""
    };
    format!(
        "Selection may help on {} ({} of the tokens): the reference is better there than the base model. `--keep adaptive` \
         would begin with {} of all tokens, and {} of those lie there.{most}",
        list(&names),
        percent(share),
        percent(kept),
        percent(there)
    )
}

/// What a forecast does not know; `map` is the model of the map, if that is looked at.
pub(super) fn limits(has_base: bool, map: Option<&str>) -> Vec<String> {
    let mut limits = vec![
        "The sample is the beginning of each partition: where the topic changes later on, so does all of this.".to_owned(),
    ];
    if has_base {
        limits.push(
            "Only the first step is forecast. The model changes with each step, and what is kept of the stream with it."
                .to_owned(),
        );
        limits.push(
            "That the reference is better is what selection needs, and no promise. Selection makes a model better at what \
             the reference knows, and worse at all other text."
                .to_owned(),
        );
    }
    if let Some(model) = map {
        limits.push(format!(
            "The map is of one small model ({model}), word problems from templates among other text, and one learning rate: it \
             says which way such streams went there, and gives no number for yours. A ratio whose interval overlaps the null \
             says nothing."
        ));
    }
    limits
}
