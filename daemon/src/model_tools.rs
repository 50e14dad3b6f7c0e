//! `sluiced model inspect` and `sluiced model score`: a model folder without Kafka.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use serde_json::{Value, json};
use sluice_schemas::record::{Bos, ContextPolicy, LossFormat, Losses, RecordError, TokenAttribute};
use sluice_text::output::{Reader, print_line};
use sluice_text::{Fields, Format, TEXT_BYTES_MAX, TOKENS_MAX, Text, TextReader, TextTokenizer};

use crate::config::Config;
use crate::device::Device;
use crate::exit::{DATA, ExitCode as _, ExitError, NO_INPUT, USAGE};
use crate::reference::{Reference, onnxruntime_library};
use crate::score::Scorer;
use crate::score::documents::{DocumentScores, classify_documents};
use crate::score::kind::ModelKind;
use crate::score::model::Model;
use crate::score::placement::Kind;
use crate::score::runtime::SessionOptions;

/// Documents that are tokenized and scored together.
const CHUNK_DOCUMENTS: usize = 256;
/// Bytes of text that are tokenized and scored together.
const CHUNK_BYTES: usize = 8 << 20;

/// What `sluiced model inspect` was asked for.
#[derive(Clone, Debug)]
pub struct Inspect {
    /// Folder of the model.
    pub folder: PathBuf,
    /// Path of ONNX Runtime's library; empty for the environment's, as `model.onnxruntime`.
    pub library: PathBuf,
    /// The device to run it on; without one it is looked at as for the CPU, and not run.
    pub device: Option<String>,
    /// The class of a token classifier, as `model.class`.
    pub class: Option<String>,
    /// Whether JSON is printed.
    pub json: bool,
}

/// Prints what was found in a model and what was done to it; with a device, what of it runs where.
pub fn inspect(asked: &Inspect) -> anyhow::Result<()> {
    let device = asked.device.as_deref().unwrap_or("cpu");
    let device = device.parse::<Device>().map_err(|error| anyhow!(error)).exit_code(USAGE)?;
    let library = onnxruntime_library(&asked.library);
    let mut model = Model::load(&asked.folder, device, false).exit_code(NO_INPUT)?;
    match &asked.class {
        Some(class) => model.choose_class(class, false)?,
        // Where none is meant, the classes are still listed.
        None => drop(model.choose_class("", false)),
    }
    let fused = model.fuse_attention(&library);
    let mut description = describe(&model);
    if asked.device.is_some() {
        fused.exit_code(NO_INPUT)?;
        description.push(("placement", placement(&model, device, library, asked.json)?));
    } else if let Err(error) = fused {
        // The rest can be said without ONNX Runtime.
        tracing::warn!("attention was not looked at: {error:#}");
    }
    let page = if asked.json {
        let fields: serde_json::Map<_, _> =
            description.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        serde_json::to_string_pretty(&fields)?
    } else {
        description.iter().flat_map(|(key, value)| lines(key, value)).collect::<Vec<_>>().join("\n")
    };
    // Whoever has closed the pipe has seen enough.
    print_line(&page)?;
    Ok(())
}

/// Runs a short row on `device`, and lists what ran where.
fn placement(model: &Model, device: Device, library: PathBuf, as_json: bool) -> anyhow::Result<Value> {
    let options = SessionOptions { library, device, threads: 0, device_memory_bytes: 0 };
    let placement = Scorer::new(model, &options, false).exit_code(NO_INPUT)?.placement()?;
    if let Err(misplaced) = placement.check(device) {
        tracing::warn!("{misplaced}");
    }
    let rows = placement.rows().map(|(kind, nodes, _)| {
        let Kind { provider, operator, element } = kind;
        if as_json {
            json!({"provider": provider, "operator": operator, "element": element, "nodes": nodes})
        } else {
            json!(format!("{provider}: {operator} of {element} x {nodes}"))
        }
    });
    Ok(rows.collect())
}

/// What a model's attention is, in a line for each operator.
fn attention(model: &Model) -> Value {
    let Some(report) = &model.attention else { return Value::Null };
    let exported =
        report.exported.iter().map(|(operator, count)| format!("{operator} x {count}, as exported"));
    let fused =
        report.fused.iter().map(|(operator, count)| format!("{operator} x {count}, fused as it was loaded"));
    let left =
        report.left.iter().map(|left| format!("spelled out x {}, see the findings", left.layers.len()));
    exported.chain(fused).chain(left).collect()
}

