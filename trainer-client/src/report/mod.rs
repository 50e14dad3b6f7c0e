//! Runs compared on one self-contained HTML page, readable without scripts, network or prior knowledge.

mod categories;
pub mod columns;
mod curves;
pub mod dynamics;
mod html;
pub mod line_chart;
mod scores;
mod settings;
mod shares;
mod summary;
mod table;
mod token_picture;

use html::{Html, escape};
use summary::Comparison;

use crate::model::ModelConfig;
use crate::run::recorded::RecordedRun;

const STYLE: &str = include_str!("style.css");

/// The whole page. `scored_by` is the shape of the reference, whose forward pass is counted as compute where it is given.
pub fn page(title: &str, runs: &[RecordedRun], scored_by: Option<&ModelConfig>) -> String {
    let comparison = Comparison::of(runs, scored_by);
    let mut body = Html::default();
    body.push(&format!("<header><h1>{}</h1>", escape(title)));
    body.push(INTRODUCTION);
    body.push("</header>");
    table::section(&mut body, &comparison);
    curves::evaluation_section(&mut body, &comparison);
    curves::selection_section(&mut body, &comparison);
    curves::keep_section(&mut body, &comparison);
    scores::section(&mut body, &comparison);
    categories::section(&mut body, &comparison);
    shares::section(&mut body, &comparison);
    token_picture::section(&mut body, &comparison);
    settings::section(&mut body, &comparison);
    body.push("<footer>Made by <code>sluice-train report</code>; losses are in nats (natural logarithms), lower is better.</footer>");
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{}</body>\n</html>\n",
        escape(title),
        body.into_string()
    )
}

/// The headline table for a terminal.
pub fn text_table(runs: &[RecordedRun], scored_by: Option<&ModelConfig>) -> String {
    table::text(&Comparison::of(runs, scored_by))
}

const INTRODUCTION: &str = "\
<p class=\"lead\">A model can learn from every token of a text, or only from those worth it. \
<b>Selective language modeling</b> (slm) compares two losses of each token and keeps the tokens where the model in \
training lags furthest behind a reference.</p>\
<dl class=\"terms\">\
<div><dt>Reference loss</dt><dd>how surprised a model trained on curated text is by the token</dd></div>\
<div><dt>Current loss</dt><dd>how surprised the model in training is by it</dd></div>\
<div><dt>Excess loss</dt><dd>current minus reference: high where there is something left to learn; below zero on text \
that the reference, which knows its own subject only, finds harder</dd></div>\
<div><dt>clm</dt><dd>causal language modeling, the first control: learn from every token</dd></div>\
<div><dt>random</dt><dd>the second control: keep as many tokens as slm, drawn at random</dd></div>\
</dl>";
