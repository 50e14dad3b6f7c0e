//! What the selection does to the mixture: kept tokens by source.

use std::collections::BTreeMap;

use super::html::{Html, PALETTE, escape, percent};
use super::summary::{Comparison, RunSummary};
use crate::run::metrics::SourceCount;

/// A row for each source, two columns for each run that leaves tokens out.
pub(super) fn section(html: &mut Html, comparison: &Comparison<'_>) {
    let runs: Vec<(usize, BTreeMap<&str, SourceCount>)> =
        comparison.selecting().map(|(index, run)| (index, totals(run))).collect();
    let Some((_, first)) = runs.first() else { return };
    if first.is_empty() {
        return;
    }
    html.section(
        "Where the kept tokens come from",
        "One row per source of documents. “kept” is how much of the source a run learnt from, and “of all kept” is \
         what the source makes up in what the run learnt from; compare it with the source’s share of the stream.",
    );
    html.push("<div class=\"scroll\"><table class=\"shares\"><thead><tr><th scope=\"col\" rowspan=\"2\">source</th><th scope=\"col\" rowspan=\"2\">share of the stream</th>");
    for (index, _) in &runs {
        html.push(&format!(
            "<th scope=\"colgroup\" colspan=\"2\" class=\"group\"><i class=\"dot series-{}\"></i>{}</th>",
            index % PALETTE,
            escape(comparison.runs[*index].name())
        ));
    }
    html.push("</tr><tr>");
    for _ in &runs {
        html.push("<th scope=\"col\">kept</th><th scope=\"col\">of all kept</th>");
    }
    html.push("</tr></thead><tbody>");
    let streamed: u64 = first.values().map(|count| count.scored).sum();
    for (source, count) in first {
        html.push(&format!(
            "<tr><th scope=\"row\">{}</th><td>{}</td>",
            escape(source),
            bar(count.scored, streamed, None)
        ));
        for (index, totals) in &runs {
            let count = totals.get(source).copied().unwrap_or_default();
            let kept: u64 = totals.values().map(|count| count.kept).sum();
            html.push(&format!(
                "<td>{}</td><td>{}</td>",
                bar(count.kept, count.scored, Some(*index)),
                bar(count.kept, kept, Some(*index))
            ));
        }
        html.push("</tr>");
    }
    html.push("</tbody></table></div></section>");
}

fn totals<'a>(run: &RunSummary<'a>) -> BTreeMap<&'a str, SourceCount> {
    let mut totals: BTreeMap<&str, SourceCount> = BTreeMap::new();
    for step in &run.steps {
        for (source, count) in &step.sources {
            let total = totals.entry(source).or_default();
            total.kept += count.kept;
            total.scored += count.scored;
        }
    }
    totals
}

/// A share as a small bar and a number.
fn bar(part: u64, whole: u64, series: Option<usize>) -> String {
    if whole == 0 {
        return "–".to_owned();
    }
    let share = part as f64 / whole as f64;
    let class = series.map(|index| format!(" series-{}", index % PALETTE)).unwrap_or_default();
    format!(
        "<span class=\"bar{class}\"><span style=\"width:{:.1}%\"></span></span> {}",
        100.0 * share,
        percent(share)
    )
}
