//! The numbers of a snapshot's documents, in columns: one after the other, in the order of their entries in the outline.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::ContextPolicy;

use super::error::SnapshotError;
use crate::cut::Piece;
use crate::document::Document;

/// Name of the outline, which lies beside the columns.
pub(super) const OUTLINE: &str = "outline";

/// SHA-256 of the outline and the columns: a bit that flipped on a disk would be trained on unseen.
const CHECKSUM: &str = "checksum";
const TOKENS: &str = "tokens";
const REFERENCE_LOSS: &str = "reference_loss";
const REFERENCE_ENTROPY: &str = "reference_entropy";
/// Of the documents that a token classifier has scored alone; a file without any has no such column, as before there were any.
const ATTRIBUTE: &str = "attribute";

/// A document, or a piece of one.
#[derive(Serialize, Deserialize)]
pub(super) struct Entry {
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
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    has_attribute: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// The numbers of many documents, one after the other.
#[derive(Default)]
pub(super) struct Columns {
    tokens: Vec<u32>,
    reference_loss: Vec<f32>,
    reference_entropy: Vec<f32>,
    attribute: Vec<f32>,
    policies: Vec<ContextPolicy>,
    /// Tokens taken so far.
    taken: usize,
    /// Attributes taken so far.
    attributes_taken: usize,
}

impl Columns {
    /// Adds a document's numbers.
    pub fn put(&mut self, document: &Document) -> Entry {
        self.tokens.extend_from_slice(document.tokens());
        self.reference_loss.extend_from_slice(document.reference());
        self.reference_entropy.extend_from_slice(document.reference_entropy());
        self.attribute.extend_from_slice(document.attribute().unwrap_or_default());
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
            has_attribute: document.attribute().is_some(),
        }
    }

    /// Contexts that documents name by their index here.
    pub fn policies(&self) -> &[ContextPolicy] {
        &self.policies
    }

    /// Adds the numbers of pieces.
    pub fn put_pieces(&mut self, pieces: &[Piece]) -> Vec<Entry> {
        let put = |piece: &Piece| Entry {
            start: piece.start,
            first_predicted: piece.first_predicted,
            bos: piece.bos,
            ..self.put(&piece.document)
        };
        pieces.iter().map(put).collect()
    }

    /// The next document, whose entry this is.
    pub fn take(&mut self, entry: Entry) -> Result<Document, SnapshotError> {
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
        let document = if entry.has_attribute {
            let span = self.attributes_taken..self.attributes_taken.saturating_add(entry.tokens);
            let values = self.attribute.get(span.clone()).ok_or(SnapshotError::Part(ATTRIBUTE))?;
            self.attributes_taken = span.end;
            document.with_attribute(values.to_vec()).map_err(|_| SnapshotError::Part(ATTRIBUTE))?
        } else {
            document
        };
        Ok(match policy {
            Some(policy) => document.with_context(policy),
            None => document,
        })
    }

    /// The next pieces, whose entries these are.
    pub fn take_pieces(&mut self, entries: Vec<Entry>) -> Result<Vec<Piece>, SnapshotError> {
        let take = |entry: Entry| {
            let Entry { start, first_predicted, bos, .. } = entry;
            Ok(Piece { document: self.take(entry)?, start, first_predicted, bos })
        };
        entries.into_iter().map(take).collect()
    }

    /// Fails where numbers are left that no entry has taken.
    pub fn finish(self) -> Result<(), SnapshotError> {
        let has_more = self.taken < self.tokens.len() || self.attributes_taken < self.attribute.len();
        if has_more { Err(SnapshotError::Documents("more")) } else { Ok(()) }
    }

