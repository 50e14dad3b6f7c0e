//! Loss over a run: on held-out text, and on the tokens that were selected or left out.

use super::html::{Html, escape};
use super::line_chart::{LineChart, Series};
use super::summary::Comparison;
use crate::metrics::StepMetric;

/// Points of a curve over steps; each is the mean over its share of the steps.
const POINTS_MAX: usize = 60;

/// A chart for each evaluation set.
pub(super) fn evaluation_section(html: &mut Html, comparison: &Comparison<'_>) {
    html.section(
        "Loss on held-out text",
        "Each line is a run: further down is better, and a line that comes down further to the left has needed fewer \
         tokens. The number at its end is the final loss.",
    );
    let mut any_cut = false;
    html.push("<div class=\"charts\">");
    for (index, &set) in comparison.sets.iter().enumerate() {
        let series = comparison.runs.iter().enumerate().map(|(style, run)| Series {
            label: run.name().to_owned(),
            style,
            points: run.evals(set).map(|eval| (eval.tokens as f64, eval.loss)).collect(),
        });
        let chart = LineChart {
            title: &format!("Loss on {set} over tokens seen"),
            x_label: "tokens seen",
            y_label: "loss, nats per token",
            series: series.filter(|series| !series.points.is_empty()).collect(),
            has_markers: true,
        };
        any_cut |= figure(html, set, &chart, &format!("eval-{index}"));
    }
    if comparison.sets.is_empty() {
        html.push("<p class=\"none\">No run was evaluated; give <code>--eval NAME=FILE</code>.</p>");
    }
    html.push("</div>");
    note_of_cut(html, any_cut);
    html.push("</section>");
}

/// A chart for each run that leaves tokens out.
pub(super) fn selection_section(html: &mut Html, comparison: &Comparison<'_>) {
    html.section(
        "Selected against unselected tokens",
        "Training loss of the tokens that each step kept and of those it left out; slm keeps what is hard for the \
         model yet easy for the reference, so the two lines part, and the unselected one may even rise.",
    );
    let mut any_cut = false;
    let mut any = false;
    html.push("<div class=\"charts\">");
    for (index, run) in comparison.selecting() {
        let curve = |label: &str, style, value: fn(&StepMetric) -> Option<f64>| Series {
            label: label.to_owned(),
            style,
            points: smoothed(&run.steps, value),
        };
        let series = [
            curve("unselected", 1, |step| step.loss_unselected),
            curve("selected", 0, |step| step.loss_selected),
            curve("all", 5, |step| Some(step.loss_all)),
        ];
        let chart = LineChart {
            title: &format!("Training loss of {} over steps", run.name()),
            x_label: "step",
            y_label: "loss, nats per token",
            series: series.into_iter().filter(|series| !series.points.is_empty()).collect(),
            has_markers: false,
        };
        any_cut |= figure(html, run.name(), &chart, &format!("selection-{index}"));
        any = true;
    }
    if !any {
        html.push("<p class=\"none\">No run left tokens out.</p>");
    }
    html.push("</div>");
    note_of_cut(html, any_cut);
    html.push("</section>");
}

/// One chart with its caption; whether it leaves out the beginning of a curve.
fn figure(html: &mut Html, caption: &str, chart: &LineChart<'_>, id: &str) -> bool {
    let Some((svg, is_cut)) = chart.svg(id) else { return false };
    html.push(&format!("<figure><figcaption>{}</figcaption>", escape(caption)));
    html.push(&svg);
    html.push("</figure>");
    is_cut
}

fn note_of_cut(html: &mut Html, is_cut: bool) {
    if is_cut {
        html.push("<p class=\"note\">The steep beginning of the curves lies above the frame.</p>");
    }
}

/// Means over equal shares of the steps, at the middle of each.
fn smoothed(steps: &[&StepMetric], value: fn(&StepMetric) -> Option<f64>) -> Vec<(f64, f64)> {
    let share = steps.len().div_ceil(POINTS_MAX).max(1);
    let mean = |steps: &[&StepMetric]| {
        let values: Vec<(f64, f64)> =
            steps.iter().filter_map(|step| Some((step.step as f64, value(step)?))).collect();
        let count = values.len() as f64;
        let sums = values.iter().fold((0.0, 0.0), |sums, value| (sums.0 + value.0, sums.1 + value.1));
        (count > 0.0).then(|| (sums.0 / count, sums.1 / count))
    };
    steps.chunks(share).filter_map(mean).collect()
}
