//! The data side of a checkpoint: where every lane stands, and which documents have been read from it but not yet
//! given out. A rank's part of it is bytes; the parts of all ranks make the whole, whatever their number.

use std::collections::{BTreeMap, HashMap};

use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use sluice_schemas::record::ContextPolicy;

use crate::cut::Piece;
use crate::document::Document;
use crate::plan::Identity;
use crate::stream::{Contexts, Position, Shard};

/// Version of the bytes. Version 1 was kept by rank, in files of another layout.
const FORMAT: u32 = 2;

const OUTLINE: &str = "outline";
const TOKENS: &str = "tokens";
const REFERENCE_LOSS: &str = "reference_loss";
const REFERENCE_ENTROPY: &str = "reference_entropy";

/// Where one lane stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LaneSnapshot {
    /// How far it has been read.
    pub position: Position,
    /// Documents drawn from its shuffle buffer so far.
    pub draws: u64,
    /// Documents in its shuffle buffer, in order.
    pub shuffled: Vec<Document>,
    /// Packed rows that wait for enough of them to make a step.
    pub finished: Vec<Vec<Piece>>,
    /// Pieces that are in no row yet, in the order of their arrival.
    pub waiting: Vec<Piece>,
}

/// Where the data of a run stands, or of a rank's part of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// What the data must be gone on with under.
    pub identity: Identity,
    /// Lanes of the whole stream.
    pub lanes: usize,
    /// The lane whose turn is next.
    pub turn: usize,
    /// How each reference model saw the documents read so far.
    pub contexts: Contexts,
    /// The lanes that it is of, by number.
    pub held: BTreeMap<usize, LaneSnapshot>,
}

