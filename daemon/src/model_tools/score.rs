//! `sluiced model score`: the losses of text, without Kafka.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use serde_json::{Value, json};
use sluice_schemas::record::{Bos, ContextPolicy, LossFormat, Losses, RecordError, TokenAttribute};
use sluice_text::output::{Reader, print_line};
use sluice_text::{Fields, Format, TEXT_BYTES_MAX, TOKENS_MAX, Text, TextReader, TextTokenizer};

use crate::config::Config;
use crate::exit::{DATA, ExitCode as _, ExitError, NO_INPUT};
use crate::reference::Reference;
use crate::score::documents::{DocumentScores, classify_documents};

/// Documents that are tokenized and scored together.
const CHUNK_DOCUMENTS: usize = 256;
/// Bytes of text that are tokenized and scored together.
const CHUNK_BYTES: usize = 8 << 20;

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
