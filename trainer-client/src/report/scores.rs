//! How the scores of a step lie, among the tokens that were kept and among those left out.

use sluice_feed::select::{Objective, Score};

use super::curves::figure;
use super::html::{Html, escape};
use super::line_chart::{Frame, LineChart, Series};
use super::summary::Comparison;
use crate::run::histogram::{BINS, LOWEST, ScoreHistogram, WIDTH};
use crate::run::metrics::ScoresMetric;

/// The first and the last step whose scores each run wrote down.
pub(super) fn section(html: &mut Html, comparison: &Comparison<'_>) {
    if comparison.runs.iter().all(|run| run.scores.is_empty()) {
        return;
    }
    html.section(
        "Scores",
        "How many tokens of one step had which score, in bins of a quarter of a nat, among those that were kept and those \
         left out. For slm by excess loss, further right is further behind the reference. The outermost bins hold what lies \
         beyond them.",
    );
    let (by_attribute, by_loss): (Vec<_>, Vec<_>) =
        comparison.selecting().partition(|(_, run)| chooses_by_attribute(&run.run.record.objective));
    for (_, run) in by_attribute.iter().filter(|(_, run)| !run.scores.is_empty()) {
        html.push(&format!(
            "<p class=\"how\">{} chose by an attribute, a probability, which bins of a quarter show nothing of; it has no \
             chart here.</p>",
            escape(run.name())
        ));
    }
    html.push("<div class=\"charts\">");
    for (index, run) in by_loss {
        let ends = [run.scores.first(), run.scores.last().filter(|_| run.scores.len() > 1)];
        for (place, scores) in ends.into_iter().flatten().enumerate() {
            let caption = format!("{}, step {}", run.name(), scores.step);
            let chart = LineChart {
                title: &format!("Scores of {caption}"),
                x_label: "score, nats",
                y_label: "tokens",
                series: series(scores),
                has_markers: false,
                frame: Frame::Whole,
                label_decimals: None,
                level: None,
            };
            figure(html, &caption, &chart, &format!("scores-{index}-{place}"));
        }
    }
    html.push("</div></section>");
}

fn chooses_by_attribute(objective: &Objective) -> bool {
    objective.selection().is_some_and(|selection| matches!(selection.score, Score::Attribute { .. }))
}

fn series(scores: &ScoresMetric) -> Vec<Series> {
    let ScoreHistogram { kept, left_out } = &scores.histogram;
    let is_used =
        |bin: &usize| [kept, left_out].iter().any(|counts| counts.get(*bin).is_some_and(|&n| n > 0));
    let (Some(first), Some(last)) = ((0..BINS).find(is_used), (0..BINS).rfind(is_used)) else {
        return vec![];
    };
    [("kept", 0, kept), ("left out", 1, left_out)]
        .into_iter()
        .map(|(label, style, counts)| Series {
            label: label.to_owned(),
            style,
            points: outline(&counts[first..=last], f64::from(LOWEST) + first as f64 * f64::from(WIDTH)),
        })
        .collect()
}

/// The outline of bars, from the ground and back to it.
fn outline(counts: &[u64], start: f64) -> Vec<(f64, f64)> {
    let edge = |bin: usize| start + bin as f64 * f64::from(WIDTH);
    let tops = counts.iter().enumerate().flat_map(|(bin, &count)| {
        let height = count as f64;
        [(edge(bin), height), (edge(bin + 1), height)]
    });
    std::iter::once((start, 0.0)).chain(tops).chain([(edge(counts.len()), 0.0)]).collect()
}

#[cfg(test)]
mod tests {
    use super::outline;

    #[test]
    fn an_outline_goes_up_and_down_at_the_edges_of_its_bins() {
        let expected = [(1.0, 0.0), (1.0, 2.0), (1.25, 2.0), (1.25, 5.0), (1.5, 5.0), (1.5, 0.0)];
        assert_eq!(outline(&[2, 5], 1.0), expected);
    }
}