/// What is found under a key, a line for each value, of which the first names the key.
fn lines(key: &str, value: &Value) -> Vec<String> {
    let values = match value {
        Value::Array(values) if values.is_empty() => vec!["none".to_owned()],
        Value::Array(values) => values.iter().map(text).collect(),
        one => vec![text(one)],
    };
    let name = key.replace('_', " ");
    let names = std::iter::once(name.as_str()).chain(std::iter::repeat(""));
    names.zip(values).map(|(name, value)| format!("{name:<16}{value}")).collect()
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
        ("fingerprint", json!(fingerprint(model))),
        ("tokenizer", json!(model.identity.tokenizer.to_string())),
        ("kind", kind(model)),
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
        ("attention", attention(model)),
        ("length_limit", or_none(model.length_limit.map(|limit| json!(limit)))),
        ("external_data", json!(model.data_files)),
        ("context", json!(model.context_max)),
        ("bos_token", or_none(model.bos_token.map(|token| json!(token)))),
        ("findings", findings.collect()),
    ]
}

/// The fingerprint that records carry. Until a classifier's class is chosen there is none.
fn fingerprint(model: &Model) -> String {
    if matches!(model.kind, ModelKind::TokenClassifier { .. }) && model.class.is_none() {
        return "depends on the class; give one of the classes below as --model-class".to_owned();
    }
    model.identity.fingerprint.to_string()
}

/// What a model says of a token; of a classifier, a line for each class, the one that is asked for marked.
fn kind(model: &Model) -> Value {
    let ModelKind::TokenClassifier { labels } = &model.kind else { return json!("causal language model") };
    let chosen = model.class.as_ref().map(|class| class.index as usize);
    let class = |(index, label): (usize, &String)| {
        let mark = if chosen == Some(index) { ", whose probability is recorded" } else { "" };
        format!("class {index}: {label}{mark}")
    };
    std::iter::once("token classifier".to_owned()).chain(labels.iter().enumerate().map(class)).collect()
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
    /// Of the losses, or of the probabilities of a token classifier's class.
    sum: f64,
}

/// Scores text and prints a line of JSON for each document, or one for all. Bad documents are named, counted and passed
/// over, and make the exit code 65.
pub fn score(config: &Config, asked: &ScoreText) -> anyhow::Result<()> {
    let tokenizer =
        TextTokenizer::read(&config.model.path.join("tokenizer.json")).map_err(ExitError::from)?;
    let mut reference = Reference::open(config)?;
    // Trainers read these losses as they read the daemon's.
    reference.self_test(config)?;
    let mut scoring = Scoring { config, asked, tokenizer, reference, totals: Totals::default() };
    if scoring.files()? == Reader::Gone {
        return Ok(());
    }
    let class = scoring.reference.model.class.clone();
    let totals = scoring.totals;
    let mean = totals.sum / totals.predicted as f64;
    let of = if class.is_some() { "probability of the class" } else { "loss in nats" };
    tracing::info!(
        documents = totals.documents,
        bad = totals.bad,
        tokens = totals.tokens,
        mean,
        of,
        "scored"
    );
    if asked.summary {
        let line = match class {
            None => json!({
                "documents": totals.documents,
                "tokens": totals.tokens,
                "predicted_tokens": totals.predicted,
                "mean_loss_nats": mean,
                "perplexity": mean.exp(),
            }),
            Some(class) => json!({
                "documents": totals.documents,
                "tokens": totals.tokens,
                "class": class.name,
                "mean_attribute": mean,
            }),
        };
        print_line(&line.to_string())?;
    }
    if totals.bad > 0 {
        let error = anyhow!("{} documents were bad and passed over; see the warnings above", totals.bad);
        return Err(ExitError { code: DATA, error }.into());
    }
    Ok(())
}

/// One call of `sluiced model score` on its way through the files.
struct Scoring<'a> {
    config: &'a Config,
    asked: &'a ScoreText,
    tokenizer: TextTokenizer,
    reference: Reference,
    totals: Totals,
}

/// A document that was scored.
struct Document {
    id: String,
    source: Option<String>,
    tokens: Arc<[u32]>,
}

