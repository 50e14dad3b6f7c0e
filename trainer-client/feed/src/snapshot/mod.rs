//! The data side of a checkpoint: where every lane stands, and which documents have been read from it but not yet
//! given out. A rank's part of it is bytes; the parts of all ranks make the whole, whatever their number.

mod columns;
mod error;

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use sluice_schemas::record::ContextPolicy;

use crate::cut::Piece;
use crate::document::Document;
use crate::plan::Identity;
use crate::stream::{Contexts, Position, Shard};
use columns::{Columns, Entry, OUTLINE};
use error::FORMAT;
pub use error::SnapshotError;

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
    /// The id of the topic, where the broker has told it; a topic that is deleted and made anew has another.
    pub topic_id: Option<String>,
    /// Steps whose micro-batches were given out.
    pub step: u64,
    /// Lanes of the whole stream.
    pub lanes: usize,
    /// The lane whose turn is next.
    pub turn: usize,
    /// How each reference model saw the documents read so far.
    pub contexts: Contexts,
    /// The lanes that it is of, by number.
    pub held: BTreeMap<usize, LaneSnapshot>,
}

/// A snapshot without its documents' numbers, which follow one another in the order of the entries here: lane by lane the
/// shuffled, the finished and the waiting ones.
#[derive(Serialize, Deserialize)]
struct Outline {
    format: u32,
    identity: Identity,
    /// Checkpoints of before it was kept have none.
    #[serde(default)]
    topic_id: Option<String>,
    step: u64,
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
        let whole = Self::joined(parts)?;
        match (0..whole.lanes).find(|lane| !whole.held.contains_key(lane)) {
            Some(lane) => Err(SnapshotError::Lane(lane, 0)),
            None => Ok(whole),
        }
    }

    /// Some parts as one. Parts of different runs or steps are refused, and so is a lane that two of them hold.
    pub fn joined(parts: Vec<Self>) -> Result<Self, SnapshotError> {
        let mut parts = parts.into_iter();
        let Some(mut whole) = parts.next() else { return Err(SnapshotError::Lane(0, 0)) };
        for part in parts {
            if let Some(difference) = whole.identity.difference(&part.identity) {
                return Err(SnapshotError::Parts(difference));
            }
            if whole.lanes != part.lanes {
                return Err(SnapshotError::Parts("the number of lanes"));
            }
            if (whole.step, whole.turn) != (part.step, part.turn) {
                return Err(SnapshotError::Parts("the step"));
            }
            if whole.topic_id.as_ref().zip(part.topic_id.as_ref()).is_some_and(|(one, other)| one != other) {
                return Err(SnapshotError::Parts("the topic's id"));
            }
            whole.topic_id = whole.topic_id.or(part.topic_id);
            whole.identity.reference_model = whole.identity.reference_model.or(part.identity.reference_model);
            for (model, context) in part.contexts {
                if whole.contexts.insert(model, context).is_some_and(|earlier| earlier != context) {
                    return Err(SnapshotError::Parts("how the reference model saw its documents"));
                }
            }
            for (lane, held) in part.held {
                if whole.held.insert(lane, held).is_some() {
                    return Err(SnapshotError::Lane(lane, 2));
                }
            }
        }
        Ok(whole)
    }

    /// Places of the lanes.
    pub fn positions(&self) -> BTreeMap<usize, Position> {
        self.held.iter().map(|(&lane, held)| (lane, held.position)).collect()
    }

    /// Fails where a shard of a stream of `lanes` lanes cannot go on from it as the run that it is of: with another plan,
    /// tokenizer or reference model, without a lane that the shard reads, or where the stream has lost lanes. Lanes that have
    /// come since are read from their first record.
    pub fn check_for(&self, identity: &Identity, shard: Shard, lanes: usize) -> Result<(), SnapshotError> {
        if let Some(difference) = self.identity.difference(identity) {
            return Err(SnapshotError::OtherRun(difference));
        }
        if self.lanes > lanes {
            return Err(SnapshotError::FewerLanes { before: self.lanes, now: lanes });
        }
        let is_missing = |lane: &usize| !self.held.contains_key(lane);
        match shard.own(lanes).take_while(|&lane| lane < self.lanes).find(is_missing) {
            Some(lane) => Err(SnapshotError::Lane(lane, 0)),
            None => Ok(()),
        }
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
            topic_id: self.topic_id.clone(),
            lanes: self.lanes,
            step: self.step,
            turn: self.turn,
            contexts: self.contexts.clone(),
            policies: columns.policies().to_vec(),
            held,
        };
        columns.to_bytes(&serde_json::to_vec(&outline)?)
    }

    /// Reads back what [`Snapshot::to_bytes`] made.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let file = SafeTensors::deserialize(bytes)?;
        // An earlier format has no checksum, and is told by its number.
        let is_whole = columns::check_sum(&file);
        if let Err(SnapshotError::Damaged) = is_whole {
            return Err(SnapshotError::Damaged);
        }
        let outline = file.tensor(OUTLINE).map_err(|_| SnapshotError::Part(OUTLINE))?;
        let Format { format } = serde_json::from_slice(outline.data())?;
        if format != FORMAT {
            return Err(SnapshotError::Format(format));
        }
        is_whole?;
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
        columns.finish()?;
        let Outline { identity, topic_id, step, lanes, turn, contexts, .. } =
            Outline { held: BTreeMap::new(), policies: vec![], ..outline };
        Ok(Self { identity, topic_id, step, lanes, turn, contexts, held })
    }
}

/// What is read of an outline first.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

#[cfg(test)]
mod tests;
