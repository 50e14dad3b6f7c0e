//! What one experiment alone asks, as a part of its page: a few lines that answer it, above the tables of its groups.

use std::fmt::Write;

use sluice_trainer::report::dynamics::Category;

use super::cells::{difference, ratio, shown};
use super::designs::Experiment;
use super::map;
use super::plan::TARGET;
use super::reference::Reference;
use super::results::{GroupResults, Results};
use super::rows::{Row, stat};
use super::tokens::correlation;
use super::tried::RunResults;

/// Writes the part of the experiment, where it has one.
pub(super) fn write(page: &mut String, results: &Results) -> std::fmt::Result {
    match results.plan.experiment {
        Experiment::References | Experiment::SelfReference => write_references(page, results),
        Experiment::Sizes => write_sizes(page, results),
        Experiment::Tokens => results.groups.iter().try_for_each(|group| write_tokens(page, group)),
        Experiment::Map => write_map(page, results),
        Experiment::Rules
        | Experiment::Shares
        | Experiment::Schedules
        | Experiment::Gradients
        | Experiment::Pretrained => Ok(()),
    }
}

/// A reference in words.
pub(super) fn reference(reference: Reference) -> &'static str {
    match reference {
        Reference::Curated => "the reference is the base model, trained on with curated mathematics",
        Reference::CuratedSmall => "the reference is a smaller model, trained on with curated mathematics",
        Reference::General => "the reference is the base model as it is, which knows general text",
        Reference::Mismatched => {
            "the reference is the base model, trained on with the documentation of web services"
        }
        Reference::OwnStream => "the reference is the base model, trained on with the stream itself",
    }
}

/// What every reference is worth, and whether a look at it before the runs tells.
fn write_references(page: &mut String, results: &Results) -> std::fmt::Result {
    writeln!(
        page,
        "\n## What the references are worth\n\nThe check before a run: the reference's loss on held-out {TARGET} less that of \
         the base model that it begins with. A reference that is no better than the model which is to be trained cannot \
         tell what that model has still to learn.\n"
    )?;
    writeln!(
        page,
        "| stream | reference | its loss on {TARGET} | less the base model's | rule | tokens to plain | {TARGET} less plain |"
    )?;
    writeln!(page, "|---|---|---|---|---|---|---|")?;
    for group in &results.groups {
        let stream = &results.streams[&group.stream];
        let less_base =
            stream.base_loss.map_or("–".to_owned(), |base| format!("{:+.3}", stream.reference_loss - base));
        for row in group.rows.iter().filter(|row| row.is_scored) {
            writeln!(
                page,
                "| {} | {} | {:.3} | {less_base} | {} | {} | {} |",
                group.setting.name(),
                group.reference.name(),
                stream.reference_loss,
                row.kind,
                ratio(row.reporting.tokens),
                difference(row.reporting.difference)
            )?;
        }
    }
    Ok(())
}

/// How the ratios go with the size.
fn write_sizes(page: &mut String, results: &Results) -> std::fmt::Result {
    let rules: Vec<&str> = results
        .groups
        .first()
        .into_iter()
        .flat_map(|group| group.rows.iter().filter(|row| row.is_scored))
        .map(|row| row.kind.as_str())
        .collect();
    writeln!(
        page,
        "\n## Over sizes\n\nTokens to plain training's end, of the same size; one reference for all. “Chosen” is the rule with \
         the lowest ratio on the choosing half.\n"
    )?;
    writeln!(page, "| size | parameters | plain's end | null | {} | chosen |", rules.join(" | "))?;
    writeln!(page, "|---|---|---|---|{}---|", "---|".repeat(rules.len()))?;
    for group in &results.groups {
        let end = group.plain().and_then(|row| row.losses.get(TARGET)).copied();
        write!(
            page,
            "| {} | {} | {} | {} |",
            group.size,
            group.parameters,
            shown(end, 3),
            ratio(group.null.tokens)
        )?;
        for rule in &rules {
            let row = group.rows.iter().find(|row| row.kind == *rule);
            write!(page, " {} |", row.map_or("–".to_owned(), |row| ratio(row.reporting.tokens)))?;
        }
        writeln!(page, " {} |", group.chosen.by_tokens.as_deref().unwrap_or("none"))?;
    }
    writeln!(page, "\n![Tokens to plain training's end over the size of the student](tokens-over-size.svg)")
}

