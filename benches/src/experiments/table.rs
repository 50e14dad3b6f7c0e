//! The results as a page of Markdown: every number in it comes from the data beside it.

use std::fmt::Write;

use sluice_trainer::run::learning_curve::AVERAGED;

use super::plan::Setting;
use super::results::{GroupResults, Results, Row, SettingResults, Stat};
use super::stages::TARGET;

/// Share of the tokens that is the goal.
const GOAL: f64 = 0.5;

/// The whole page.
pub(super) fn markdown(results: &Results) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write_page(&mut page, results);
    page
}

fn write_page(page: &mut String, results: &Results) -> std::fmt::Result {
    writeln!(page, "# Experiment 1: selected tokens against all tokens and random ones\n")?;
    writeln!(
        page,
        "Written by `{}` from [results.json](results.json) beside it; do not edit.",
        results.command
    )?;
    if results.plan.is_quick {
        writeln!(page, "\n**A smoke run: models too small and too short to say anything.**")?;
    }
    writeln!(
        page,
        "\n{} seeds, {} cores. Losses in nats per token on held-out text, mean ± standard deviation over seeds. “To plain” is \
         what a run took until its loss on held-out mathematics came down to the end of the plain run of its seed, over what the \
         plain run took; learning rates are constant, so a run that is cut there is a whole run. A loss there is the mean of {} \
         evaluations in a row, for one by itself is noisy. The line “null” is plain training against the end of another seed's \
         plain run: a ratio that lies within it says nothing. “With scoring” adds the reference's forward pass over as many \
         tokens. The text is a stand-in: word problems from templates in prose, see \
         [ops/corpus](../../../ops/corpus/README.md).",
        results.plan.seeds().len(),
        results.cores,
        AVERAGED
    )?;
    for group in &results.groups {
        write_group(page, group, &results.settings[group.setting.name()])?;
    }
    if results.has_findings {
        writeln!(page, "\nWhat this says, and why: [findings](findings.md).")?;
    }
    writeln!(page, "\n## Shares\n\n![Tokens to plain's final loss over the share kept](tokens-over-k.svg)")?;
    writeln!(page, "\n## Before the students\n")?;
    writeln!(page, "| setting | what | tokens | TFLOP | wall s | CPU s | loss on held-out mathematics |")?;
    writeln!(page, "|---|---|---|---|---|---|---|")?;
    let mut references = vec![];
    for (name, setting) in &results.settings {
        let mut parts = vec![("scoring", Some(setting.scoring), "-".to_owned())];
        // Two settings may share one, which was paid once.
        if !references.contains(&setting.reference) {
            references.push(setting.reference);
            parts.insert(0, ("reference", Some(setting.reference), format!("{:.3}", setting.reference_loss)));
            parts.insert(0, ("base model", setting.base, "-".to_owned()));
        }
        for (what, effort, loss) in parts {
            let Some(effort) = effort else { continue };
            writeln!(
                page,
                "| {name} | {what} | {} | {:.2} | {:.0} | {:.0} | {loss} |",
                effort.tokens,
                effort.flops / 1e12,
                effort.seconds,
                effort.cpu_seconds
            )?;
        }
    }
    writeln!(
        page,
        "\nFLOPs follow PaLM's appendix B (arXiv 2204.02311), with the backward pass of the head for kept tokens alone; the \
         reference's forward pass over windows that overlap counts every window. Training the reference is in no ratio above: \
         it is paid once and serves every run on its corpus. `answers` is the loss of the final answer's tokens after question \
         and worked solution; an answer is sure where each of its tokens has a probability above one half, so that greedy \
         decoding writes it there. Whole solutions are not generated: models of this size write none."
    )
}

