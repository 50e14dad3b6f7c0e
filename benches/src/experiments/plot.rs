//! The results as pictures.

use sluice_trainer::report::line_chart::{Frame, LineChart, Series};

use super::plan::TARGET;
use super::results::{GroupResults, Results};
use super::rows::{Row, stat};

/// File names and SVG texts: for each group the loss over tokens, of the rules and of the controls, and for all together the
/// tokens that are needed over k.
pub(super) fn all(results: &Results) -> Vec<(String, String)> {
    let mut plots = Vec::new();
    for group in &results.groups {
        let name = format!("{}-{}", group.setting.name(), group.size);
        // More lines than a picture bears would hide each other; plain training and the best rule are in both.
        let is_common = |row: &Row| row.kind == "plain" || Some(&row.kind) == group.chosen.by_tokens.as_ref();
        let rules = |row: &Row| !row.has_own_text;
        let controls = |row: &Row| row.has_own_text || is_common(row);
        let has_controls = group.rows.iter().any(|row| row.has_own_text);
        plots.extend(loss(group, &name, "loss", &rules));
        if has_controls {
            plots.extend(loss(group, &name, "controls", &controls));
        }
    }
    let chart = LineChart {
        title: "Tokens to plain training's final loss, over the share kept",
        x_label: "share of the tokens kept, %",
        y_label: "tokens over plain's, reporting half",
        series: ratios(results),
        has_markers: true,
        frame: Frame::Whole,
        label_decimals: None,
        level: None,
    };
    plots.extend(chart.standalone().map(|svg| ("tokens-over-k.svg".to_owned(), svg)));
    plots
}

/// The loss over tokens of some rows.
fn loss(
    group: &GroupResults,
    name: &str,
    file: &str,
    is_shown: &dyn Fn(&Row) -> bool,
) -> Option<(String, String)> {
    let chart = LineChart {
        title: &format!("Loss on held-out mathematics over tokens seen, {name}"),
        x_label: "tokens seen",
        y_label: "loss, nats per token, mean over seeds",
        series: curves(group, is_shown),
        has_markers: true,
        frame: Frame::Settled,
        label_decimals: Some(3),
        level: None,
    };
    chart.standalone().map(|svg| (format!("{file}-{name}.svg"), svg))
}

/// A line for each kind of student that is shown, at the learning rate that it is reported at, the mean over its seeds.
fn curves(group: &GroupResults, is_shown: &dyn Fn(&Row) -> bool) -> Vec<Series> {
    let mut series = Vec::new();
    for (style, row) in group.rows.iter().filter(|row| is_shown(row)).enumerate() {
        let runs: Vec<Vec<(f64, f64)>> = group
            .runs
            .iter()
            .filter(|run| run.kind == row.kind && run.learning_rate.to_bits() == row.learning_rate.to_bits())
            .map(|run| {
                let evals = run.curve.iter().filter(|eval| eval.set == TARGET);
                evals.map(|eval| (eval.tokens as f64, eval.loss)).collect()
            })
            .collect();
        let evaluations = runs.iter().map(Vec::len).min().unwrap_or(0);
        let mean = |at: usize, of: fn(&(f64, f64)) -> f64| stat(runs.iter().map(|run| of(&run[at])));
        let point = |at| Some((mean(at, |point| point.0)?.mean, mean(at, |point| point.1)?.mean));
        let points = (0..evaluations).filter_map(point).collect();
        series.push(Series { label: row.kind.clone(), style, points });
    }
    series
}

fn ratios(results: &Results) -> Vec<Series> {
    let series = results.groups.iter().enumerate().map(|(style, group)| {
        let mut points: Vec<(f64, f64)> = group
            .rows
            .iter()
            .filter_map(|row| Some((100.0 * row.slm_keep?, row.reporting.tokens.value?)))
            .collect();
        points.sort_by(|left, right| left.0.total_cmp(&right.0));
        Series { label: format!("{}-{}", group.setting.name(), group.size), style, points }
    });
    series.filter(|series| !series.points.is_empty()).collect()
}
