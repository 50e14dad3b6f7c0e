//! The results as a page of Markdown: every number in it comes from the data beside it.

use std::fmt::Write;

use sluice_trainer::run::learning_curve::AVERAGED;

use super::bootstrap::Estimates;
use super::cells::{difference, ratio, shown};
use super::designs::{Experiment, KEEP};
use super::further;
use super::group::{BATCH_SIZE, SEQUENCE_LENGTH};
use super::plan::TARGET;
use super::reference::Reference;
use super::results::{GroupResults, Results, StreamResults};
use super::rows::Row;
use super::templates::Half;

/// Goals of the project's issue: tokens and FLOPs to plain training's end, and how much lower the loss is to be, nats.
const GOALS: (f64, f64, f64) = (0.25, 0.30, 0.5);

/// The whole page.
pub(super) fn markdown(results: &Results) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write_page(&mut page, results);
    page
}

fn write_page(page: &mut String, results: &Results) -> std::fmt::Result {
    writeln!(page, "# {}\n", results.plan.experiment.title())?;
    writeln!(
        page,
        "Written by `{}` from [results.json](results.json) beside it; do not edit.",
        results.command
    )?;
    if results.plan.basis.is_quick {
        writeln!(page, "\n**A smoke run: models too small and too short to say anything.**")?;
    }
    writeln!(
        page,
        "\n{} seeds, {} cores. Losses in nats per token on held-out text, mean ± standard deviation over seeds. “To plain” is \
         what a kind of run took until its loss on held-out mathematics came down to the end of plain training, over what plain \
         training took; students' learning rates are constant, so a run that is cut there is a whole run. A curve is the mean \
         over seeds, and a loss on it the mean of {AVERAGED} evaluations in a row, for one by itself is noisy. “Less plain” is \
         the loss after as many tokens as plain training took to its end, less plain training's. “Reached” counts the seeds \
         whose own curve came down to the end of plain training with the same seed. “With scoring” adds the reference's forward \
         pass over as many tokens. FLOPs, CPU and wall time are summed step by step, with what each step kept. The text is a \
         stand-in: word problems from templates in prose, see [ops/corpus](../../../ops/corpus/README.md).",
        results.plan.seeds().len(),
        results.cores,
    )?;
    write_estimator(page, results)?;
    further::write(page, results)?;
    // The map has so many groups that their tables would hide it; their numbers are in the data.
    let shown = if results.plan.experiment == Experiment::Map { &[] } else { results.groups.as_slice() };
    for group in shown {
        write_group(page, group, &results.streams[&group.stream], results)?;
    }
    if results.has_findings {
        writeln!(page, "\nWhat this says, and why: [findings](findings.md).")?;
    }
    if results.has_shares() {
        writeln!(
            page,
            "\n## Shares\n\n![Tokens to plain's final loss over the share kept](tokens-over-k.svg)"
        )?;
    }
    write_preparation(page, results)?;
    writeln!(
        page,
        "\nFLOPs follow PaLM's appendix B (arXiv 2204.02311), with the backward pass of the head for kept tokens alone, and \
         with `--backward kept` that of the layers too; the reference's forward pass over windows that overlap counts every \
         window. Training the reference is in no ratio above: it is paid once and serves every run on its corpus. `answers` is \
         the loss of the final answer's tokens after question and worked solution; an answer is sure where each of its tokens \
         has a probability above one half, so that greedy decoding writes it there. Whole solutions are not generated: models of \
         this size write none."
    )
}

/// How the intervals come about, and which half of the templates is for what.
fn write_estimator(page: &mut String, results: &Results) -> std::fmt::Result {
    let names = |half| {
        let of_half = results.templates.iter().filter(|template| template.half == half);
        let names: Vec<&str> =
            of_half.map(|one| one.name.rsplit('/').next().unwrap_or(one.name.as_str())).collect();
        (names.len(), names.join(", "))
    };
    let ((choosing, choosing_names), (reporting, reporting_names)) =
        (names(Half::Choosing), names(Half::Reporting));
    writeln!(
        page,
        "\n**One half chooses, the other reports.** Of the {} held-out templates, {choosing} choose ({choosing_names}): the \
         checkpoint of the reference, the best rule, and, where several were tried, the learning rate of each kind. The other \
         {reporting} report ({reporting_names}): every ratio, difference, interval and count below is theirs, but for the column \
         “choosing half”. The seeds are the same in both halves: a rule that is best by the luck of its seeds is so in both. The losses in the columns `{TARGET}`, `rest` and `answers` are of whole sets.\n\n\
         **Intervals** are 95 % percentiles of a bootstrap: {} draws (generator SplitMix64, seed {}) of seeds and of reporting \
         templates with replacement, the same for a kind and for plain training, so that differences stay paired; one that ends \
         in “never” holds draws that did not come down to plain's end. The line “null” is plain training against itself with \
         other seeds drawn, on the same templates: what seeds alone do to figures that are not paired. An interval \
         that holds 1 (of a ratio) or 0 (of a difference) says nothing. With few seeds the bootstrap's intervals are somewhat too \
         narrow.",
        results.templates.len(),
        results.bootstrap.draws,
        results.bootstrap.seed,
    )
}