/// Categories of tokens, and which losses go with those of the answers.
fn write_tokens(page: &mut String, group: &GroupResults) -> std::fmt::Result {
    let name = group.name();
    writeln!(
        page,
        "\n## Single tokens, {name}\n\nCategories of the tokens of held-out {TARGET}, by the slope of a straight line through \
         their losses at the evaluations so far, as in the paper; mean over seeds.\n"
    )?;
    let names: Vec<&str> = Category::ALL.iter().map(|category| category.name()).collect();
    writeln!(page, "| run | up to step | {} |", names.join(" | "))?;
    writeln!(page, "|---|---|{}", "---|".repeat(names.len()))?;
    for row in &group.rows {
        let runs: Vec<_> = runs_of(group, row).filter_map(|run| run.tokens.as_ref()).collect();
        let parts = runs.iter().map(|tokens| tokens.shares.len()).min().unwrap_or(0);
        for part in 0..parts {
            let mean = |category: usize| {
                stat(runs.iter().map(|tokens| tokens.shares[part].shares[category]))
                    .map_or("–".to_owned(), |stat| format!("{:.0} %", 100.0 * stat.mean))
            };
            let cells: Vec<String> = (0..names.len()).map(mean).collect();
            writeln!(page, "| {} | {} | {} |", row.kind, runs[0].shares[part].step, cells.join(" | "))?;
        }
    }
    writeln!(
        page,
        "\nThe held-out tokens are cut in two by what selection would keep at the start: the 60 % with the highest excess loss of \
         the base model over the reference, and the others. Pearson's correlation of their mean losses with the loss of final \
         answers (`answers`), over the evaluations of all seeds; in the last line over those of all students together.\n"
    )?;
    writeln!(
        page,
        "| run | kept, start and end | others, start and end | kept with `answers` | others with `answers` |"
    )?;
    writeln!(page, "|---|---|---|---|---|")?;
    for row in &group.rows {
        let runs: Vec<_> = runs_of(group, row).collect();
        let at = |index: fn(usize) -> usize, is_kept: bool| {
            let losses = runs.iter().filter_map(|run| {
                let losses = &run.tokens.as_ref()?.losses;
                let at = losses.get(index(losses.len()))?;
                Some(if is_kept { at.selected } else { at.unselected })
            });
            shown(stat(losses), 2)
        };
        let [kept, others] = [true, false].map(|is_kept| {
            format!("{}, {}", at(|_| 0, is_kept), at(|count| count.saturating_sub(1), is_kept))
        });
        writeln!(page, "| {} | {kept} | {others} | {} |", row.kind, correlations(&runs))?;
    }
    let students = group.rows.iter().filter(|row| row.kind != "reference");
    let all: Vec<&RunResults> = students.flat_map(|row| runs_of(group, row)).collect();
    writeln!(page, "| all students | – | – | {} |", correlations(&all))?;
    writeln!(page, "\n![Held-out tokens that selection would keep, and the others](selected-{name}.svg)")
}

/// The runs that a row is the mean of.
fn runs_of<'a>(group: &'a GroupResults, row: &'a Row) -> impl Iterator<Item = &'a RunResults> {
    let is_of_row = |run: &&RunResults| {
        run.kind == row.kind && run.learning_rate.to_bits() == row.learning_rate.to_bits()
    };
    group.runs.iter().filter(is_of_row)
}

/// Of the kept tokens' losses and of the others', each with those of the answers, as two cells.
fn correlations(runs: &[&RunResults]) -> String {
    let pairs = |is_kept: bool| -> Vec<(f64, f64)> {
        let of_run = |run: &&RunResults| -> Vec<(f64, f64)> {
            let losses = run.tokens.iter().flat_map(|tokens| &tokens.losses);
            let pair = |at: &super::tokens::SplitLoss| {
                let answers = run.curve.iter().find(|eval| eval.set == "answers" && eval.step == at.step)?;
                Some((if is_kept { at.selected } else { at.unselected }, answers.loss))
            };
            losses.filter_map(pair).collect()
        };
        runs.iter().flat_map(of_run).collect()
    };
    let cell =
        |is_kept| correlation(&pairs(is_kept)).map_or("–".to_owned(), |found| format!("{found:+.2}"));
    format!("{} | {}", cell(true), cell(false))
}

/// A table for each rule: rarity of the target downwards, noise inside it to the right.
fn write_map(page: &mut String, results: &Results) -> std::fmt::Result {
    let rules = map::rule_names(results);
    let (mut rarities, mut noises) = (Vec::new(), Vec::new());
    for group in &results.groups {
        let Some((rarity, noise)) = map::place(group) else { continue };
        if !rarities.contains(&rarity) {
            rarities.push(rarity);
        }
        if !noises.contains(&noise) {
            noises.push(noise);
        }
    }
    writeln!(
        page,
        "\n## Tokens to plain training's end\n\nDownwards how many tokens of a hundred are in documents of mathematics, to the \
         right what stands inside these documents beside mathematics: nothing, the beginning of an unrelated document, wrong \
         numbers and mistyped words (so many of a hundred). One reference for all cells. `sluice-train forecast` reads these \
         numbers ([map.json](map.json)). An interval that overlaps that of the null says nothing."
    )?;
    let headers: Vec<String> = noises.iter().map(|noise| noise.name()).collect();
    for rule in ["null"].into_iter().chain(rules.iter().copied()) {
        writeln!(page, "\n### {rule}\n\n| mathematics | {} |", headers.join(" | "))?;
        writeln!(page, "|---|{}", "---|".repeat(headers.len()))?;
        for rarity in &rarities {
            write!(page, "| {rarity} % |")?;
            for noise in &noises {
                let group = results.groups.iter().find(|group| map::place(group) == Some((*rarity, *noise)));
                let found = group.and_then(|group| {
                    if rule == "null" {
                        return Some(group.null.tokens);
                    }
                    map::rules(group).find(|row| row.kind == rule).map(|row| row.reporting.tokens)
                });
                write!(page, " {} |", found.map_or("–".to_owned(), ratio))?;
            }
            writeln!(page)?;
        }
    }
    for rule in rules {
        writeln!(page, "\n![Tokens to plain training's end over the share of the target](map-{rule}.svg)")?;
    }
    Ok(())
}
