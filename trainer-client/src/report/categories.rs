//! The four categories of tokens of a held-out set: how many there are, and how their losses go.

use super::curves::figure;
use super::html::{Html, PALETTE, escape, percent};
use super::line_chart::{Frame, LineChart, Series};
use super::summary::{Comparison, RunSummary};
use crate::report::dynamics::{Category, categories};
use crate::run::token_losses::TokenLosses;

/// What one run's tokens did on one set.
struct Dynamics<'a> {
    set: &'a str,
    /// After training began, in order.
    checkpoints: Vec<&'a TokenLosses>,
    categories: Vec<Category>,
}

/// A table of the shares and a chart for each run that wrote down single losses.
pub(super) fn section(html: &mut Html, comparison: &Comparison<'_>) {
    let runs: Vec<(usize, Dynamics<'_>)> =
        (0..).zip(&comparison.runs).filter_map(|(index, run)| Some((index, dynamics(run)?))).collect();
    let Some((_, first)) = runs.first() else { return };
    html.section(
        "Four kinds of tokens",
        &format!(
            "Each token of {} by how its loss moved over the evaluations after the first step: a straight line fitted to it \
             falls by more than 0.2 nats (H→L, learnt), rises by more (L→H, forgotten), or does neither, and the last loss is \
             at most the mean (L→L) or above it (H→H). The charts show the mean loss of each kind.",
            escape(first.set)
        ),
    );
    html.push("<div class=\"scroll\"><table><thead><tr><th scope=\"col\">run</th>");
    for category in Category::ALL {
        html.push(&format!("<th scope=\"col\">{}</th>", category.name()));
    }
    html.push("</tr></thead><tbody>");
    for (index, dynamics) in &runs {
        let name = escape(comparison.runs[*index].name());
        html.push(&format!(
            "<tr><th scope=\"row\"><i class=\"dot series-{}\"></i>{name}</th>",
            index % PALETTE
        ));
        for category in Category::ALL {
            let count = dynamics.categories.iter().filter(|&&of_token| of_token == category).count();
            html.push(&format!("<td>{}</td>", percent(count as f64 / dynamics.categories.len() as f64)));
        }
        html.push("</tr>");
    }
    html.push("</tbody></table></div><div class=\"charts\">");
    for (index, dynamics) in &runs {
        let name = comparison.runs[*index].name();
        let chart = LineChart {
            title: &format!("Mean loss of each kind of token on {}, {name}", dynamics.set),
            x_label: "step",
            y_label: "loss, nats per token",
            series: series(dynamics),
            has_markers: true,
            frame: Frame::Whole,
            label_decimals: Some(2),
            level: None,
        };
        figure(html, name, &chart, &format!("categories-{index}"));
    }
    html.push("</div></section>");
}

/// The first set whose losses the run wrote down at two checkpoints or more, that before the first step apart.
fn dynamics<'a>(run: &RunSummary<'a>) -> Option<Dynamics<'a>> {
    let written = &run.run.token_losses;
    let set = written.first()?.set.as_str();
    let checkpoints: Vec<&TokenLosses> = written.iter().filter(|at| at.set == set && at.step > 0).collect();
    let losses: Vec<&[f32]> = checkpoints.iter().map(|at| &at.losses[..]).collect();
    let is_one_set = losses.windows(2).all(|pair| pair[0].len() == pair[1].len());
    let categories = if is_one_set { categories(&losses) } else { vec![] };
    (!categories.is_empty()).then_some(Dynamics { set, checkpoints, categories })
}

fn series(dynamics: &Dynamics<'_>) -> Vec<Series> {
    let curve = |(style, category): (usize, Category)| {
        let mean = |at: &&TokenLosses| {
            let of_category = at.losses.iter().zip(&dynamics.categories).filter(|&(_, &of)| of == category);
            let (sum, count) =
                of_category.fold((0.0, 0.0), |(sum, count), (&loss, _)| (sum + f64::from(loss), count + 1.0));
            (count > 0.0).then(|| (at.step as f64, sum / count))
        };
        let points = dynamics.checkpoints.iter().filter_map(mean).collect();
        Series { label: category.name().to_owned(), style, points }
    };
    Category::ALL.into_iter().enumerate().map(curve).filter(|series| !series.points.is_empty()).collect()
}