fn write_preparation(page: &mut String, results: &Results) -> std::fmt::Result {
    writeln!(page, "\n## Before the students\n")?;
    writeln!(page, "| stream | what | tokens | TFLOP | wall s | CPU s | loss on held-out mathematics |")?;
    writeln!(page, "|---|---|---|---|---|---|---|")?;
    let mut references = vec![];
    for (name, stream) in &results.streams {
        let mut parts = vec![("scoring", Some(stream.scoring), "-".to_owned())];
        parts.push(("scoring by reference and base model", stream.document_scoring, "-".to_owned()));
        // Two streams may share one, which was paid once.
        if !references.contains(&stream.reference) {
            references.push(stream.reference);
            let loss = format!("{:.3} after step {}", stream.reference_loss, stream.reference_step);
            parts.insert(0, ("reference", Some(stream.reference), loss));
            let base_loss = stream.base_loss.map_or("-".to_owned(), |loss| format!("{loss:.3}"));
            parts.insert(0, ("base model", stream.base, base_loss));
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
    Ok(())
}

fn write_group(
    page: &mut String,
    group: &GroupResults,
    stream: &StreamResults,
    results: &Results,
) -> std::fmt::Result {
    let has_rates = !results.plan.learning_rates.is_empty();
    let name = group.name();
    let scorer = match group.reference {
        Reference::Curated => String::new(),
        other => format!("; {}", further::reference(other)),
    };
    let what = if results.plan.basis.pretrained.is_some() {
        "a pretrained model goes on with noisy mathematics; the reference is the same model after curated mathematics".to_owned()
    } else {
        group.setting.description()
    };
    writeln!(page, "\n## {name}: {what}{scorer}\n")?;
    let sets: Vec<&String> =
        group.rows.iter().filter(|row| row.kind == "plain").flat_map(|row| row.losses.keys()).collect();
    let (tokens, steps) = group.length();
    let plain = group.plain();
    if let Some(plain) =
        plain.and_then(|row| row.losses.get(TARGET)).filter(|loss| loss.mean <= stream.reference_loss)
    {
        writeln!(
            page,
            "**The reference is no better on the target ({:.3}) than plain training's end ({:.3}): its losses cannot tell what \
             is worth learning, and no gain can be expected.**\n",
            stream.reference_loss, plain.mean
        )?;
    }
    writeln!(
        page,
        "{} seeds; {} parameters, {tokens} tokens in {steps} steps; the reference's loss on held-out mathematics is {:.3}.\n",
        plain.map_or(0, |row| row.runs),
        group.parameters,
        stream.reference_loss
    )?;
    let rate = |text: String| if has_rates { format!(" {text} |") } else { String::new() };
    write!(
        page,
        "| run |{} kept | tokens to plain | reached | choosing half | {TARGET} less plain |",
        rate("rate".to_owned())
    )?;
    for set in &sets {
        write!(page, " {set} |")?;
    }
    writeln!(page, " sure answers | unselected, training |")?;
    writeln!(
        page,
        "|---|{}---|---|---|---|---|{}---|---|",
        rate("---".to_owned()),
        "---|".repeat(sets.len())
    )?;
    writeln!(
        page,
        "| null |{} – | {} | – | – | {} |{} – | – |",
        rate("–".to_owned()),
        ratio(group.null.tokens),
        difference(group.null.difference),
        " – |".repeat(sets.len())
    )?;
    for row in &group.rows {
        write!(
            page,
            "| {} |{} {} | {} | {} of {} | {} | {} |",
            row.kind,
            rate(row.learning_rate.to_string()),
            shown(row.kept, 2),
            ratio(row.reporting.tokens),
            row.reached,
            plain.map_or(0, |row| row.runs),
            row.choosing.tokens.value.map_or("never".to_owned(), |value| format!("{value:.2}")),
            difference(row.reporting.difference)
        )?;
        for set in &sets {
            write!(page, " {} |", shown(row.losses.get(*set).copied(), 3))?;
        }
        writeln!(page, " {} | {} |", shown(row.sure, 2), shown(row.unselected_loss, 3))?;
    }
    write_costs(page, group)?;
    write_texts(page, group, stream, steps)?;
    if results.plan.experiment == Experiment::Rules {
        write_goals(page, group)?;
    }
    writeln!(page, "\n![Loss on held-out mathematics over tokens](loss-{name}.svg)")?;
    if group.rows.iter().any(|row| row.has_own_text) {
        writeln!(page, "\n![The same of the controls](controls-{name}.svg)")?;
    }
    if results.plan.experiment == Experiment::Gradients {
        writeln!(page, "\n![Loss on held-out mathematics over FLOPs](flops-{name}.svg)")?;
    }
    Ok(())
}

fn write_costs(page: &mut String, group: &GroupResults) -> std::fmt::Result {
    writeln!(
        page,
        "\n| run | FLOPs to plain | with scoring | CPU time to plain | with scoring | wall time to plain | with scoring |"
    )?;
    writeln!(page, "|---|---|---|---|---|---|---|")?;
    let null = std::iter::once(("null", &group.null));
    let rows = group.rows.iter().map(|row| (row.kind.as_str(), &row.reporting));
    for (kind, estimates) in null.chain(rows) {
        let Estimates { flops, flops_with_scoring, cpu, cpu_with_scoring, wall, wall_with_scoring, .. } =
            *estimates;
        let cells = [flops, flops_with_scoring, cpu, cpu_with_scoring, wall, wall_with_scoring];
        writeln!(page, "| {kind} | {} |", cells.map(ratio).join(" | "))?;
    }
    Ok(())
}

/// What the controls read, and what their numbers count.
fn write_texts(
    page: &mut String,
    group: &GroupResults,
    stream: &StreamResults,
    steps: u64,
) -> std::fmt::Result {
    let controls: Vec<&Row> = group.rows.iter().filter(|row| row.has_own_text).collect();
    if stream.texts.is_empty() || controls.is_empty() {
        return Ok(());
    }
    writeln!(
        page,
        "\nControls learn from every token of a text of their own: `curated` from the reference's curated text alone; \
         `stream-and-curated` from both, shuffled; `documents-N` from whole documents, the N % of the stream's tokens whose \
         documents have the highest mean excess loss of the base model over the reference; `oracle` from those documents of the \
         stream that hold mathematics, by their source, with the noise inside them. Their tokens are those that they learnt \
         from, again in each pass, not those that were left out; for `documents-N`, “with scoring” adds the forward passes of both models \
         over the stream, those left out too, in proportion to what was read of its text, as if a long stream were chosen from part by part. `reference` is the run that made the reference, one seed, at a falling \
         learning rate, to its end; what scores the stream is its best checkpoint on the choosing half.\n"
    )?;
    writeln!(
        page,
        "| text | documents | tokens | in documents with mathematics | lowest mean excess, nats | passes in {steps} steps |"
    )?;
    writeln!(page, "|---|---|---|---|---|---|")?;
    for row in controls {
        let Some(text) = stream.texts.get(&row.kind) else { continue };
        let seen: Vec<u64> =
            group.runs.iter().filter(|run| run.kind == row.kind).map(|run| run.effort.tokens).collect();
        let mean = seen.iter().sum::<u64>() as f64 / seen.len().max(1) as f64;
        writeln!(
            page,
            "| {} | {} | {} | {:.0} % | {} | {:.2} |",
            row.kind,
            text.documents,
            text.tokens,
            100.0 * text.target_tokens as f64 / text.tokens.max(1) as f64,
            text.excess.map_or("–".to_owned(), |excess| format!("{excess:.3}")),
            mean / text.tokens.max(1) as f64
        )?;
    }
    writeln!(
        page,
        "\nA step holds {} positions; how many of them predict differs with how a text's documents fill the rows.",
        BATCH_SIZE * SEQUENCE_LENGTH
    )
}

/// Whether the goals are met by the rules that the choosing half chose, and by the paper's share.
fn write_goals(page: &mut String, group: &GroupResults) -> std::fmt::Result {
    let (tokens, flops, lower) = GOALS;
    let row = |kind: Option<&String>| group.rows.iter().find(|row| Some(&row.kind) == kind);
    let by_tokens = row(group.chosen.by_tokens.as_ref());
    let by_flops = row(group.chosen.by_flops.as_ref());
    let paper = group.rows.iter().find(|row| row.slm_keep == Some(KEEP));
    let lines = [
        ("Tokens to plain at k = 60 %", paper, tokens, Measure::Tokens),
        ("Tokens to plain by the rule that the choosing half chose", by_tokens, tokens, Measure::Tokens),
        ("FLOPs to plain, scoring counted, by the rule that it chose", by_flops, flops, Measure::Flops),
        ("Loss less plain's by the rule chosen by tokens", by_tokens, -lower, Measure::Difference),
    ];
    writeln!(page)?;
    for (what, row, goal, measure) in lines {
        let Some(row) = row else {
            writeln!(page, "- {what}: none came down to plain's end; goal {goal}: missed.")?;
            continue;
        };
        let (found, text) = match measure {
            Measure::Tokens => (row.reporting.tokens, ratio(row.reporting.tokens)),
            Measure::Flops => (row.reporting.flops_with_scoring, ratio(row.reporting.flops_with_scoring)),
            Measure::Difference => (row.reporting.difference, difference(row.reporting.difference)),
        };
        let verdict = if found.value.is_some_and(|value| value <= goal) { "met" } else { "missed" };
        writeln!(page, "- {what} ({}): {text}; goal {goal}: {verdict}.", row.kind)?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Measure {
    Tokens,
    Flops,
    Difference,
}