fn write_group(page: &mut String, group: &GroupResults, setting: &SettingResults) -> std::fmt::Result {
    let what = match group.setting {
        Setting::Scratch => "from fresh weights, a fifth of the stream is mathematics",
        Setting::Continual => "a base model of general text goes on with noisy mathematics, as in the paper",
        Setting::ContinualMixed => "that base model goes on with a stream of which a fifth is mathematics",
    };
    let name = format!("{}-{}", group.setting.name(), group.size);
    writeln!(page, "\n## {name}: {what}\n")?;
    let sets: Vec<&String> =
        group.rows.iter().flat_map(|row| row.losses.keys()).fold(vec![], |mut sets, set| {
            if !sets.contains(&set) {
                sets.push(set);
            }
            sets
        });
    let (tokens, steps) = group
        .runs
        .first()
        .map_or((0, 0), |run| (run.effort.tokens, run.curve.last().map_or(0, |eval| eval.step)));
    let plain = group.rows.iter().find(|row| row.kind == "plain");
    if let Some(plain) =
        plain.and_then(|row| row.losses.get(TARGET)).filter(|loss| loss.mean <= setting.reference_loss)
    {
        writeln!(
            page,
            "**The reference is no better on the target ({:.3}) than plain training's end ({:.3}): its losses cannot tell what \
             is worth learning, and no gain can be expected.**\n",
            setting.reference_loss, plain.mean
        )?;
    }
    writeln!(
        page,
        "{} seeds; {} parameters, {tokens} tokens in {steps} steps; the reference's loss on held-out mathematics is {:.3}.\n",
        group.runs.iter().filter(|run| run.kind == "plain").count(),
        group.parameters,
        setting.reference_loss
    )?;
    write!(page, "| run | kept | tokens to plain | reached | math less plain |")?;
    for set in &sets {
        write!(page, " {set} |")?;
    }
    writeln!(page, " sure answers | unselected, training |")?;
    writeln!(page, "|---|---|---|---|---|{}---|---|", "---|".repeat(sets.len()))?;
    writeln!(
        page,
        "| null | – | {} | {} of {} | – |{} – | – |",
        shown(group.null.tokens_ratio, 2),
        group.null.tokens_ratio.map_or(0, |stat| stat.values),
        group.null.pairs,
        " – |".repeat(sets.len())
    )?;
    for row in &group.rows {
        let reached = row.tokens_ratio.map_or(0, |stat| stat.values);
        write!(
            page,
            "| {} | {} | {} | {reached} of {} | {} |",
            row.kind,
            shown(row.kept, 2),
            shown(row.tokens_ratio, 2),
            row.runs,
            shown(row.difference, 3)
        )?;
        for set in &sets {
            write!(page, " {} |", shown(row.losses.get(*set).copied(), 3))?;
        }
        writeln!(page, " {} | {} |", shown(row.sure, 2), shown(row.unselected_loss, 3))?;
    }
    writeln!(
        page,
        "\n| run | FLOPs to plain | with scoring | CPU time to plain | with scoring | wall time to plain | with scoring |"
    )?;
    writeln!(page, "|---|---|---|---|---|---|---|")?;
    for row in &group.rows {
        let ratios = [
            row.flops_ratio,
            row.flops_ratio_with_scoring,
            row.cpu_ratio,
            row.cpu_ratio_with_scoring,
            row.wall_ratio,
            row.wall_ratio_with_scoring,
        ];
        let cells = ratios.map(|ratio| shown(ratio, 2)).join(" | ");
        writeln!(page, "| {} | {cells} |", row.kind)?;
    }
    write_goals(page, group)?;
    writeln!(page, "\n![Loss on held-out mathematics over tokens](loss-{name}.svg)")
}

/// Whether the goal is met at the paper's share, and at the best.
fn write_goals(page: &mut String, group: &GroupResults) -> std::fmt::Result {
    // A mean over the seeds that got there says nothing of those that did not.
    let whole = |row: &&Row| row.tokens_ratio.is_some_and(|stat| stat.values == row.runs);
    let mean = |row: &Row| row.tokens_ratio.map_or(f64::INFINITY, |stat| stat.mean);
    let slm = || group.rows.iter().filter(|row| row.is_scored).filter(whole);
    let paper = slm().find(|row| row.slm_keep == Some(super::plan::KEEP));
    let best = slm().min_by(|left, right| mean(left).total_cmp(&mean(right)));
    writeln!(page)?;
    for (what, row) in [("at k = 60 %", paper), ("by the best rule", best)] {
        match row {
            Some(row) => {
                let verdict = if mean(row) <= GOAL { "met" } else { "missed" };
                writeln!(
                    page,
                    "- Tokens {what} ({}): {}; goal {GOAL}: {verdict}.",
                    row.kind,
                    shown(row.tokens_ratio, 2)
                )?;
            }
            None => writeln!(
                page,
                "- Tokens {what}: none reached plain's final loss with every seed; goal {GOAL}: missed."
            )?,
        }
    }
    Ok(())
}

fn shown(stat: Option<Stat>, decimals: usize) -> String {
    match stat {
        None => "–".to_owned(),
        Some(Stat { mean, deviation: Some(deviation), .. }) => {
            format!("{mean:.decimals$} ± {deviation:.decimals$}")
        }
        Some(Stat { mean, .. }) => format!("{mean:.decimals$}"),
    }
}