/// Why bytes are no snapshot, or snapshots no whole.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The bytes are of no safetensors file.
    #[error("it is not a whole file of a feed's state")]
    File(#[from] SafeTensorError),
    /// A part of the file is missing or of the wrong kind.
    #[error("its {0} is missing or of another type")]
    Part(&'static str),
    /// The outline is none.
    #[error("its outline cannot be read")]
    Outline(#[from] serde_json::Error),
    /// Another version of the format.
    #[error(
        "it is of format {0}, and this program reads format {FORMAT}: begin a new run from the checkpoint's weights"
    )]
    Format(u32),
    /// Lists that do not fit one another.
    #[error("it holds {0} documents than its outline names")]
    Documents(&'static str),
    /// A document, row or place that no run can have left.
    #[error("lane {lane}, document {document:?}: {what}")]
    Impossible {
        /// The lane.
        lane: usize,
        /// The document's id.
        document: String,
        /// What is wrong.
        what: String,
    },
    /// Parts of several runs, or of several steps.
    #[error("the parts of the ranks do not belong together: {0} differs")]
    Parts(&'static str),
    /// A lane that no part, or more than one, holds.
    #[error("lane {0} is held by {1} parts, not by one: give the parts of all ranks, each once")]
    Lane(usize, usize),
}

/// A snapshot without its documents' numbers, which follow one another in the order of the entries here: lane by lane the
/// shuffled, the finished and the waiting ones.
#[derive(Serialize, Deserialize)]
struct Outline {
    format: u32,
    identity: Identity,
    lanes: usize,
    turn: usize,
    contexts: Contexts,
    /// Contexts that documents name by their index here.
    policies: Vec<ContextPolicy>,
    held: BTreeMap<usize, LaneOutline>,
}

#[derive(Serialize, Deserialize)]
struct LaneOutline {
    position: Position,
    draws: u64,
    shuffled: Vec<Entry>,
    finished: Vec<Vec<Entry>>,
    waiting: Vec<Entry>,
}

/// A document, or a piece of one.
#[derive(Serialize, Deserialize)]
struct Entry {
    document: String,
    source: String,
    tokens: usize,
    #[serde(default, skip_serializing_if = "is_zero")]
    start: usize,
    #[serde(default, skip_serializing_if = "is_zero")]
    first_predicted: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bos: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    policy: Option<usize>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl Snapshot {
    /// The part of a rank: its lanes alone.
    #[must_use]
    pub fn part(&self, shard: Shard) -> Self {
        let held = self.held.iter().filter(|(lane, _)| shard.owns(**lane));
        Self { held: held.map(|(&lane, held)| (lane, held.clone())).collect(), ..self.clone() }
    }

    /// The whole of the parts of all ranks, however many there were. Parts of different runs or steps are refused, and so
    /// are too few and too many.
    pub fn merged(parts: Vec<Self>) -> Result<Self, SnapshotError> {
        let mut parts = parts.into_iter();
        let Some(mut whole) = parts.next() else { return Err(SnapshotError::Lane(0, 0)) };
        let mut held_by: BTreeMap<usize, usize> = whole.held.keys().map(|&lane| (lane, 1)).collect();
        for part in parts {
            if let Some(difference) = whole.identity.difference(&part.identity) {
                return Err(SnapshotError::Parts(difference));
            }
            if whole.lanes != part.lanes {
                return Err(SnapshotError::Parts("the number of lanes"));
            }
            if whole.turn != part.turn {
                return Err(SnapshotError::Parts("the step"));
            }
            whole.identity.reference_model = whole.identity.reference_model.or(part.identity.reference_model);
            for (model, context) in part.contexts {
                if whole.contexts.insert(model, context).is_some_and(|earlier| earlier != context) {
                    return Err(SnapshotError::Parts("how the reference model saw its documents"));
                }
            }
            for (lane, held) in part.held {
                *held_by.entry(lane).or_default() += 1;
                whole.held.insert(lane, held);
            }
        }
        let count = |lane| held_by.get(&lane).copied().unwrap_or(0);
        match (0..whole.lanes).find(|&lane| count(lane) != 1) {
            Some(lane) => Err(SnapshotError::Lane(lane, count(lane))),
            None => Ok(whole),
        }
    }

    /// Places of the lanes.
    pub fn positions(&self) -> BTreeMap<usize, Position> {
        self.held.iter().map(|(&lane, held)| (lane, held.position)).collect()
    }

    /// Fails where it holds what no run can have left, which a damaged file may: a token id of `vocabulary` or beyond, a
    /// piece without a prediction, a row that is longer than a sequence.
    pub fn check(&self, vocabulary: u32) -> Result<(), SnapshotError> {
        for (&lane, held) in &self.held {
            let row_max = self.identity.plan.shape.len;
            let impossible = |document: &Document, what: String| {
                Err(SnapshotError::Impossible { lane, document: document.id().to_owned(), what })
            };
            for row in &held.finished {
                let tokens: usize = row.iter().map(Piece::len).sum();
                match row.first() {
                    None => {
                        return impossible(
                            &Document::plain(String::new(), String::new(), vec![]),
                            "a row is empty".to_owned(),
                        );
                    }
                    Some(piece) if tokens > row_max => {
                        let what = format!("its row holds {tokens} tokens, and a sequence {row_max}");
                        return impossible(&piece.document, what);
                    }
                    Some(_) => {}
                }
            }
            for piece in held.finished.iter().flatten().chain(&held.waiting) {
                let tokens = piece.document.tokens().len();
                let first = piece.first_predicted;
                // A token is predicted from one before it.
                let has_prediction = first < tokens && (first > 0 || piece.bos.is_some());
                if !has_prediction || piece.len() > row_max {
                    let what = format!("a piece of {tokens} tokens that predicts from the {first}th on");
                    return impossible(&piece.document, what);
                }
                if let Some(bos) = piece.bos.filter(|&bos| bos >= vocabulary) {
                    return impossible(
                        &piece.document,
                        format!("BOS {bos} is beyond the vocabulary of {vocabulary}"),
                    );
                }
            }
            let pieces = held.finished.iter().flatten().chain(&held.waiting).map(|piece| &piece.document);
            for document in held.shuffled.iter().chain(pieces) {
                if let Some(id) = document.tokens().iter().find(|&&id| id >= vocabulary) {
                    return impossible(
                        document,
                        format!("token id {id} is beyond the vocabulary of {vocabulary}"),
                    );
                }
            }
        }
        Ok(())
    }

    /// The bytes of a safetensors file with all of it.
    pub fn to_bytes(&self) -> Result<Vec<u8>, SnapshotError> {
        let mut columns = Columns::default();
        let mut held = BTreeMap::new();
        for (&lane, snapshot) in &self.held {
            let outline = LaneOutline {
                position: snapshot.position,
                draws: snapshot.draws,
                shuffled: snapshot.shuffled.iter().map(|document| columns.put(document)).collect(),
                finished: snapshot.finished.iter().map(|row| columns.put_pieces(row)).collect(),
                waiting: columns.put_pieces(&snapshot.waiting),
            };
            held.insert(lane, outline);
        }
        let outline = Outline {
            format: FORMAT,
            identity: self.identity.clone(),
            lanes: self.lanes,
            turn: self.turn,
            contexts: self.contexts.clone(),
            policies: columns.policies.clone(),
            held,
        };
        columns.to_bytes(&serde_json::to_vec(&outline)?)
    }

    /// Reads back what [`Snapshot::to_bytes`] made.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let file = SafeTensors::deserialize(bytes)?;
        let outline = file.tensor(OUTLINE).map_err(|_| SnapshotError::Part(OUTLINE))?;
        let Format { format } = serde_json::from_slice(outline.data())?;
        if format != FORMAT {
            return Err(SnapshotError::Format(format));
        }
        let outline: Outline = serde_json::from_slice(outline.data())?;
        let mut columns = Columns::of(&file, outline.policies)?;
        let mut held = BTreeMap::new();
        for (lane, outline) in outline.held {
            let LaneOutline { position, draws, shuffled, finished, waiting } = outline;
            let snapshot = LaneSnapshot {
                position,
                draws,
                shuffled: shuffled.into_iter().map(|entry| columns.take(entry)).collect::<Result<_, _>>()?,
                finished: finished
                    .into_iter()
                    .map(|row| columns.take_pieces(row))
                    .collect::<Result<_, _>>()?,
                waiting: columns.take_pieces(waiting)?,
            };
            held.insert(lane, snapshot);
        }
        if columns.taken < columns.tokens.len() {
            return Err(SnapshotError::Documents("more"));
        }
        let Outline { identity, lanes, turn, contexts, .. } =
            Outline { held: BTreeMap::new(), policies: vec![], ..outline };
        Ok(Self { identity, lanes, turn, contexts, held })
    }
}

/// What is read of an outline first.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// The numbers of many documents, one after the other.
#[derive(Default)]
struct Columns {
    tokens: Vec<u32>,
    reference_loss: Vec<f32>,
    reference_entropy: Vec<f32>,
    policies: Vec<ContextPolicy>,
    /// Tokens taken so far.
    taken: usize,
}

impl Columns {
    fn put(&mut self, document: &Document) -> Entry {
        self.tokens.extend_from_slice(document.tokens());
        self.reference_loss.extend_from_slice(document.reference());
        self.reference_entropy.extend_from_slice(document.reference_entropy());
        let policy = document.context().map(|context| {
            let known = self.policies.iter().position(|policy| *policy == context);
            known.unwrap_or_else(|| {
                self.policies.push(context);
                self.policies.len() - 1
            })
        });
        Entry {
            document: document.id().to_owned(),
            source: document.source().to_owned(),
            tokens: document.tokens().len(),
            start: 0,
            first_predicted: 0,
            bos: None,
            policy,
        }
    }

    fn put_pieces(&mut self, pieces: &[Piece]) -> Vec<Entry> {
        let put = |piece: &Piece| Entry {
            start: piece.start,
            first_predicted: piece.first_predicted,
            bos: piece.bos,
            ..self.put(&piece.document)
        };
        pieces.iter().map(put).collect()
    }

    fn take(&mut self, entry: Entry) -> Result<Document, SnapshotError> {
        let span = self.taken..self.taken.saturating_add(entry.tokens);
        if span.end > self.tokens.len() {
            return Err(SnapshotError::Documents("fewer"));
        }
        self.taken = span.end;
        let policy = match entry.policy {
            Some(index) => Some(*self.policies.get(index).ok_or(SnapshotError::Part("context policies"))?),
            None => None,
        };
        let (losses, entropies) = (&self.reference_loss[span.clone()], &self.reference_entropy[span.clone()]);
        let tokens = self.tokens[span].to_vec();
        let document = Document::scored(entry.document, entry.source, tokens, losses.to_vec())
            .and_then(|document| document.with_entropies(entropies.to_vec()))
            .map_err(|_| SnapshotError::Part(REFERENCE_LOSS))?;
        Ok(match policy {
            Some(policy) => document.with_context(policy),
            None => document,
        })
    }

    fn take_pieces(&mut self, entries: Vec<Entry>) -> Result<Vec<Piece>, SnapshotError> {
        let take = |entry: Entry| {
            let Entry { start, first_predicted, bos, .. } = entry;
            Ok(Piece { document: self.take(entry)?, start, first_predicted, bos })
        };
        entries.into_iter().map(take).collect()
    }

    fn to_bytes(&self, outline: &[u8]) -> Result<Vec<u8>, SnapshotError> {
        let tokens: Vec<u8> = self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let floats =
            |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|value| value.to_le_bytes()).collect() };
        let (losses, entropies) = (floats(&self.reference_loss), floats(&self.reference_entropy));
        let view = |dtype, len: usize, bytes| TensorView::new(dtype, vec![len], bytes);
        let count = self.tokens.len();
        let views = [
            (OUTLINE, view(Dtype::U8, outline.len(), outline)?),
            (TOKENS, view(Dtype::U32, count, &tokens)?),
            (REFERENCE_LOSS, view(Dtype::F32, count, &losses)?),
            (REFERENCE_ENTROPY, view(Dtype::F32, count, &entropies)?),
        ];
        Ok(safetensors::serialize(views, None::<HashMap<String, String>>)?)
    }

    fn of(file: &SafeTensors<'_>, policies: Vec<ContextPolicy>) -> Result<Self, SnapshotError> {
        let words = |name: &'static str, dtype: Dtype| -> Result<Vec<[u8; 4]>, SnapshotError> {
            let view = file.tensor(name).map_err(|_| SnapshotError::Part(name))?;
            if view.dtype() != dtype {
                return Err(SnapshotError::Part(name));
            }
            Ok(view.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect())
        };
        let floats = |name| -> Result<Vec<f32>, SnapshotError> {
            Ok(words(name, Dtype::F32)?.into_iter().map(f32::from_le_bytes).collect())
        };
        let columns = Self {
            tokens: words(TOKENS, Dtype::U32)?.into_iter().map(u32::from_le_bytes).collect(),
            reference_loss: floats(REFERENCE_LOSS)?,
            reference_entropy: floats(REFERENCE_ENTROPY)?,
            policies,
            taken: 0,
        };
        for (name, values) in
            [(REFERENCE_LOSS, &columns.reference_loss), (REFERENCE_ENTROPY, &columns.reference_entropy)]
        {
            if values.len() != columns.tokens.len() {
                return Err(SnapshotError::Part(name));
            }
        }
        Ok(columns)
    }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
