//! The data side of a checkpoint: where every stream stands, and which documents have been read from it but not yet
//! learnt from. What people may want to read is JSON; the documents' numbers are one safetensors file beside it.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::document::Document;
use crate::pack::Piece;
use crate::picture::PictureDocuments;
use crate::stream::{Contexts, Position};

/// File name of the documents' numbers.
pub const DOCUMENTS_FILE: &str = "documents.safetensors";

const TOKENS: &str = "tokens";
const REFERENCE_LOSS: &str = "reference_loss";
const REFERENCE_ENTROPY: &str = "reference_entropy";

/// Where one rank's data stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankSnapshot {
    /// How far its stream has been read.
    pub position: Position,
    /// Documents drawn from its shuffle buffer so far.
    pub draws: u64,
    /// Documents in its shuffle buffer, in order.
    pub shuffled: Vec<Document>,
    /// Packed rows that wait for enough of them to make a step.
    pub finished: Vec<Vec<Piece>>,
    /// The row that the next document goes into.
    pub open: Vec<Piece>,
}

/// Where the data of all ranks stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// By rank.
    pub ranks: Vec<RankSnapshot>,
    /// Names of sources, in order of appearance.
    pub sources: Vec<String>,
    /// Documents of the token picture.
    pub picture: PictureDocuments,
    /// How each reference model saw the documents read so far.
    pub contexts: Contexts,
}

/// A snapshot without its documents' numbers, which follow one another in [`DOCUMENTS_FILE`] in the order of the
/// entries here: rank by rank the shuffled, the finished and the open ones, and those of the picture last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outline {
    ranks: Vec<RankOutline>,
    sources: Vec<String>,
    picture_seen: usize,
    picture: Vec<Entry>,
    /// Empty in a checkpoint of before there was such a field.
    #[serde(default)]
    contexts: Contexts,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct RankOutline {
    position: Position,
    draws: u64,
    shuffled: Vec<Entry>,
    finished: Vec<Vec<Entry>>,
    open: Vec<Entry>,
}

/// A document, or a piece of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    document: String,
    source: String,
    start: usize,
    tokens: usize,
}

impl Snapshot {
    /// The same data for another number of ranks: what was read by rank `r` goes to rank `r % world_size`, rows that had
    /// room are closed, and every rank learns how far all partitions have been read, from which it takes its own.
    #[must_use]
    pub fn for_world_size(self, world_size: usize) -> Self {
        if self.ranks.len() == world_size {
            return self;
        }
        let positions: Vec<Position> = self.ranks.iter().map(|rank| rank.position.clone()).collect();
        let position = Position { next_partition: None, ..Position::merged(&positions) };
        let empty = RankSnapshot { position, ..RankSnapshot::default() };
        let mut ranks = vec![empty; world_size];
        // What all ranks had handed out is counted once, by the first.
        ranks.iter_mut().skip(1).for_each(|rank| rank.position.documents = 0);
        for (old, rank) in self.ranks.into_iter().enumerate() {
            let new = &mut ranks[old % world_size];
            // Draws are named by their number, so none is made twice if the numbers only grow.
            new.draws += rank.draws;
            new.shuffled.extend(rank.shuffled);
            new.finished.extend(rank.finished);
            new.finished.extend(Some(rank.open).filter(|open| !open.is_empty()));
        }
        Self { ranks, ..self }
    }

    /// Fails where a document holds a token id that the tokenizer does not have, which a damaged file may.
    pub fn check_ids(&self, vocabulary: u32) -> Result<()> {
        let pieces = |rank: &RankSnapshot| {
            let rows = rank.finished.iter().flatten().chain(&rank.open);
            rows.map(|piece| piece.document.clone()).chain(rank.shuffled.iter().cloned()).collect::<Vec<_>>()
        };
        let held = self.ranks.iter().flat_map(pieces).chain(self.picture.chosen().iter().cloned());
        for document in held {
            if let Some(id) = document.tokens().iter().find(|&&id| id >= vocabulary) {
                bail!("document {:?} holds token id {id}, and the tokenizer has {vocabulary}", document.id());
            }
        }
        Ok(())
    }

    /// Splits into the outline and the bytes of [`DOCUMENTS_FILE`].
    pub fn to_files(&self) -> Result<(Outline, Vec<u8>)> {
        let mut columns = Columns::default();
        let mut ranks = Vec::with_capacity(self.ranks.len());
        for rank in &self.ranks {
            ranks.push(RankOutline {
                position: rank.position.clone(),
                draws: rank.draws,
                shuffled: rank.shuffled.iter().map(|document| columns.put(document, 0)).collect(),
                finished: rank.finished.iter().map(|row| columns.put_row(row)).collect(),
                open: columns.put_row(&rank.open),
            });
        }
        let outline = Outline {
            ranks,
            sources: self.sources.clone(),
            picture_seen: self.picture.seen(),
            picture: self.picture.chosen().iter().map(|document| columns.put(document, 0)).collect(),
            contexts: self.contexts.clone(),
        };
        Ok((outline, columns.to_bytes()?))
    }

