//! `sluiced model inspect` and `sluiced model score`: a model folder without Kafka.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::config::Config;
use crate::device::Device;
use crate::exit::{DATA, ExitCode as _, ExitError, NO_INPUT, USAGE};
use crate::ingest::{Fields, Format, open};
use crate::reference::Reference;
use crate::score::documents::{DocumentScores, score_documents};
use crate::score::model::Model;

/// Documents that are tokenized and scored together.
const CHUNK_DOCUMENTS: usize = 256;

/// Prints what was found in the model of `folder` and what was done to it. ONNX Runtime is not asked.
#[allow(clippy::print_stdout)]
pub fn inspect(folder: &Path, device: &str, as_json: bool) -> anyhow::Result<()> {
    let device = device.parse::<Device>().map_err(|error| anyhow!(error)).exit_code(USAGE)?;
    let model = Model::load(folder, device, false).exit_code(NO_INPUT)?;
    let description = describe(&model);
    if as_json {
        let fields: serde_json::Map<_, _> =
            description.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        println!("{}", serde_json::to_string_pretty(&fields)?);
        return Ok(());
    }
    for (key, value) in &description {
        let lines = match value {
            Value::Array(values) if values.is_empty() => vec!["none".to_owned()],
            Value::Array(values) => values.iter().map(text).collect(),
            one => vec![text(one)],
        };
        for (index, line) in lines.iter().enumerate() {
            println!("{:<16}{line}", if index == 0 { key.replace('_', " ") } else { String::new() });
        }
    }
    Ok(())
}

/// A value as people read it; of an object, its fields in the order of their names.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "unknown".to_owned(),
        Value::String(text) => text.clone(),
        Value::Object(fields) => fields.values().map(text).collect::<Vec<_>>().join(": "),
        other => other.to_string(),
    }
}

fn describe(model: &Model) -> Vec<(&'static str, Value)> {
    let report = &model.report;
    let fed = model
        .inputs
        .iter()
        .map(|(name, element)| json!({"input": name, "is": format!("fed, {element:?}").to_lowercase()}));
    let settled = report.settled_inputs.iter().map(|(name, what)| json!({"input": name, "is": what}));
    let findings =
        model.findings.iter().map(|finding| json!({"code": finding.code(), "text": finding.to_string()}));
    let or_none = |value: Option<Value>| value.unwrap_or_else(|| json!("none"));
    vec![
        ("fingerprint", json!(model.identity.fingerprint.to_string())),
        ("tokenizer", json!(model.identity.tokenizer.to_string())),
        ("opset", json!(report.opset)),
        ("inputs", fed.chain(settled).collect()),
        ("head", json!(report.head)),
        ("after_the_head", json!(report.after_head)),
        ("soft_cap", or_none(report.soft_cap.map(|cap| json!(cap)))),
        ("vocabulary", json!(model.identity.vocabulary)),
        ("weights", json!(format!("{:?}", model.identity.precision).to_lowercase())),
        (
            "computes",
            json!(if model.widened { "in f32, for the CPU has no bfloat16" } else { "as exported" }),
        ),
        ("external_data", json!(model.data_files)),
        ("context", json!(model.context_max)),
        ("bos_token", or_none(model.bos_token.map(|token| json!(token)))),
        ("findings", findings.collect()),
    ]
}

/// What `sluiced model score` was asked to do.
#[derive(Clone, Debug)]
pub struct ScoreText {
    /// Names of the fields in JSON Lines.
    pub fields: Fields,
    /// What the files are.
    pub format: Format,
    /// Whether only the totals are printed.
    pub summary: bool,
    /// Files; `-` is standard input.
    pub files: Vec<PathBuf>,
}

/// What was scored.
#[derive(Debug, Default)]
struct Totals {
    documents: u64,
    bad: u64,
    tokens: u64,
    predicted: u64,
    loss: f64,
}

