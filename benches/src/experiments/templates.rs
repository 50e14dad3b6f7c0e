//! Held-out problems by the template they were made from. One half of the templates chooses, the other half reports, so that
//! what is reported of a choice owes nothing to the luck of the templates that it was made by. Of the luck of seeds, which are the
//! same in both halves, it may.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use sluice_trainer::run::files::write_whole;
use sluice_trainer::run::recorded::RecordedRun;
use sluice_trainer::text::{Bounds, TextTokenizer};
use sluice_trainer::training::evaluate::{EvalFile, EvalSet};

use super::group::BATCH_SIZE;
use super::plan::TARGET;

/// What a template's problems are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Half {
    /// They choose: the reference's checkpoint, learning rates, and the best rule.
    Choosing,
    /// They report.
    Reporting,
}

/// A template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Template {
    /// Its name, as the source of its problems.
    pub name: String,
    /// What its problems are for.
    pub half: Half,
    /// Tokens that are predicted of them.
    pub predictions: usize,
}

/// The templates of an evaluation set, and which tokens are whose.
#[derive(Clone, Debug)]
pub(super) struct Templates {
    /// In the order of their names.
    pub list: Vec<Template>,
    /// For each document, in the order of the file, its template and its predictions.
    documents: Vec<(usize, usize)>,
}

/// One evaluation of a run on the target, by template.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct TemplateEval {
    /// Steps done.
    pub step: u64,
    /// Predictions seen in training.
    pub tokens: u64,
    /// Mean loss of each template's tokens, nats, to five decimals, in the order of the templates.
    pub losses: Vec<f64>,
}

impl Templates {
    /// Reads the documents of an evaluation file; its lines name their template as their source.
    pub fn read(file: &Path, tokenizer: &TextTokenizer) -> Result<Self> {
        let sources = sources(file)?;
        let set = EvalFile { name: TARGET.to_owned(), path: file.to_owned() };
        let set = EvalSet::read(&set, tokenizer, Bounds::default(), BATCH_SIZE)?;
        Self::of(&sources, set.predictions_by_document())
            .with_context(|| format!("{} is no evaluation set by templates", file.display()))
    }

    fn of(sources: &[String], predictions: impl Iterator<Item = usize>) -> Result<Self> {
        let names = names(sources);
        ensure!(
            names.len() >= 4,
            "{} templates are too few to choose by one half and report by the other",
            names.len()
        );
        let mut list: Vec<Template> = (0..)
            .zip(&names)
            .map(|(index, name)| Template { name: name.clone(), half: half_of(index), predictions: 0 })
            .collect();
        let mut documents = Vec::new();
        for (source, predictions) in sources.iter().zip(predictions) {
            let template = names.binary_search(source).unwrap_or_default();
            list[template].predictions += predictions;
            documents.push((template, predictions));
        }
        Ok(Self { list, documents })
    }

    /// The evaluations of a run, from the losses of single tokens that it wrote down.
    pub fn evaluations(&self, run: &RecordedRun) -> Result<Vec<TemplateEval>> {
        let mut found = Vec::new();
        for eval in run.evals(TARGET) {
            let losses = run.token_losses.iter().find(|one| one.step == eval.step && one.set == TARGET);
            let losses = losses.with_context(|| {
                format!("{} wrote down no losses of single tokens at step {}", run.name, eval.step)
            })?;
            let losses = self.means(&losses.losses).with_context(|| format!("of {}", run.name))?;
            found.push(TemplateEval { step: eval.step, tokens: eval.tokens, losses });
        }
        Ok(found)
    }

    /// Mean loss by template, of the losses of all tokens in the order of the file.
    fn means(&self, losses: &[f32]) -> Result<Vec<f64>> {
        let expected: usize = self.documents.iter().map(|(_, predictions)| predictions).sum();
        ensure!(losses.len() == expected, "{} losses for {expected} predicted tokens", losses.len());
        let mut sums = vec![0.0; self.list.len()];
        let mut rest = losses;
        for &(template, predictions) in &self.documents {
            let (own, others) = rest.split_at(predictions);
            sums[template] += own.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            rest = others;
        }
        let mean = |(sum, template): (f64, &Template)| {
            // As it is written down, so that whoever reads the results finds the same intervals.
            (sum / template.predictions as f64 * 1e5).round() / 1e5
        };
        Ok(sums.into_iter().zip(&self.list).map(mean).collect())
    }
}

/// Writes those lines of an evaluation file that belong to one half into a file of their own.
pub(super) fn write_half(file: &Path, half: Half, to: &Path) -> Result<()> {
    let sources = sources(file)?;
    let names = names(&sources);
    let text = read(file)?;
    let lines = text.lines().zip(&sources).filter(|(_, source)| {
        let index = names.binary_search(source).unwrap_or_default();
        half_of(index) == half
    });
    let text: String = lines.flat_map(|(line, _)| [line, "\n"]).collect();
    write_whole(to, text.as_bytes())
}

/// Every other template chooses, in the order of their names.
fn half_of(index: usize) -> Half {
    if index % 2 == 1 { Half::Choosing } else { Half::Reporting }
}

fn names(sources: &[String]) -> Vec<String> {
    let mut names = sources.to_vec();
    names.sort_unstable();
    names.dedup();
    names
}

fn sources(file: &Path) -> Result<Vec<String>> {
    let source = |(number, line): (usize, &str)| {
        let line: Value = serde_json::from_str(line)?;
        let source = line["source"].as_str().map(str::to_owned);
        source.with_context(|| format!("{}, line {}, has no source", file.display(), number + 1))
    };
    read(file)?.lines().enumerate().map(source).collect()
}

fn read(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use super::{Half, Templates, write_half};

    fn sources() -> Vec<String> {
        ["t/3", "t/0", "t/1", "t/2", "t/1"].map(str::to_owned).to_vec()
    }

    #[test]
    fn losses_of_tokens_become_means_of_templates() {
        let templates = Templates::of(&sources(), [2, 1, 1, 1, 3].into_iter()).unwrap();
        let means = templates.means(&[1.0, 2.0, 5.0, 8.0, 6.0, 0.0, 0.0, 4.0]).unwrap();
        // t/0: 5; t/1: (8 + 0 + 0 + 4) / 4; t/2: 6; t/3: (1 + 2) / 2.
        assert_eq!(means, [5.0, 3.0, 6.0, 1.5]);
        assert!(templates.means(&[1.0; 7]).is_err(), "a loss is missing");
        let names = |half| {
            let of_half = templates.list.iter().filter(move |template| template.half == half);
            of_half.map(|template| template.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(names(Half::Reporting), ["t/0", "t/2"]);
        assert_eq!(names(Half::Choosing), ["t/1", "t/3"]);
        assert!(Templates::of(&sources()[..2], [1, 1].into_iter()).is_err(), "nothing to halve");
    }

    #[test]
    fn a_half_is_written_as_the_same_lines() {
        let folder = tempfile::tempdir().unwrap();
        let (file, half) = (folder.path().join("all.jsonl"), folder.path().join("half.jsonl"));
        let line =
            |(number, source): (usize, String)| format!("{{\"id\":{number},\"source\":\"{source}\"}}\n");
        let text: String = sources().into_iter().enumerate().map(line).collect();
        std::fs::write(&file, &text).unwrap();
        write_half(&file, Half::Choosing, &half).unwrap();
        let expected: String =
            text.split_inclusive('\n').filter(|line| line.contains("t/1") || line.contains("t/3")).collect();
        assert_eq!(std::fs::read_to_string(half).unwrap(), expected);
    }
}
