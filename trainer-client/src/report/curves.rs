//! Loss over a run: on held-out text, and on the tokens that were selected or left out.

use super::html::{Html, escape};
use super::line_chart::{Frame, Level, LineChart, Series};
use super::summary::Comparison;
use crate::run::learning_curve::LearningCurve;
use crate::run::metrics::StepMetric;

/// Points of a curve over steps; each is the mean over its share of the steps.
const POINTS_MAX: usize = 60;

/// A chart for each evaluation set.
pub(super) fn evaluation_section(html: &mut Html, comparison: &Comparison<'_>) {
    html.section(
        "Loss on held-out text",
        "Each line is a run: further down is better, and a line that crosses the thin level one further to the left has needed \
         fewer tokens to be as good as plain training. The number at its end is the final loss.",
    );
    html.push("<div class=\"charts\">");
    for (index, &set) in comparison.sets.iter().enumerate() {
        let plain = comparison.plain().filter(|_| index == 0 && comparison.runs.len() > 1);
        let level = plain.and_then(|run| LearningCurve::of(run.evals(set)).end()).map(|end| end.loss);
        // Whole, and closer, because the steep beginning flattens the end.
        for (frame, caption, id) in [
            (Frame::Whole, set.to_owned(), format!("eval-{index}")),
            (Frame::Settled, format!("{set}, closer"), format!("eval-{index}-closer")),
        ] {
            let series = comparison.runs.iter().enumerate().map(|(style, run)| Series {
                label: run.name().to_owned(),
                style,
                points: run.evals(set).map(|eval| (eval.tokens as f64, eval.loss)).collect(),
            });
            let chart = LineChart {
                title: &format!("Loss on {caption} over tokens seen"),
                x_label: "tokens seen",
                y_label: "loss, nats per token",
                series: series.filter(|series| !series.points.is_empty()).collect(),
                has_markers: true,
                frame,
                label_decimals: Some(3),
                level: level.map(|y| Level { y, name: "where plain training ends" }),
            };
            figure(html, &caption, &chart, &id);
        }
    }
    if comparison.sets.is_empty() {
        html.push("<p class=\"none\">No run was evaluated; give <code>--eval NAME=FILE</code>.</p>");
    }
    html.push("</div></section>");
}

/// The share that each run keeps, over the steps.
pub(super) fn keep_section(html: &mut Html, comparison: &Comparison<'_>) {
    let series: Vec<Series> = comparison
        .selecting()
        .map(|(style, run)| Series {
            label: run.name().to_owned(),
            style,
            points: smoothed(&run.steps, |step| Some(100.0 * step.kept as f64 / step.scored.max(1) as f64)),
        })
        .filter(|series| !series.points.is_empty())
        .collect();
    if series.is_empty() {
        return;
    }
    html.section(
        "How much is kept",
        "The share of the tokens that each step learns from: level for a constant k, falling for a curriculum, and moving \
         with the text where a threshold decides.",
    );
    let chart = LineChart {
        title: "Share kept over steps",
        x_label: "step",
        y_label: "tokens kept, %",
        series,
        has_markers: false,
        frame: Frame::Whole,
        label_decimals: Some(0),
        level: None,
    };
    html.push("<div class=\"charts\">");
    figure(html, "k over time", &chart, "keep");
    html.push("</div></section>");
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
            frame: Frame::Settled,
            label_decimals: Some(3),
            level: None,
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
pub(super) fn figure(html: &mut Html, caption: &str, chart: &LineChart<'_>, id: &str) -> bool {
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
