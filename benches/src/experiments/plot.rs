//! The results as pictures.

use sluice_trainer::report::line_chart::{Frame, Level, LineChart, Series};

use super::designs::Experiment;
use super::map;
use super::plan::TARGET;
use super::results::{GroupResults, Results};
use super::rows::{Row, stat};
use super::tokens::SplitLoss;
use super::tried::RunResults;

/// File names and SVG texts: for each group the loss over tokens, of the rules and of the controls; for all together the
/// tokens that are needed over k; and what one experiment alone shows.
pub(super) fn all(results: &Results) -> Vec<(String, String)> {
    if results.plan.experiment == Experiment::Map {
        return over_rarity(results);
    }
    let mut plots = Vec::new();
    for group in &results.groups {
        let name = group.name();
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
    match results.plan.experiment {
        Experiment::Gradients => plots.extend(results.groups.iter().filter_map(over_flops)),
        Experiment::Sizes => plots.extend(over_size(results)),
        Experiment::Tokens => plots.extend(results.groups.iter().filter_map(selected_and_others)),
        _ => {}
    }
    if !results.has_shares() {
        return plots;
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
    means(group, is_shown, &|run| {
        let evals = run.curve.iter().filter(|eval| eval.set == TARGET);
        evals.map(|eval| (eval.tokens as f64, eval.loss)).collect()
    })
}

/// The same of any points of a run.
fn means(
    group: &GroupResults,
    is_shown: &dyn Fn(&Row) -> bool,
    points: &dyn Fn(&RunResults) -> Vec<(f64, f64)>,
) -> Vec<Series> {
    let mut series = Vec::new();
    for (style, row) in group.rows.iter().filter(|row| is_shown(row)).enumerate() {
        let runs: Vec<Vec<(f64, f64)>> = group
            .runs
            .iter()
            .filter(|run| run.kind == row.kind && run.learning_rate.to_bits() == row.learning_rate.to_bits())
            .map(points)
            .collect();
        let evaluations = runs.iter().map(Vec::len).min().unwrap_or(0);
        let mean = |at: usize, of: fn(&(f64, f64)) -> f64| stat(runs.iter().map(|run| of(&run[at])));
        let point = |at| Some((mean(at, |point| point.0)?.mean, mean(at, |point| point.1)?.mean));
        let points = (0..evaluations).filter_map(point).collect();
        series.push(Series { label: row.kind.clone(), style, points });
    }
    series
}

/// The loss over FLOPs of training.
fn over_flops(group: &GroupResults) -> Option<(String, String)> {
    let name = group.name();
    let chart = LineChart {
        title: &format!("Loss on held-out mathematics over FLOPs of training, {name}"),
        x_label: "TFLOP of training, without scoring",
        y_label: "loss, nats per token, mean over seeds",
        series: means(group, &|row| !row.has_own_text, &|run| {
            let losses = run.curve.iter().filter(|eval| eval.set == TARGET).map(|eval| eval.loss);
            run.flops.iter().map(|flops| flops / 1e12).zip(losses).collect()
        }),
        has_markers: true,
        frame: Frame::Settled,
        label_decimals: Some(3),
        level: None,
    };
    chart.standalone().map(|svg| (format!("flops-{name}.svg"), svg))
}

/// Adds a point to the line of that name, which begins with it where there is none.
fn add_point(series: &mut Vec<Series>, label: &str, point: (f64, f64)) {
    match series.iter_mut().find(|series| series.label == label) {
        Some(series) => series.points.push(point),
        None => series.push(Series { label: label.to_owned(), style: series.len(), points: vec![point] }),
    }
}

/// Tokens to plain training's end over the size of the student, a line for each rule.
fn over_size(results: &Results) -> Option<(String, String)> {
    let mut series: Vec<Series> = Vec::new();
    for group in &results.groups {
        for row in group.rows.iter().filter(|row| row.is_scored) {
            let Some(ratio) = row.reporting.tokens.value else { continue };
            let point = ((group.parameters as f64).log10(), ratio);
            add_point(&mut series, &row.kind, point);
        }
    }
    let chart = LineChart {
        title: "Tokens to plain training's final loss, over the size of the student",
        x_label: "parameters, as a power of ten",
        y_label: "tokens over plain's, reporting half",
        series,
        has_markers: true,
        frame: Frame::Whole,
        label_decimals: Some(2),
        level: Some(Level { y: 1.0, name: "plain training" }),
    };
    chart.standalone().map(|svg| ("tokens-over-size.svg".to_owned(), svg))
}

/// Mean losses of the held-out tokens that selection would keep and of the others, of plain training and of the best rule.
fn selected_and_others(group: &GroupResults) -> Option<(String, String)> {
    let name = group.name();
    let is_shown = |row: &Row| row.kind == "plain" || Some(&row.kind) == group.chosen.by_tokens.as_ref();
    let split = |of: fn(&SplitLoss) -> f64, label: &str| -> Vec<Series> {
        let own = means(group, &is_shown, &|run| {
            let losses = run.tokens.iter().flat_map(|tokens| &tokens.losses);
            losses.map(|at| (at.step as f64, of(at))).collect()
        });
        own.into_iter()
            .map(|series| Series { label: format!("{}, {label}", series.label), ..series })
            .collect()
    };
    let mut series: Vec<Series> =
        [split(|at| at.selected, "kept"), split(|at| at.unselected, "others")].concat();
    for (style, series) in series.iter_mut().enumerate() {
        series.style = style;
    }
    let chart = LineChart {
        title: &format!("Held-out tokens that selection would keep, and the others, {name}"),
        x_label: "step",
        y_label: "loss, nats per token, mean over seeds",
        series,
        has_markers: true,
        frame: Frame::Whole,
        label_decimals: Some(2),
        level: None,
    };
    chart.standalone().map(|svg| (format!("selected-{name}.svg"), svg))
}

/// Tokens to plain training's end over the share of the target, a picture for each rule and in it a line for each noise.
fn over_rarity(results: &Results) -> Vec<(String, String)> {
    let plot = |rule: &str| {
        let mut series: Vec<Series> = Vec::new();
        for group in &results.groups {
            let (rarity, noise) = map::place(group)?;
            let row = map::rules(group).find(|row| row.kind == rule)?;
            let Some(ratio) = row.reporting.tokens.value else { continue };
            add_point(&mut series, &noise.name(), (f64::from(rarity).log10(), ratio));
        }
        let chart = LineChart {
            title: &format!("Tokens to plain training's final loss over the share of the target, {rule}"),
            x_label: "tokens in documents of the target, per cent, as a power of ten",
            y_label: "tokens over plain's, reporting half",
            series,
            has_markers: true,
            frame: Frame::Whole,
            label_decimals: Some(2),
            level: Some(Level { y: 1.0, name: "plain training" }),
        };
        chart.standalone().map(|svg| (format!("map-{rule}.svg"), svg))
    };
    map::rule_names(results).into_iter().filter_map(plot).collect()
}

fn ratios(results: &Results) -> Vec<Series> {
    let series = results.groups.iter().enumerate().map(|(style, group)| {
        let mut points: Vec<(f64, f64)> = group
            .rows
            .iter()
            .filter_map(|row| Some((100.0 * row.slm_keep?, row.reporting.tokens.value?)))
            .collect();
        points.sort_by(|left, right| left.0.total_cmp(&right.0));
        Series { label: group.name(), style, points }
    });
    series.filter(|series| !series.points.is_empty()).collect()
}
