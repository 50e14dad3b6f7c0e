//! The texts of the controls, prepared once: what the stream and the curated text hold, as lines that carry the reference's
//! losses, so that a control reads them in the windows in which the students read the stream.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sluice_feed::random::SplitMix64;
use sluice_trainer::run::files::write_whole;

use super::kind::Kind;

/// With what the sources of documents begin that hold mathematics, noise inside them or not.
const TARGET_SOURCE: &str = "gsm_symbolic";
/// Key of the order in which stream and curated text are mixed.
const ORDER: (u64, u64) = (13, 1);

/// What the prepared texts are, and what it took to choose among whole documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Prepared {
    /// By the name of the control.
    pub texts: BTreeMap<String, Text>,
    /// Wall and CPU time of scoring the stream with the reference and with the base model, seconds.
    pub scoring_seconds: (f64, f64),
}

/// One text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Text {
    /// Documents.
    pub documents: u64,
    /// Predicted tokens of one pass.
    pub tokens: u64,
    /// Those of them in documents that hold mathematics.
    pub target_tokens: u64,
    /// Lowest mean excess loss of a document that was kept, nats a token; absent where none decided.
    pub excess: Option<f64>,
    /// Files that it lies in.
    pub parts: usize,
}

/// A line of `sluiced model score`, as it stands and as far as it is looked at.
#[derive(Clone, Debug)]
struct Line {
    text: String,
    id: String,
    source: String,
    predictions: u64,
    mean_loss: f64,
}

#[derive(Deserialize)]
struct Fields {
    id: String,
    source: String,
    tokens: Vec<u32>,
    mean_loss: f64,
}

/// Where the files of a control's text lie.
pub(super) fn files(folder: &Path, name: &str, parts: usize) -> Vec<PathBuf> {
    (0..parts).map(|part| folder.join(name).join(format!("part-{part:02}.jsonl"))).collect()
}

/// Writes the texts of these kinds below `folder`, in as many parts as there are partitions. The stream was scored with the
/// reference (`scored`) and with the base model (`by_base`), the curated text with the reference (`curated`).
pub(super) fn write(
    folder: &Path,
    kinds: &[Kind],
    [scored, by_base, curated]: [&Path; 3],
    partitions: usize,
) -> Result<BTreeMap<String, Text>> {
    let stream = read(scored)?;
    let base = read(by_base)?;
    let curated = read(curated)?;
    let mut texts = BTreeMap::new();
    for kind in kinds.iter().filter(|kind| kind.has_own_text()) {
        let (lines, excess) = match kind {
            Kind::Curated => (curated.clone(), None),
            Kind::StreamAndCurated => {
                let mut both = [stream.clone(), curated.clone()].concat();
                SplitMix64::keyed(ORDER.0, ORDER.1).shuffle(&mut both);
                (both, None)
            }
            Kind::Documents(keep) => highest(&stream, &base, *keep)?,
            Kind::Oracle => (stream.iter().filter(|line| line.is_target()).cloned().collect(), None),
            // Those have no text of their own.
            _ => continue,
        };
        let name = kind.name();
        texts.insert(name.clone(), write_text(folder, &name, &lines, excess, partitions)?);
    }
    Ok(texts)
}

/// The documents with the highest mean excess loss against the base model, as many as hold this share of the tokens, in the
/// order of the stream; and the lowest of these means.
fn highest(stream: &[Line], base: &[Line], keep: f64) -> Result<(Vec<Line>, Option<f64>)> {
    if stream.len() != base.len() || stream.iter().zip(base).any(|(one, other)| one.id != other.id) {
        bail!("the reference and the base model scored different documents; remove their folder");
    }
    let excess: Vec<f64> =
        stream.iter().zip(base).map(|(reference, base)| base.mean_loss - reference.mean_loss).collect();
    let mut order: Vec<usize> = (0..stream.len()).collect();
    // Of equals the earlier comes first, as the sort is stable.
    order.sort_by(|&left, &right| excess[right].total_cmp(&excess[left]));
    let goal = keep * tokens(stream) as f64;
    let mut kept = Vec::new();
    let mut held = 0;
    for index in order {
        if held as f64 >= goal {
            break;
        }
        held += stream[index].predictions;
        kept.push(index);
    }
    let lowest = kept.last().map(|&index| excess[index]);
    kept.sort_unstable();
    Ok((kept.into_iter().map(|index| stream[index].clone()).collect(), lowest))
}

