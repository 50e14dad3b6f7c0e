//! Per-token losses as they travel: little-endian f32 or f16, "no prediction" being NaN at the first token.

use bytes::Bytes;
use half::f16;

use super::context::Bos;
use super::error::RecordError;
use crate::wire;

/// How far below zero, in nats, rounding may push a loss whose token the model is certain of.
pub const NEGATIVE_LOSS_TOLERANCE: f32 = 1e-4;

/// Layout of one loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossFormat {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16: half the bytes, for an error of at most 0.004 nats below a loss of 16.
    F16,
}

impl LossFormat {
    /// Bytes of one value.
    pub(super) fn width(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }

    /// Values as they travel.
    pub(super) fn pack(self, values: &[f32]) -> Bytes {
        let bytes: Vec<u8> = match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        };
        bytes.into()
    }

    /// Values that have travelled.
    pub(super) fn unpack(self, bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
        bytes.chunks_exact(self.width()).map(|chunk| match *chunk {
            [a, b] => f16::from_le_bytes([a, b]).to_f32(),
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("chunks are two or four bytes long"),
        })
    }

    pub(super) fn from_wire(format: i32) -> Result<Self, RecordError> {
        match wire::LossFormat::try_from(format) {
            Ok(wire::LossFormat::F32) => Ok(Self::F32),
            Ok(wire::LossFormat::F16) => Ok(Self::F16),
            Ok(wire::LossFormat::Unspecified) | Err(_) => Err(RecordError::UnknownLossFormat(format)),
        }
    }

    pub(super) fn to_wire(self) -> wire::LossFormat {
        match self {
            Self::F32 => wire::LossFormat::F32,
            Self::F16 => wire::LossFormat::F16,
        }
    }
}

/// One value in nats for each token of a document. The first is NaN, meaning "no prediction", unless a BOS token
/// stood before it.
///
/// Entropies have the same form and the same bounds.
#[derive(Clone)]
pub struct Losses {
    bytes: Bytes,
    format: LossFormat,
}

impl Losses {
    /// Packs `losses`, one for each token of a document; the first alone may be NaN.
    pub fn new(losses: &[f32], format: LossFormat) -> Result<Self, RecordError> {
        Self::from_wire(format.pack(losses), format, losses.len())
    }

    /// The same where it is known whether the first has a prediction too.
    pub fn scored(losses: &[f32], format: LossFormat, is_first_predicted: bool) -> Result<Self, RecordError> {
        let packed = Self::new(losses, format)?;
        match losses.first() {
            Some(&loss) if is_first_predicted && loss.is_nan() => {
                Err(RecordError::NonFiniteLoss { position: 0, loss })
            }
            _ => Ok(packed),
        }
    }

    pub(super) fn from_wire(bytes: Bytes, format: LossFormat, tokens: usize) -> Result<Self, RecordError> {
        let expected = tokens * format.width();
        if bytes.len() != expected {
            return Err(RecordError::BadLossLength { found: bytes.len(), expected, tokens });
        }
        let losses = Self { bytes, format };
        for (position, loss) in losses.iter().enumerate() {
            if position == 0 && loss.is_nan() {
                // No prediction.
            } else if !loss.is_finite() {
                return Err(RecordError::NonFiniteLoss { position, loss });
            } else if loss < -NEGATIVE_LOSS_TOLERANCE {
                return Err(RecordError::NegativeLoss { position, loss });
            }
        }
        Ok(losses)
    }

    /// Refuses a prediction of the first token where nothing stood before it.
    pub(super) fn check_first(&self, bos: Bos) -> Result<(), RecordError> {
        match self.iter().next() {
            Some(loss) if bos == Bos::None && !loss.is_nan() => Err(RecordError::UnexpectedPrediction(loss)),
            _ => Ok(()),
        }
    }

    /// Number of tokens, the first included.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.format.width()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The values in order.
    pub fn iter(&self) -> impl Iterator<Item = f32> + '_ {
        self.format.unpack(&self.bytes)
    }

    /// The values in order, copied.
    pub fn to_vec(&self) -> Vec<f32> {
        self.iter().collect()
    }

    /// Layout of one value.
    pub fn format(&self) -> LossFormat {
        self.format
    }

    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl PartialEq for Losses {
    // By bits, so that the first value, NaN, equals itself.
    fn eq(&self, other: &Self) -> bool {
        self.format == other.format && self.bytes == other.bytes
    }
}

impl std::fmt::Debug for Losses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Losses({} tokens, {:?})", self.len(), self.format)
    }
}
