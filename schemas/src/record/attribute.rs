//! What a token classifier says of a document's tokens, as it travels.

use bytes::Bytes;

use super::error::RecordError;
use super::losses::LossFormat;
use crate::wire;

/// One finite number for each token of a document, the first included: of a record of `sluiced` the probability of a class.
#[derive(Clone, PartialEq)]
pub struct TokenAttribute {
    class_name: String,
    class_index: u32,
    bytes: Bytes,
    format: LossFormat,
}

impl TokenAttribute {
    /// Packs `values`, one for each token, of the class of this name and index.
    pub fn new(
        class_name: String,
        class_index: u32,
        values: &[f32],
        format: LossFormat,
    ) -> Result<Self, RecordError> {
        Self { class_name, class_index, bytes: format.pack(values), format }.check(values.len())
    }

    pub(super) fn from_wire(attribute: wire::TokenAttribute, tokens: usize) -> Result<Self, RecordError> {
        let format = LossFormat::from_wire(attribute.format)?;
        let wire::TokenAttribute { values: bytes, class_name, class_index, .. } = attribute;
        Self { class_name, class_index, bytes, format }.check(tokens)
    }

    pub(super) fn to_wire(&self) -> wire::TokenAttribute {
        wire::TokenAttribute {
            values: self.bytes.clone(),
            format: self.format.to_wire().into(),
            class_name: self.class_name.clone(),
            class_index: self.class_index,
        }
    }

    fn check(self, tokens: usize) -> Result<Self, RecordError> {
        let (found, expected) = (self.bytes.len(), tokens * self.format.width());
        if found != expected {
            return Err(RecordError::BadAttributeLength { found, expected, tokens });
        }
        if let Some((position, value)) = self.iter().enumerate().find(|(_, value)| !value.is_finite()) {
            return Err(RecordError::NonFiniteAttribute { position, value });
        }
        Ok(self)
    }

    /// The class, as the model's `config.json` names it.
    pub fn class_name(&self) -> &str {
        &self.class_name
    }

    /// Index of the class among those of the model.
    pub fn class_index(&self) -> u32 {
        self.class_index
    }

    /// Layout of one value.
    pub fn format(&self) -> LossFormat {
        self.format
    }

    /// The values in order.
    pub fn iter(&self) -> impl Iterator<Item = f32> + '_ {
        self.format.unpack(&self.bytes)
    }

    /// The values in order, copied.
    pub fn to_vec(&self) -> Vec<f32> {
        self.iter().collect()
    }
}

impl std::fmt::Debug for TokenAttribute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { class_name, class_index, bytes, format } = self;
        let tokens = bytes.len() / format.width();
        write!(f, "TokenAttribute({class_name:?} ({class_index}), {tokens} tokens, {format:?})")
    }
}
