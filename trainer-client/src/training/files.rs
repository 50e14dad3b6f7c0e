//! Documents out of local files, for runs without Kafka: JSON Lines, compressed or not, a lane a file.
//!
//! A line is what `sluiced model score` prints: tokens with the losses of a reference model, and whose they are. Where no losses
//! are wanted, tokens or a text will do. Each line becomes the record that Kafka would have carried, and goes through the same
//! checks.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use serde::Deserialize;
use sluice_feed::document::Document;
use sluice_feed::snapshot::Snapshot;
use sluice_feed::stream::{
    Contexts, Decoder, DocumentStream, Next, Origin, Position, Provenance, StreamError, TopicKind,
};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Losses, Precision, ScoredDocument, TokenIds, TokenizedDocument,
};
use sluice_text::{Bounds, FileLines, TOKENS_MAX, TextTokenizer, json};

/// Documents out of files, each several times over.
pub struct FileStream {
    lanes: Vec<Lane>,
    epochs: u64,
    reader: LineReader,
    provenance: Provenance,
    stop: Arc<AtomicBool>,
}

/// A file, and how far it has been read.
struct Lane {
    path: PathBuf,
    /// Open within a pass.
    lines: Option<FileLines>,
    position: Position,
}

/// What makes documents of lines.
struct LineReader {
    kind: TopicKind,
    decoder: Decoder,
    tokenizer: Arc<TextTokenizer>,
    /// What stands around a text.
    bounds: Bounds,
}

/// A line of a file.
#[derive(Deserialize)]
struct Line {
    id: Option<serde_json::Value>,
    #[serde(default)]
    source: Option<String>,
    text: Option<String>,
    tokens: Option<Vec<u32>>,
    /// Null where a token has no prediction.
    losses: Option<Vec<Option<f32>>>,
    entropies: Option<Vec<Option<f32>>>,
    tokenizer: Option<Fingerprint>,
    reference_model: Option<Fingerprint>,
    context: Option<LineContext>,
}

/// How the reference model saw a line's document.
#[derive(Deserialize)]
struct LineContext {
    window: u32,
    stride: u32,
    bos: LineBos,
    bos_token: Option<u32>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LineBos {
    None,
    Document,
    Window,
}

impl LineContext {
    fn policy(&self) -> Result<ContextPolicy> {
        let token = || self.bos_token.context("its context has a BOS and no bos_token");
        let bos = match self.bos {
            LineBos::None => Bos::None,
            LineBos::Document => Bos::Document(token()?),
            LineBos::Window => Bos::Window(token()?),
        };
        Ok(ContextPolicy { window: self.window, stride: self.stride, bos })
    }
}

impl LineReader {
    fn read(&self, line: &[u8], path: &str, number: u64) -> Result<(Document, Option<Fingerprint>)> {
        let line: Line = json::from_slice(line).context("not a document")?;
        let payload = self.payload(line, path, number)?;
        let origin = || Origin { topic: path.to_owned(), partition: 0, offset: number as i64 };
        Ok(self.decoder.decode(payload, origin)?)
    }

    /// The record that Kafka would have carried.
    fn payload(&self, line: Line, path: &str, number: u64) -> Result<Bytes> {
        let own = self.decoder.tokenizer();
        let tokens = match (line.tokens, &line.text) {
            (Some(tokens), _) => {
                let tokenizer = line.tokenizer.unwrap_or(own);
                ensure!(
                    tokenizer == own,
                    "its tokens are those of another tokenizer ({}); give that one",
                    tokenizer.short()
                );
                tokens
            }
            (None, Some(text)) if self.kind == TopicKind::Documents => {
                let tokens =
                    self.tokenizer.encode(text, TOKENS_MAX).context("its text cannot be tokenized")?;
                self.bounds.around(tokens)
            }
            _ => bail!("it has no tokens: `sluiced model score` prints such lines"),
        };
        let id = match line.id {
            Some(serde_json::Value::String(id)) if !id.is_empty() => id,
            Some(serde_json::Value::Number(number)) => number.to_string(),
            _ => format!("{path}:{number}"),
        };
        let document = TokenizedDocument {
            id,
            tokens: TokenIds::new(&tokens),
            tokenizer: own,
            source: line.source.unwrap_or_default(),
            attributes: [].into(),
        };
        if self.kind == TopicKind::Documents {
            return Ok(document.encode());
        }
        let missing = |what| format!("it has no {what}: `sluiced model score` prints it");
        let packed = |values: Vec<Option<f32>>| {
            let values: Vec<f32> = values.into_iter().map(|value| value.unwrap_or(f32::NAN)).collect();
            ensure!(values.len() == tokens.len(), "{} values for {} tokens", values.len(), tokens.len());
            Ok(Losses::new(&values, LossFormat::F32)?)
        };
        // Whose tokens they are is known of scored ones alone.
        line.tokenizer.with_context(|| missing("tokenizer"))?;
        let scored = ScoredDocument {
            reference_losses: packed(line.losses.with_context(|| missing("losses"))?)?,
            reference_entropies: line.entropies.map(packed).transpose()?,
            reference_model: line.reference_model.with_context(|| missing("reference_model"))?,
            context: line.context.with_context(|| missing("context"))?.policy()?,
            precision: Precision::F32,
            document,
        };
        Ok(scored.encode())
    }
}

impl FileStream {
    /// `epochs` passes over each file, from the first line on, or from where a snapshot stands. Ends early once `stop` is
    /// set. `kind` says whether lines need losses; texts are tokenized where they do not, and stand between `bounds`.
    pub fn open(
        files: &[PathBuf],
        epochs: u64,
        (kind, decoder): (TopicKind, Decoder),
        (tokenizer, bounds): (Arc<TextTokenizer>, Bounds),
        snapshot: Option<&Snapshot>,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, StreamError> {
        let several = decoder.allowed().len() > 1;
        let provenance = match snapshot {
            None => Provenance::new(several, None, Contexts::new()),
            Some(snapshot) => {
                // Where several were allowed, the identity names none; of one that was seen it is known all the same.
                let only = snapshot.contexts.keys().next().filter(|_| snapshot.contexts.len() == 1).copied();
                Provenance::new(
                    several,
                    snapshot.identity.reference_model.or(only),
                    snapshot.contexts.clone(),
                )
            }
        };
        let places = snapshot.map(Snapshot::positions).unwrap_or_default();
        let lane = |(lane, path): (usize, &PathBuf)| {
            let position = places.get(&lane).copied().unwrap_or_default();
            let mut opened = Lane { path: path.clone(), lines: None, position };
            opened.go_on()?;
            Ok(opened)
        };
        let lanes = files.iter().enumerate().map(lane).collect::<Result<_, StreamError>>()?;
        Ok(Self { lanes, epochs, reader: LineReader { kind, decoder, tokenizer, bounds }, provenance, stop })
    }

    /// How the reference saw the first document of the first file that holds one.
    pub fn first_context(mut self) -> Result<Option<ContextPolicy>, StreamError> {
        for lane in 0..self.lanes.len() {
            if let Next::Document(document) = self.next_document(lane)? {
                return Ok(document.context());
            }
        }
        Ok(None)
    }
}

/// What names these files in a run's record and checkpoints: they are not to be others when it goes on.
pub fn name_of(files: &[PathBuf]) -> Result<String> {
    let named = files.iter().map(|file| {
        let size = std::fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?.len();
        Ok(format!("{} ({size} bytes)", file.display()))
    });
    Ok(format!("files {}", named.collect::<Result<Vec<_>>>()?.join(", ")))
}

impl Lane {
    fn error(&self, line: u64, why: &anyhow::Error) -> StreamError {
        StreamError::File { path: self.path.display().to_string(), line, why: format!("{why:#}") }
    }

