//! The token picture: a few documents, each token coloured by its reference loss, its excess loss, and by whether
//! a step would learn from it.

use sluice_feed::select::{Objective, Score, Side};

use super::html::{Html, escape};
use super::summary::{Comparison, RunSummary};
use crate::run::picture::{PictureDocument, PictureToken, TokenPicture};

/// Levels of a colour scale above its lightest.
const LEVELS: u32 = 8;
/// Reference loss of the darkest colour, in nats.
const REFERENCE_MAX: f32 = 8.0;
/// Excess loss of the darkest colours, in nats, either way.
const EXCESS_MAX: f32 = 4.0;

/// Pictures of every run that has one: that of the first selecting run open, the others folded.
pub(super) fn section(html: &mut Html, comparison: &Comparison<'_>) {
    let pictured =
        |run: &RunSummary<'_>| run.run.picture.as_ref().is_some_and(|picture| !picture.documents.is_empty());
    let mut runs: Vec<&RunSummary<'_>> = comparison.runs.iter().filter(|run| pictured(run)).collect();
    // A stable sort: slm first, then the others as given.
    runs.sort_by_key(|run| run.run.record.objective.name() != "slm");
    if runs.is_empty() {
        return;
    }
    html.section(
        "Tokens, one by one",
        "The same text three times: how hard each token is for the reference, how far the model lags behind the \
         reference there, and whether a step would learn from it. Hover over a token for its numbers.",
    );
    legend(html);
    for (index, run) in runs.iter().enumerate() {
        let Some(picture) = &run.run.picture else { continue };
        let open = if index == 0 { " open" } else { "" };
        html.push(&format!(
            "<details{open}><summary>{} ({}), after step {}</summary>",
            escape(run.name()),
            rule(&run.run.record.objective, picture),
            picture.step
        ));
        picture.documents.iter().for_each(|document| document_figure(html, document));
        html.push("</details>");
    }
    html.push("</section>");
}

/// What decided whether a token is shown as kept.
fn rule(objective: &Objective, picture: &TokenPicture) -> String {
    let Some(selection) = objective.selection() else { return "keeps every token".to_owned() };
    // Low values are kept first where the score is that of the reference alone, whose sign is turned.
    let (what, is_lowest) = match selection.score {
        Score::Random => return "kept: drawn at random".to_owned(),
        Score::Intersection { .. } => {
            return "kept: among the lowest reference losses and entropies".to_owned();
        }
        Score::Union { .. } => return "kept: among the lowest reference losses or entropies".to_owned(),
        Score::Excess => ("excess loss", false),
        Score::ReferenceLoss => ("reference loss", true),
        Score::ReferenceEntropy => ("reference entropy", true),
        Score::Loss => ("loss", false),
        Score::Entropy => ("entropy", false),
        Score::Improvement => ("improvement over its history", false),
        Score::Attribute { keep } => ("attribute", keep == Side::Below),
    };
    let unit = if matches!(selection.score, Score::Attribute { .. }) { "" } else { " nats" };
    match (picture.threshold, is_lowest) {
        (Some(threshold), false) => {
            format!("kept: {what} of at least {threshold:.2}{unit}, the threshold of its last step")
        }
        (Some(threshold), true) => {
            format!("kept: {what} of at most {:.2}{unit}, the threshold of its last step", -threshold)
        }
        (None, false) => format!("kept: highest {what} of the document"),
        (None, true) => format!("kept: lowest {what} of the document"),
    }
}

fn legend(html: &mut Html) {
    let swatches = |classes: Vec<String>| -> String {
        classes.iter().fold(String::new(), |row, class| row + "<i class=\"swatch " + class + "\"></i>")
    };
    let reference = swatches((0..=LEVELS).map(|level| format!("r{level}")).collect());
    let below = (1..=LEVELS).rev().map(|level| format!("n{level}"));
    let excess = swatches(
        below
            .chain(std::iter::once("p0".to_owned()))
            .chain((1..=LEVELS).map(|level| format!("p{level}")))
            .collect(),
    );
    html.push(&format!(
        "<ul class=\"legend\"><li>reference loss: 0 <span class=\"scale\">{reference}</span> {REFERENCE_MAX}+ nats</li>\
         <li>excess loss: −{EXCESS_MAX} (the model is ahead) <span class=\"scale\">{excess}</span> +{EXCESS_MAX} nats (it lags behind)</li>\
         <li><span class=\"tokens\"><b class=\"kept\">kept</b> <s class=\"dropped\">left out</s></span></li></ul>"
    ));
}

fn document_figure(html: &mut Html, document: &PictureDocument) {
    let source = if document.source.is_empty() { "no source named" } else { &document.source };
    let predicted = document.tokens.iter().filter(|token| token.current.is_some()).count();
    let kept = document.tokens.iter().filter(|token| token.kept).count();
    html.push(&format!(
        "<figure class=\"document\"><figcaption><b>{}</b> · {} · {kept} of {predicted} tokens kept</figcaption>\
         <div class=\"panels\">",
        escape(source),
        escape(&document.id)
    ));
    panel(html, "Reference loss", document, |token| match token.reference {
        Some(loss) => format!("r{}", level(loss, REFERENCE_MAX)),
        None => "first".to_owned(),
    });
    panel(html, "Excess loss", document, |token| match token.excess {
        Some(excess) if excess < 0.0 && level(-excess, EXCESS_MAX) > 0 => {
            format!("n{}", level(-excess, EXCESS_MAX))
        }
        Some(excess) => format!("p{}", level(excess.max(0.0), EXCESS_MAX)),
        None => "first".to_owned(),
    });
    panel(html, "Kept", document, |token| match (token.kept, token.current) {
        (true, _) => "kept".to_owned(),
        (false, Some(_)) => "dropped".to_owned(),
        (false, None) => "first".to_owned(),
    });
    html.push("</div></figure>");
}

fn panel(html: &mut Html, title: &str, document: &PictureDocument, class: impl Fn(&PictureToken) -> String) {
    // No line feeds of our own in here: the panel shows white space as it is.
    let mut text = format!("<div class=\"panel\"><h3>{title}</h3><p class=\"tokens\">");
    for token in &document.tokens {
        let (class, tooltip, shown) = (class(token), tooltip(token), shown(token));
        text.extend(["<span class=\"", &class, "\" title=\"", &tooltip, "\">", &shown, "</span>"]);
    }
    text.push_str("</p></div>");
    html.push(&text);
}

/// The numbers of a token.
fn tooltip(token: &PictureToken) -> String {
    let (Some(current), kept) = (token.current, if token.kept { "kept" } else { "left out" }) else {
        return "first token: nothing predicts it".to_owned();
    };
    let number = |loss: Option<f32>| loss.map_or("–".to_owned(), |loss| format!("{loss:.2}"));
    format!(
        "reference {}, current {current:.2}, excess {} nats: {kept}",
        number(token.reference),
        number(token.excess)
    )
}

/// The text of a token, with what cannot be seen made visible.
fn shown(token: &PictureToken) -> String {
    if token.text.is_empty() {
        return "·".to_owned();
    }
    escape(&token.text).replace('\r', "").replace('\n', "<i class=\"return\">↵</i>\n")
}

/// Colour level of a value between 0 and `max`.
fn level(value: f32, max: f32) -> u32 {
    (value / max * LEVELS as f32).round().clamp(0.0, LEVELS as f32) as u32
}