fn write_text(
    folder: &Path,
    name: &str,
    lines: &[Line],
    excess: Option<f64>,
    partitions: usize,
) -> Result<Text> {
    // No part without a document.
    let parts = partitions.min(lines.len());
    if parts == 0 {
        bail!("the text of {name} is empty: the stream holds nothing of it");
    }
    let own = folder.join(name);
    std::fs::create_dir_all(&own).with_context(|| format!("cannot create {}", own.display()))?;
    for (part, path) in files(folder, name, parts).iter().enumerate() {
        let of_part = lines.iter().skip(part).step_by(parts);
        let text: String = of_part.flat_map(|line| [line.text.as_str(), "\n"]).collect();
        write_whole(path, text.as_bytes())?;
    }
    let target: Vec<Line> = lines.iter().filter(|line| line.is_target()).cloned().collect();
    Ok(Text {
        documents: lines.len() as u64,
        tokens: tokens(lines),
        target_tokens: tokens(&target),
        excess,
        parts,
    })
}

impl Line {
    /// Whether it holds mathematics, by its source.
    fn is_target(&self) -> bool {
        self.source.starts_with(TARGET_SOURCE)
    }
}

fn tokens(lines: &[Line]) -> u64 {
    lines.iter().map(|line| line.predictions).sum()
}

fn read(path: &Path) -> Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let line = |(number, text): (usize, &str)| {
        let Fields { id, source, tokens, mean_loss } = serde_json::from_str(text)
            .with_context(|| format!("{}, line {}, is no scored document", path.display(), number + 1))?;
        let predictions = tokens.len().saturating_sub(1) as u64;
        Ok(Line { text: text.to_owned(), id, source, predictions, mean_loss })
    };
    text.lines().enumerate().map(line).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use std::path::Path;

    use serde_json::{Value, json};

    use super::{Kind, Text, files, write};

    fn file(folder: &Path, name: &str, documents: &[(&str, &str, usize, f64)]) -> std::path::PathBuf {
        let line = |&(id, source, tokens, mean_loss): &(&str, &str, usize, f64)| {
            let line = json!({"id": id, "source": source, "tokens": vec![7; tokens], "mean_loss": mean_loss});
            format!("{line}\n")
        };
        let path = folder.join(name);
        std::fs::write(&path, documents.iter().map(line).collect::<String>()).unwrap();
        path
    }

    fn ids(folder: &Path, name: &str, text: &Text) -> Vec<Vec<String>> {
        let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned();
        let of_file = |path| std::fs::read_to_string(path).unwrap().lines().map(id).collect();
        files(folder, name, text.parts).into_iter().map(of_file).collect()
    }

    #[test]
    fn each_control_gets_its_documents() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        // Mean excess losses: 0.5, 2, -1, 1, 0; tokens predicted: 10, 20, 30, 20, 20.
        let scored = [
            ("a", "kjv", 11, 5.0),
            ("b", "gsm_symbolic+kjv", 21, 3.0),
            ("c", "kjv", 31, 6.0),
            ("d", "botocore", 21, 4.0),
            ("e", "gsm_symbolic", 21, 5.0),
        ];
        let base = [5.5, 5.0, 5.0, 5.0, 5.0];
        let by_base: Vec<_> = scored
            .iter()
            .zip(base)
            .map(|(&(id, source, tokens, _), loss)| (id, source, tokens, loss))
            .collect();
        let curated = [("x", "gsm_symbolic", 5, 1.0), ("y", "gsm_symbolic", 5, 1.0)];
        let paths = [
            file(folder, "scored.jsonl", &scored),
            file(folder, "by-base.jsonl", &by_base),
            file(folder, "curated.jsonl", &curated),
        ];
        let kinds = [Kind::Plain, Kind::Curated, Kind::StreamAndCurated, Kind::Documents(0.45), Kind::Oracle];
        let paths = [paths[0].as_path(), &paths[1], &paths[2]];
        let texts = write(folder, &kinds, paths, 3).unwrap();
        assert_eq!(texts.len(), 4, "plain reads the topic");

        // b (20), d (20), a (10): the first that reach 45 of 100 tokens, in the order of the stream.
        let documents = &texts["documents-45"];
        assert_eq!(ids(folder, "documents-45", documents), [["a"], ["b"], ["d"]]);
        let expected = Text { documents: 3, tokens: 50, target_tokens: 20, excess: Some(0.5), parts: 3 };
        assert_eq!(documents, &expected);
        assert_eq!(ids(folder, "oracle", &texts["oracle"]), [["b"], ["e"]]);
        assert_eq!(texts["oracle"].target_tokens, 40);
        assert_eq!(ids(folder, "curated", &texts["curated"]), [["x"], ["y"]]);
        let mut both = ids(folder, "stream-and-curated", &texts["stream-and-curated"]).concat();
        both.sort();
        assert_eq!(both, ["a", "b", "c", "d", "e", "x", "y"]);

        // Scores of other documents are refused.
        let other = file(folder, "other.jsonl", &scored[1..]);
        assert!(write(folder, &[Kind::Documents(0.5)], [paths[0], &other, paths[2]], 3).is_err());
    }
}
