//! The map as `sluice-train forecast` reads it: for each cell what every rule takes to plain training's end.

use serde::Serialize;

use super::bootstrap::Estimate;
use super::results::{GroupResults, Results};
use super::rows::Row;
use super::setting::{Noise, Setting};

/// The whole map.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Map {
    /// The command that made it.
    command: String,
    /// What was trained.
    model: String,
    cells: Vec<Cell>,
}

/// One stream.
#[derive(Clone, Debug, Serialize)]
struct Cell {
    /// Tokens of a hundred in documents of the target.
    rarity_percent: u8,
    /// What stands inside them beside it.
    noise: String,
    rules: Vec<RuleRatio>,
    /// Plain training against itself with other seeds: the ends of the interval.
    null: [Option<f64>; 2],
}

/// Tokens to plain training's end, over plain training's; absent is never.
#[derive(Clone, Debug, Serialize)]
struct RuleRatio {
    rule: String,
    tokens: Option<f64>,
    low: Option<f64>,
    high: Option<f64>,
}

/// The map of a finished experiment.
pub(super) fn of(results: &Results) -> Map {
    let first = results.groups.first();
    let model = first.map_or(String::new(), |group| {
        let (tokens, steps) = group.length();
        format!(
            "{} ({} parameters), {tokens} tokens in {steps} steps from a base model",
            group.size, group.parameters
        )
    });
    let cells = results.groups.iter().filter_map(|group| {
        let (rarity_percent, noise) = place(group)?;
        let Estimate { low, high, .. } = group.null.tokens;
        let rules = rules(group).map(|row| {
            let Estimate { value, low, high } = row.reporting.tokens;
            RuleRatio { rule: row.kind.clone(), tokens: value, low, high }
        });
        Some(Cell { rarity_percent, noise: noise.name(), rules: rules.collect(), null: [low, high] })
    });
    Map { command: results.command.clone(), model, cells: cells.collect() }
}

/// Where a group stands in the map, if it is of it.
pub(super) fn place(group: &GroupResults) -> Option<(u8, Noise)> {
    match group.setting {
        Setting::Map(rarity, noise) => Some((rarity, noise)),
        _ => None,
    }
}

/// The names of all rules, each once.
pub(super) fn rule_names(results: &Results) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in results.groups.iter().flat_map(rules) {
        if !names.contains(&row.kind.as_str()) {
            names.push(&row.kind);
        }
    }
    names
}

/// Its rules.
pub(super) fn rules(group: &GroupResults) -> impl Iterator<Item = &Row> {
    group.rows.iter().filter(|row| row.is_scored)
}