    /// The bytes of a safetensors file with all of it, and an outline.
    pub fn to_bytes(&self, outline: &[u8]) -> Result<Vec<u8>, SnapshotError> {
        let tokens: Vec<u8> = self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let floats =
            |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|value| value.to_le_bytes()).collect() };
        let (losses, entropies) = (floats(&self.reference_loss), floats(&self.reference_entropy));
        let attributes = (!self.attribute.is_empty()).then(|| floats(&self.attribute));
        let view = |dtype, len: usize, bytes| TensorView::new(dtype, vec![len], bytes);
        let count = self.tokens.len();
        let sum = checksum(outline, &tokens, &losses, &entropies, attributes.as_deref());
        let mut views = vec![
            (CHECKSUM, view(Dtype::U8, Fingerprint::LEN, sum.as_bytes())?),
            (OUTLINE, view(Dtype::U8, outline.len(), outline)?),
            (TOKENS, view(Dtype::U32, count, &tokens)?),
            (REFERENCE_LOSS, view(Dtype::F32, count, &losses)?),
            (REFERENCE_ENTROPY, view(Dtype::F32, count, &entropies)?),
        ];
        if let Some(attributes) = &attributes {
            views.push((ATTRIBUTE, view(Dtype::F32, self.attribute.len(), attributes)?));
        }
        Ok(safetensors::serialize(views, None::<HashMap<String, String>>)?)
    }

    /// The numbers in a file, whose outline names these contexts.
    pub fn of(file: &SafeTensors<'_>, policies: Vec<ContextPolicy>) -> Result<Self, SnapshotError> {
        let words = |name: &'static str, dtype: Dtype| -> Result<Vec<[u8; 4]>, SnapshotError> {
            let data = column(file, name, dtype)?;
            Ok(data.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]).collect())
        };
        let floats = |name| -> Result<Vec<f32>, SnapshotError> {
            Ok(words(name, Dtype::F32)?.into_iter().map(f32::from_le_bytes).collect())
        };
        let columns = Self {
            tokens: words(TOKENS, Dtype::U32)?.into_iter().map(u32::from_le_bytes).collect(),
            reference_loss: floats(REFERENCE_LOSS)?,
            reference_entropy: floats(REFERENCE_ENTROPY)?,
            attribute: if has_attributes(file) { floats(ATTRIBUTE)? } else { vec![] },
            policies,
            taken: 0,
            attributes_taken: 0,
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

/// Fails where a file does not hold what was written.
pub(super) fn check_sum(file: &SafeTensors<'_>) -> Result<(), SnapshotError> {
    let sum = checksum(
        column(file, OUTLINE, Dtype::U8)?,
        column(file, TOKENS, Dtype::U32)?,
        column(file, REFERENCE_LOSS, Dtype::F32)?,
        column(file, REFERENCE_ENTROPY, Dtype::F32)?,
        if has_attributes(file) { Some(column(file, ATTRIBUTE, Dtype::F32)?) } else { None },
    );
    if column(file, CHECKSUM, Dtype::U8)? == sum.as_bytes() { Ok(()) } else { Err(SnapshotError::Damaged) }
}

fn checksum(
    outline: &[u8],
    tokens: &[u8],
    losses: &[u8],
    entropies: &[u8],
    attributes: Option<&[u8]>,
) -> Fingerprint {
    let parts =
        [(OUTLINE, outline), (TOKENS, tokens), (REFERENCE_LOSS, losses), (REFERENCE_ENTROPY, entropies)];
    let parts = parts.into_iter().chain(attributes.map(|bytes| (ATTRIBUTE, bytes)));
    let mut digests: Vec<(String, Fingerprint)> =
        parts.map(|(name, bytes)| (name.to_owned(), Fingerprint::of_bytes(bytes))).collect();
    Fingerprint::of_parts(&mut digests)
}

fn has_attributes(file: &SafeTensors<'_>) -> bool {
    file.tensor(ATTRIBUTE).is_ok()
}

fn column<'a>(file: &SafeTensors<'a>, name: &'static str, dtype: Dtype) -> Result<&'a [u8], SnapshotError> {
    let view = file.tensor(name).map_err(|_| SnapshotError::Part(name))?;
    if view.dtype() == dtype { Ok(view.data()) } else { Err(SnapshotError::Part(name)) }
}