/// Scores text and prints a line of JSON for each document, or one for all.
pub fn score(config: &Config, asked: &ScoreText) -> anyhow::Result<()> {
    let path = config.model.path.join("tokenizer.json");
    let json = std::fs::read(&path)
        .with_context(|| format!("cannot read the tokenizer {}", path.display()))
        .exit_code(NO_INPUT)?;
    let mut tokenizer = Tokenizer::from_bytes(&json)
        .map_err(|error| anyhow!("{} is no tokenizer: {error}", path.display()))
        .exit_code(DATA)?;
    // As `sluiced ingest` does: the document's own tokens, neither cut nor padded.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| anyhow!(error))?;
    tokenizer.set_encode_special_tokens(true);
    let mut reference = Reference::open(config)?;
    let mut totals = Totals::default();
    let mut chunk = Vec::new();
    for file in &asked.files {
        let documents = open(file, asked.format, &asked.fields, &ProgressBar::hidden())
            .with_context(|| format!("cannot read {}", file.display()))
            .exit_code(NO_INPUT)?;
        for document in documents {
            match document {
                Ok(document) => chunk.push((document.id, document.text)),
                Err(error) => {
                    totals.bad += 1;
                    tracing::warn!("passing over a bad document: {error:#}");
                }
            }
            if chunk.len() == CHUNK_DOCUMENTS {
                score_chunk(config, asked, &tokenizer, &mut reference, &mut chunk, &mut totals)?;
            }
        }
    }
    score_chunk(config, asked, &tokenizer, &mut reference, &mut chunk, &mut totals)?;
    let mean = totals.loss / totals.predicted as f64;
    tracing::info!(documents = totals.documents, tokens = totals.tokens, mean_loss = mean, "scored");
    if asked.summary {
        let line = json!({
            "documents": totals.documents,
            "tokens": totals.tokens,
            "predicted_tokens": totals.predicted,
            "mean_loss_nats": mean,
            "perplexity": mean.exp(),
        });
        writeln!(std::io::stdout(), "{line}")?;
    }
    if totals.bad > 0 {
        let error = anyhow!("{} documents were bad and passed over; see the warnings above", totals.bad);
        return Err(ExitError { code: DATA, error }.into());
    }
    Ok(())
}

fn score_chunk(
    config: &Config,
    asked: &ScoreText,
    tokenizer: &Tokenizer,
    reference: &mut Reference,
    chunk: &mut Vec<(String, String)>,
    totals: &mut Totals,
) -> anyhow::Result<()> {
    let (ids, texts): (Vec<String>, Vec<String>) = std::mem::take(chunk).into_iter().unzip();
    let encodings =
        tokenizer.encode_batch(texts, false).map_err(|error| anyhow!("cannot tokenize: {error}"))?;
    let documents: Vec<Arc<[u32]>> = encodings.iter().map(|encoding| encoding.get_ids().into()).collect();
    for tokens in &documents {
        if let Some(id) = tokens.iter().find(|&&id| id >= reference.model.identity.vocabulary) {
            let vocabulary = reference.model.identity.vocabulary;
            return Err(anyhow!("the tokenizer gives id {id}, and the model knows {vocabulary} ids"))
                .exit_code(DATA);
        }
    }
    let ladder = config.batch.ladder(reference.policy);
    let scores = score_documents(
        &mut reference.scorer,
        &documents,
        reference.policy,
        config.batch.tokens_max,
        ladder,
    )?;
    let mut out = std::io::stdout().lock();
    for (((id, tokens), encoding), scores) in ids.iter().zip(&documents).zip(&encodings).zip(&scores) {
        let predicted = scores.predicted().count() as u64;
        let sum: f64 = scores.predicted().map(f64::from).sum();
        totals.documents += 1;
        totals.tokens += tokens.len() as u64;
        totals.predicted += predicted;
        totals.loss += sum;
        if !asked.summary {
            let line = document_line(id, tokens, encoding.get_tokens(), scores, sum / predicted as f64);
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}

/// NaN, which stands for "no prediction", is null in JSON.
fn document_line(id: &str, tokens: &[u32], pieces: &[String], scores: &DocumentScores, mean: f64) -> Value {
    let mut line = json!({
        "id": id,
        "tokens": tokens,
        "pieces": pieces,
        "losses": scores.losses,
        "mean_loss": mean,
    });
    if let (false, Some(fields)) = (scores.entropies.is_empty(), line.as_object_mut()) {
        fields.insert("entropies".to_owned(), json!(scores.entropies));
    }
    line
}