    /// Puts together what [`Snapshot::to_files`] split; `path` is that of the documents.
    pub fn from_files(outline: &Outline, path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::from_bytes(outline, &bytes)
            .with_context(|| format!("cannot use {}: it may be damaged", path.display()))
    }

    fn from_bytes(outline: &Outline, bytes: &[u8]) -> Result<Self> {
        let mut columns = Columns::from_bytes(bytes)?;
        let mut ranks = Vec::with_capacity(outline.ranks.len());
        for rank in &outline.ranks {
            let RankOutline { position, draws, shuffled, finished, open } = rank;
            ranks.push(RankSnapshot {
                position: position.clone(),
                draws: *draws,
                shuffled: shuffled.iter().map(|entry| columns.take(entry)).collect::<Result<_>>()?,
                finished: finished.iter().map(|row| columns.take_row(row)).collect::<Result<_>>()?,
                open: columns.take_row(open)?,
            });
        }
        let picture = outline.picture.iter().map(|entry| columns.take(entry)).collect::<Result<_>>()?;
        ensure!(columns.taken == columns.tokens.len(), "it holds more documents than state.json names");
        let picture = PictureDocuments::resumed(picture, outline.picture_seen);
        Ok(Self { ranks, sources: outline.sources.clone(), picture, contexts: outline.contexts.clone() })
    }
}

impl Outline {
    /// Number of ranks that the data was read by.
    pub fn world_size(&self) -> usize {
        self.ranks.len()
    }

    /// How far the ranks have read.
    pub fn positions(&self) -> impl Iterator<Item = &Position> {
        self.ranks.iter().map(|rank| &rank.position)
    }
}

/// The numbers of many documents, one after the other.
#[derive(Default)]
struct Columns {
    tokens: Vec<u32>,
    reference_loss: Vec<f32>,
    reference_entropy: Vec<f32>,
    /// Tokens taken so far.
    taken: usize,
}

impl Columns {
    fn put(&mut self, document: &Document, start: usize) -> Entry {
        self.tokens.extend_from_slice(document.tokens());
        self.reference_loss.extend_from_slice(document.reference());
        self.reference_entropy.extend_from_slice(document.reference_entropy());
        Entry {
            document: document.id().to_owned(),
            source: document.source().to_owned(),
            start,
            tokens: document.tokens().len(),
        }
    }

    fn put_row(&mut self, row: &[Piece]) -> Vec<Entry> {
        row.iter().map(|piece| self.put(&piece.document, piece.start)).collect()
    }

    fn take(&mut self, entry: &Entry) -> Result<Document> {
        let span = self.taken..self.taken.saturating_add(entry.tokens);
        ensure!(span.end <= self.tokens.len(), "it holds fewer documents than state.json names");
        self.taken = span.end;
        let document = Document::scored(
            entry.document.clone(),
            entry.source.clone(),
            self.tokens[span.clone()].to_vec(),
            self.reference_loss[span.clone()].to_vec(),
        )?;
        Ok(document.with_entropies(self.reference_entropy[span].to_vec())?)
    }

    fn take_row(&mut self, row: &[Entry]) -> Result<Vec<Piece>> {
        row.iter().map(|entry| Ok(Piece { document: self.take(entry)?, start: entry.start })).collect()
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        let tokens: Vec<u8> = self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let floats =
            |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|value| value.to_le_bytes()).collect() };
        let (losses, entropies) = (floats(&self.reference_loss), floats(&self.reference_entropy));
        let shape = vec![self.tokens.len()];
        let view = |dtype, bytes| TensorView::new(dtype, shape.clone(), bytes);
        let views = [
            (TOKENS, view(Dtype::U32, &tokens)?),
            (REFERENCE_LOSS, view(Dtype::F32, &losses)?),
            (REFERENCE_ENTROPY, view(Dtype::F32, &entropies)?),
        ];
        safetensors::serialize(views, None::<HashMap<String, String>>).context("cannot lay out documents")
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).context("not a whole safetensors file")?;
        let words = |name: &str, dtype: Dtype| -> Result<Vec<[u8; 4]>> {
            let view = file.tensor(name).with_context(|| format!("{name} is missing"))?;
            ensure!(view.dtype() == dtype, "{name} is {:?}, not {dtype:?}", view.dtype());
            Ok(view.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect())
        };
        let floats = |name| -> Result<Vec<f32>> {
            Ok(words(name, Dtype::F32)?.into_iter().map(f32::from_le_bytes).collect())
        };
        let columns = Self {
            tokens: words(TOKENS, Dtype::U32)?.into_iter().map(u32::from_le_bytes).collect(),
            reference_loss: floats(REFERENCE_LOSS)?,
            reference_entropy: floats(REFERENCE_ENTROPY)?,
            taken: 0,
        };
        let lengths = [columns.reference_loss.len(), columns.reference_entropy.len()];
        ensure!(lengths == [columns.tokens.len(); 2], "its lists differ in length");
        Ok(columns)
    }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
