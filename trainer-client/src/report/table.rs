//! The headline table, on the page and in the terminal.

use super::columns::columns;
use super::html::{Html, PALETTE, count, duration, escape, percent};
use super::summary::{Comparison, RunSummary};
use crate::run::learning_curve::AVERAGED;

/// Rows of cells, the first column being names.
struct Table {
    headers: Vec<String>,
    rows: Vec<Vec<Cell>>,
}

#[derive(Clone, Default)]
struct Cell {
    text: String,
    is_best: bool,
}

impl Table {
    fn of(comparison: &Comparison<'_>) -> Self {
        let mut headers: Vec<String> = ["run", "objective", "kept"].map(str::to_owned).into();
        for set in &comparison.sets {
            headers.push(format!("{set}: final loss"));
            headers.push(format!("{set}: best loss"));
        }
        headers.extend(["tokens seen", "tokens learnt from", "training time"].map(str::to_owned));
        if let (Some(_), Some(target)) = (comparison.plain(), comparison.sets.first()) {
            headers.push(format!("tokens to clm's final loss on {target}"));
            if comparison.knows_compute() {
                headers.push("compute to it, scoring counted".to_owned());
            }
        }
        let rows = comparison.runs.iter().map(|run| row(comparison, run)).collect();
        Self { headers, rows }
    }
}

fn row(comparison: &Comparison<'_>, run: &RunSummary<'_>) -> Vec<Cell> {
    let objective = &run.run.record.objective;
    let mut cells = vec![
        Cell::plain(run.name().to_owned()),
        Cell::plain(objective.name().to_owned()),
        Cell::plain(percent(run.tokens_kept() as f64 / run.tokens().max(1) as f64)),
    ];
    for set in &comparison.sets {
        for of_run in [RunSummary::final_loss, RunSummary::best_loss] {
            let lowest = comparison.runs.iter().filter_map(|run| of_run(run, set)).min_by(f64::total_cmp);
            let loss = of_run(run, set);
            let is_best = comparison.runs.len() > 1 && loss.is_some() && loss == lowest;
            cells.push(Cell { text: loss.map_or("–".to_owned(), |loss| format!("{loss:.3}")), is_best });
        }
    }
    cells.push(Cell::plain(count(run.tokens() as f64)));
    cells.push(Cell::plain(count(run.tokens_kept() as f64)));
    cells.push(Cell::plain(duration(run.seconds())));
    if comparison.plain().is_some() && !comparison.sets.is_empty() {
        cells.push(Cell::plain(match run.tokens_to_plain {
            _ if run.is_plain() => "1 (by definition)".to_owned(),
            Some(ratio) => format!("{ratio:.2} of clm's"),
            None => "not reached".to_owned(),
        }));
        if comparison.knows_compute() {
            cells.push(Cell::plain(match run.compute_to_plain {
                _ if run.is_plain() => "1 (by definition)".to_owned(),
                Some(ratio) => format!("{ratio:.2} of clm's"),
                None => "–".to_owned(),
            }));
        }
    }
    cells
}

impl Cell {
    fn plain(text: String) -> Self {
        Self { text, is_best: false }
    }
}

/// The table on the page, with what it says in words.
pub(super) fn section(html: &mut Html, comparison: &Comparison<'_>) {
    html.section(
        "What came of it",
        "One row per run; losses are on the held-out text given with <code>--eval</code>, lower is better, and the lowest \
         of each column is in bold. Training time leaves evaluations out.",
    );
    let table = Table::of(comparison);
    html.push("<div class=\"scroll\"><table><thead><tr>");
    for header in &table.headers {
        html.push(&format!("<th scope=\"col\">{}</th>", escape(header)));
    }
    html.push("</tr></thead><tbody>");
    for (index, row) in table.rows.iter().enumerate() {
        html.push("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let text = escape(&cell.text);
            html.push(&match (column, cell.is_best) {
                (0, _) => {
                    format!("<th scope=\"row\"><i class=\"dot series-{}\"></i>{text}</th>", index % PALETTE)
                }
                (_, true) => format!("<td><b>{text}</b></td>"),
                (_, false) => format!("<td>{text}</td>"),
            });
        }
        html.push("</tr>");
    }
    html.push("</tbody></table></div><ul class=\"findings\">");
    for finding in findings(comparison) {
        html.push(&format!("<li>{}</li>", escape(&finding)));
    }
    html.push("</ul></section>");
}

