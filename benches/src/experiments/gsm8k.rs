//! Problems of GSM8K (Cobbe et al., arXiv 2110.14168), to evaluate on; never trained on.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use serde_json::json;
use sluice_text::json;
use sluice_trainer::failure::{Classify, Failure};
use sluice_trainer::run::files::write_whole;

/// How many of them.
const PROBLEMS: usize = 20;

/// GSM8K's training problems: its test problems are where the templates of the corpus come from.
fn train_file(folder: &Path) -> PathBuf {
    folder.join("train.jsonl")
}

/// Whether the folder holds what is evaluated on.
pub(super) fn check(folder: &Path) -> Result<()> {
    if train_file(folder).is_file() {
        return Ok(());
    }
    Err(Failure::Usage(format!("{} holds no train.jsonl of GSM8K; leave out --gsm8k", folder.display()))
        .into())
}

#[derive(Deserialize)]
struct Line {
    question: String,
    answer: String,
}

/// Writes the first problems of the folder into a file, spelt as the corpus spells its own.
pub(super) fn write(folder: &Path, to: &Path) -> Result<()> {
    let from = train_file(folder);
    let text = std::fs::read_to_string(&from).with_context(|| format!("cannot read {}", from.display()))?;
    let mut lines = String::new();
    for (number, line) in (1..).zip(text.lines().take(PROBLEMS)) {
        let Line { question, answer } = json::from_slice(line.as_bytes())
            .map_err(|error| anyhow!("{}, line {number}: {error}", from.display()))
            .or_data()?;
        let text = format!("Question: {question}\nAnswer: {}", without_annotations(&answer));
        lines.push_str(&json!({ "text": text }).to_string());
        lines.push('\n');
    }
    write_whole(to, lines.as_bytes())
}

/// GSM8K's solutions name each computation twice, as in `48/2 = <<48/2=24>>24`.
fn without_annotations(answer: &str) -> String {
    let mut plain = String::with_capacity(answer.len());
    let mut rest = answer;
    while let Some((before, after)) = rest.split_once("<<") {
        plain.push_str(before);
        rest = after.split_once(">>").map_or("", |(_, after)| after);
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::without_annotations;

    #[test]
    fn annotations_of_gsm8k_are_left_out() {
        let answer =
            "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = <<48+24=72>>72 clips.\n#### 72";
        let plain = "Natalia sold 48/2 = 24 clips in May.\n48+24 = 72 clips.\n#### 72";
        assert_eq!(without_annotations(answer), plain);
        assert_eq!(without_annotations("#### 5"), "#### 5");
    }
}