    fn open(&self) -> Result<FileLines, StreamError> {
        FileLines::open(&self.path).map_err(|error| self.error(0, &error))
    }

    /// Opens a file within whose pass the position stands, and passes over what was read.
    fn go_on(&mut self) -> Result<(), StreamError> {
        if self.position.epoch == 0 {
            // Nothing was read of it; whether it can be is said at once.
            return self.open().map(drop);
        }
        let mut lines = self.open()?;
        while (lines.line() as i64) < self.position.next_offset {
            match lines.next_line() {
                Ok(Some(_)) => {}
                Ok(None) => {
                    let error = anyhow::anyhow!("it has fewer lines than the run has read of it");
                    return Err(self.error(lines.line(), &error));
                }
                Err(error) => return Err(self.error(lines.line(), &error)),
            }
        }
        self.lines = Some(lines);
        Ok(())
    }

    /// The next line's document, through all passes.
    fn next(
        &mut self,
        epochs: u64,
        reader: &LineReader,
    ) -> Result<Option<(Document, Option<Fingerprint>)>, StreamError> {
        loop {
            let Some(lines) = &mut self.lines else {
                if self.position.epoch == epochs {
                    return Ok(None);
                }
                self.lines = Some(self.open()?);
                self.position.epoch += 1;
                self.position.next_offset = 0;
                continue;
            };
            let path = self.path.display().to_string();
            let read = match lines.next_line() {
                Ok(None) => {
                    self.lines = None;
                    continue;
                }
                Ok(Some(line)) => {
                    let line = line.to_vec();
                    let number = lines.line();
                    reader.read(&line, &path, number).map(|document| (number, document))
                }
                Err(error) => Err(error),
            };
            let at = lines.line();
            let (number, document) = read.map_err(|error| match error.downcast::<StreamError>() {
                Ok(error) => error,
                Err(error) => self.error(at, &error),
            })?;
            self.position.next_offset = number as i64;
            self.position.documents += 1;
            return Ok(Some(document));
        }
    }
}

impl DocumentStream for FileStream {
    fn lanes(&self) -> usize {
        self.lanes.len()
    }

    fn next_document(&mut self, lane: usize) -> Result<Next, StreamError> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(Next::Stopped);
        }
        let lane = &mut self.lanes[lane];
        let Some((document, model)) = lane.next(self.epochs, &self.reader)? else { return Ok(Next::Ended) };
        if let (Some(model), Some(context)) = (model, document.context()) {
            let (topic, offset) = (lane.path.display().to_string(), lane.position.next_offset);
            self.provenance.admit(model, context, || Origin {
                topic: topic.clone(),
                partition: 0,
                offset,
            })?;
        }
        Ok(Next::Document(document))
    }

    fn position(&self, lane: usize) -> Position {
        self.lanes[lane].position
    }

    fn contexts(&self) -> Contexts {
        self.provenance.contexts().clone()
    }

    fn reference_model(&self) -> Option<Fingerprint> {
        self.provenance.reference_model()
    }

    fn takes_several_models(&self) -> bool {
        self.reader.decoder.allowed().len() > 1
    }
}

/// Whether all of these can be read; the error names the first that cannot.
pub fn check(files: &[PathBuf]) -> Result<()> {
    files.iter().try_for_each(|file: &PathBuf| {
        let opened = std::fs::File::open(file).and_then(|file| file.metadata());
        let shown = Path::display(file);
        let is_file = opened.with_context(|| format!("cannot read {shown}"))?.is_file();
        ensure!(is_file, "{shown} is no file: name the files in it");
        Ok(())
    })
}
