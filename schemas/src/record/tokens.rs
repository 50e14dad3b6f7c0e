//! Token ids as they travel: little-endian, two or four bytes each, never copied until they are needed.

use bytes::Bytes;

use super::error::RecordError;

/// A sequence of token ids.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenIds {
    bytes: Bytes,
    width: u32,
}

impl TokenIds {
    /// Packs `ids`, with two bytes each where every id fits, else four.
    pub fn new(ids: &[u32]) -> Self {
        let narrow = ids.iter().all(|&id| u16::try_from(id).is_ok());
        if narrow {
            let bytes = ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect::<Vec<u8>>();
            Self { bytes: bytes.into(), width: 2 }
        } else {
            let bytes = ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
            Self { bytes: bytes.into(), width: 4 }
        }
    }

    pub(super) fn from_wire(bytes: Bytes, width: u32) -> Result<Self, RecordError> {
        if width != 2 && width != 4 {
            return Err(RecordError::BadTokenWidth(width));
        }
        if !bytes.len().is_multiple_of(width as usize) {
            return Err(RecordError::BadTokenLength { len: bytes.len(), width });
        }
        Ok(Self { bytes, width })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.width as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The ids in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.bytes.chunks_exact(self.width as usize).map(|chunk| match *chunk {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("chunks are two or four bytes long"),
        })
    }

    /// The ids in order, copied.
    pub fn to_vec(&self) -> Vec<u32> {
        self.iter().collect()
    }

    /// Refuses ids of `vocabulary` and beyond.
    pub fn check_vocabulary(&self, vocabulary: u32) -> Result<(), RecordError> {
        match self.iter().enumerate().find(|&(_, id)| id >= vocabulary) {
            None => Ok(()),
            Some((position, id)) => Err(RecordError::TokenBeyondVocabulary { id, position, vocabulary }),
        }
    }

    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub(super) fn width(&self) -> u32 {
        self.width
    }
}

impl std::fmt::Debug for TokenIds {
    // Ids are payload, and payload has no place in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenIds({} tokens)", self.len())
    }
}