impl Scoring<'_> {
    fn files(&mut self) -> anyhow::Result<Reader> {
        let reader = TextReader {
            format: self.asked.format,
            fields: self.asked.fields.clone(),
            text_bytes_max: TEXT_BYTES_MAX,
        };
        let mut chunk = Vec::new();
        let mut bytes = 0;
        for file in &self.asked.files {
            let documents = reader
                .open(file, |raw| raw)
                .with_context(|| format!("cannot read {}", file.display()))
                .exit_code(NO_INPUT)?;
            for document in documents {
                match document {
                    Ok(document) => {
                        bytes += document.text.len();
                        chunk.push(document);
                    }
                    Err(error) => self.bad(&format!("{error:#}")),
                }
                if chunk.len() == CHUNK_DOCUMENTS || bytes >= CHUNK_BYTES {
                    bytes = 0;
                    if self.chunk(std::mem::take(&mut chunk))? == Reader::Gone {
                        return Ok(Reader::Gone);
                    }
                }
            }
        }
        self.chunk(chunk)
    }

    fn bad(&mut self, why: &str) {
        self.totals.bad += 1;
        tracing::warn!("passing over a bad document: {why}");
    }

    fn chunk(&mut self, chunk: Vec<Text>) -> anyhow::Result<Reader> {
        let texts: Vec<&str> = chunk.iter().map(|document| document.text.as_str()).collect();
        let encoded = self.tokenizer.encode_all(&texts, TOKENS_MAX);
        let vocabulary = self.reference.model.identity.vocabulary;
        let mut documents = Vec::new();
        for (text, tokens) in chunk.into_iter().zip(encoded) {
            let id = text.id;
            match tokens {
                Err(error) => self.bad(&format!("{id}: {error}")),
                Ok(tokens) => match tokens.iter().find(|&&token| token >= vocabulary) {
                    Some(token) => self.bad(&format!(
                        "{id}: the tokenizer gives the token id {token}, and the model knows {vocabulary} ids"
                    )),
                    None => documents.push(Document { id, source: text.source, tokens: tokens.into() }),
                },
            }
        }
        let (policy, sizes) = (self.reference.policy, self.config.sizes());
        let tokens: Vec<_> = documents.iter().map(|document| Arc::clone(&document.tokens)).collect();
        let class = self.reference.model.class.as_ref();
        let scores = classify_documents(
            &mut self.reference.scorer,
            &tokens,
            (policy, class),
            sizes.tokens_max,
            self.reference.ladder,
        )?;
        for (document, scores) in documents.iter().zip(&scores) {
            if self.document(document, scores)? == Reader::Gone {
                return Ok(Reader::Gone);
            }
        }
        Ok(Reader::Listens)
    }

    /// Counts and prints what the model says of a document; where that would be no record, it is a bad document.
    fn document(&mut self, document: &Document, scores: &DocumentScores) -> anyhow::Result<Reader> {
        let class = self.reference.model.class.clone();
        let probabilities = class.as_ref().map(|_| scores.probabilities());
        let checked = match &probabilities {
            Some(values) => TokenAttribute::new(String::new(), 0, values, LossFormat::F32).map(drop),
            None => check(scores, self.reference.policy.predicts_first(&document.tokens)),
        };
        if let Err(error) = checked {
            self.bad(&format!("{}: {error}", document.id));
            return Ok(Reader::Listens);
        }
        let predicted = scores.predicted().count() as u64;
        let sum: f64 = match &probabilities {
            Some(values) => values.iter().copied().map(f64::from).sum(),
            None => scores.predicted().map(f64::from).sum(),
        };
        self.totals.documents += 1;
        self.totals.tokens += document.tokens.len() as u64;
        self.totals.predicted += predicted;
        self.totals.sum += sum;
        if self.asked.summary {
            return Ok(Reader::Listens);
        }
        let names = self.tokenizer.names(&document.tokens);
        let mean = sum / predicted as f64;
        let mut line = match (class, probabilities) {
            (Some(class), Some(values)) => json!({
                "id": document.id,
                "tokens": *document.tokens,
                "pieces": names,
                "class": class.name,
                "attribute": values,
                "mean_attribute": mean,
            }),
            _ => document_line(document, &names, scores, mean),
        };
        if let (Some(source), Some(fields)) = (&document.source, line.as_object_mut()) {
            fields.insert("source".to_owned(), json!(source));
        }
        if let Some(fields) = line.as_object_mut() {
            fields.extend(self.provenance());
        }
        print_line(&line.to_string())
    }
}

impl Scoring<'_> {
    /// Whose losses they are, for those who compare them: what a record of the scored topic says of them.
    fn provenance(&self) -> serde_json::Map<String, Value> {
        let ContextPolicy { window, stride, bos } = self.reference.policy;
        let (bos, bos_token) = match bos {
            Bos::None => ("none", None),
            Bos::Document(token) => ("document", Some(token)),
            Bos::Window(token) => ("window", Some(token)),
        };
        let identity = &self.reference.model.identity;
        [
            ("tokenizer", json!(identity.tokenizer.to_string())),
            ("reference_model", json!(identity.fingerprint.to_string())),
            ("context", json!({ "window": window, "stride": stride, "bos": bos, "bos_token": bos_token })),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}

/// Refuses what `serve` would dead-letter: losses and entropies that are not finite, or below zero.
fn check(scores: &DocumentScores, is_first_predicted: bool) -> Result<(), RecordError> {
    for values in [&scores.losses, &scores.entropies] {
        Losses::scored(values, LossFormat::F32, is_first_predicted)?;
    }
    Ok(())
}

/// NaN, which stands for "no prediction", is null in JSON.
fn document_line(document: &Document, names: &[String], scores: &DocumentScores, mean: f64) -> Value {
    let mut line = json!({
        "id": document.id,
        "tokens": *document.tokens,
        "pieces": names,
        "losses": scores.losses,
        "mean_loss": mean,
    });
    if let (false, Some(fields)) = (scores.entropies.is_empty(), line.as_object_mut()) {
        fields.insert("entropies".to_owned(), json!(scores.entropies));
    }
    line
}