/// What somebody should know who hopes for as much on another stream.
const LIMITS: &str = "Selection brings nothing where most of the stream is clean text of the target: plain training learns it as \
                      fast. It brings nothing where the reference is no better on the target than the model in training, for its \
                      losses then do not say what is worth learning. And it takes from the rest of the text what it gives to the \
                      target.";

/// Differences of the target loss below this are not worth a word, in nats.
const NOISE_NATS: f64 = 0.01;

/// What the numbers say, whichever way they fell.
fn findings(comparison: &Comparison<'_>) -> Vec<String> {
    let mut findings = Vec::new();
    if let (Some(plain), Some(&target)) = (comparison.plain(), comparison.sets.first()) {
        for run in comparison.runs.iter().filter(|run| !run.is_plain() && run.run.record.command == "run") {
            let (Some(loss), Some(plain_loss)) = (run.final_loss(target), plain.final_loss(target)) else {
                continue;
            };
            let difference = loss - plain_loss;
            let word = if difference < 0.0 { "below" } else { "above" };
            let reached = match run.tokens_to_plain {
                Some(ratio) => {
                    let compute = run.compute_to_plain.map_or(String::new(), |compute| {
                        format!(" and {compute:.2} of the compute, that of scoring included")
                    });
                    format!(
                        "it reached {}'s final loss after {ratio:.2} of the tokens{compute}",
                        plain.name()
                    )
                }
                None => format!("it did not reach {}'s final loss", plain.name()),
            };
            let standing = if difference.abs() < NOISE_NATS {
                format!("{} ended where {} did", run.name(), plain.name())
            } else {
                format!("{} ended {:.3} nats {word} {}", run.name(), difference.abs(), plain.name())
            };
            findings.push(format!("On {target}, {standing} ({loss:.3} against {plain_loss:.3}); {reached}."));
            // What selection costs elsewhere belongs beside what it brings.
            for &set in comparison.sets.iter().skip(1) {
                if let (Some(loss), Some(plain_loss)) = (run.final_loss(set), plain.final_loss(set)) {
                    let difference = loss - plain_loss;
                    let word = if difference < 0.0 { "below" } else { "above" };
                    findings.push(format!(
                        "On {set}, {} ended {:.3} nats {word} {} ({loss:.3} against {plain_loss:.3}).",
                        run.name(),
                        difference.abs(),
                        plain.name()
                    ));
                }
            }
        }
        findings.push(format!(
            "One run of each kind, from one seed: small differences are chance. Final losses that runs are to reach are means of \
             {AVERAGED} evaluations."
        ));
        findings.push(LIMITS.to_owned());
    }
    findings.extend(conditions(comparison));
    findings
}

/// Whether the runs can be compared at all.
fn conditions(comparison: &Comparison<'_>) -> Option<String> {
    let runs: Vec<_> = comparison.runs.iter().filter(|run| run.run.record.command == "run").collect();
    let (first, rest) = runs.split_first()?;
    if rest.is_empty() {
        return None;
    }
    let record = &first.run.record;
    let mut differences = Vec::new();
    for (what, differs) in [
        ("initial weights", rest.iter().any(|run| run.run.record.initial_weights != record.initial_weights)),
        ("tokenizers", rest.iter().any(|run| run.run.record.tokenizer != record.tokenizer)),
        ("reference models", rest.iter().any(|run| run.run.record.reference_model != record.reference_model)),
        ("schedules", rest.iter().any(|run| run.run.record.schedule != record.schedule)),
        ("numbers of tokens seen", rest.iter().any(|run| run.tokens() != first.tokens())),
    ] {
        if differs {
            differences.push(what);
        }
    }
    Some(if differences.is_empty() {
        format!(
            "All runs began with the same weights ({}) and saw the same number of tokens under the same schedule.",
            record.initial_weights.short()
        )
    } else {
        format!("Compare with care: the runs differ in their {}.", differences.join(", "))
    })
}

/// The table and what it says, for a terminal.
pub(super) fn text(comparison: &Comparison<'_>) -> String {
    let table = Table::of(comparison);
    let mut lines: Vec<Vec<String>> = vec![table.headers];
    lines.extend(table.rows.iter().map(|row| {
        row.iter()
            .map(|cell| if cell.is_best { format!("{}*", cell.text) } else { cell.text.clone() })
            .collect()
    }));
    let mut text = columns(&lines, 2);
    text.push_str("* lowest of its column\n");
    for finding in findings(comparison) {
        text.push_str(&finding);
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text
}
