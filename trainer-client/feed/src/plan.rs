//! What decides the micro-batches of a run beside its data.

use serde::{Deserialize, Serialize};
use sluice_schemas::fingerprint::Fingerprint;

use crate::pack::{BatchShape, Packing};
use crate::stream::Extent;

/// Most micro-batches of a step. A larger number is a mistake, and would fill memory before the first step.
pub const MICRO_BATCHES_MAX: usize = 1 << 16;
/// Most cells (rows times tokens of a row) of a micro-batch.
pub const CELLS_MAX: usize = 1 << 26;

/// A size that no run can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A step of so many micro-batches.
    #[error("{0} micro-batches a step are too many; at most {MICRO_BATCHES_MAX} can be had")]
    MicroBatches(usize),
    /// A micro-batch of so many rows and tokens a row.
    #[error(
        "a micro-batch of {rows} rows of {len} tokens is too large; at most {CELLS_MAX} tokens can be had"
    )]
    Cells {
        /// Its rows.
        rows: usize,
        /// Tokens of a row.
        len: usize,
    },
}

impl BatchShape {
    /// Refuses a micro-batch that no memory holds.
    pub fn check(self) -> Result<(), PlanError> {
        let Self { rows, len } = self;
        if rows.checked_mul(len).is_none_or(|cells| cells > CELLS_MAX) {
            return Err(PlanError::Cells { rows, len });
        }
        Ok(())
    }
}

/// How a feed makes micro-batches. Two feeds with the same plan over the same data give the same ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// What the data is called: a topic's name.
    pub topic: String,
    /// How much of it is read.
    pub extent: Extent,
    /// Shape of a micro-batch.
    pub shape: BatchShape,
    /// What a token may look at.
    pub packing: Packing,
    /// Micro-batches of a step, over all ranks.
    pub micro_batches: usize,
    /// Documents in the shuffle buffers, over all lanes; at most 1 a lane leaves the lane's order as it is.
    pub shuffle_buffer: usize,
    /// Seed of the buffers' draws.
    pub seed: u64,
}

impl Plan {
    /// The first setting in which two plans differ, in words; `None` where micro-batches would be the same.
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("the topic", self.topic == other.topic),
            ("how much of the topic is read", self.extent == other.extent),
            ("the rows of a micro-batch", self.shape.rows == other.shape.rows),
            ("the sequence length", self.shape.len == other.shape.len),
            ("the packing", self.packing == other.packing),
            ("the number of micro-batches a step", self.micro_batches == other.micro_batches),
            ("the size of the shuffle buffer", self.shuffle_buffer == other.shuffle_buffer),
            ("the seed", self.seed == other.seed),
        ]
        .into_iter()
        .find_map(|(name, is_same)| (!is_same).then_some(name))
    }

    /// Refuses sizes that are mistakes: a step or a micro-batch that no memory holds.
    pub fn check(&self) -> Result<(), PlanError> {
        if self.micro_batches > MICRO_BATCHES_MAX {
            return Err(PlanError::MicroBatches(self.micro_batches));
        }
        self.shape.check()
    }

    /// Documents in the shuffle buffer of each of so many lanes.
    pub fn shuffle_buffer_of_lane(&self, lanes: usize) -> usize {
        self.shuffle_buffer.div_ceil(lanes.max(1))
    }
}

/// What must be the same on all ranks of a group, and in a checkpoint that is gone on from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// Fingerprint of the tokenizer.
    pub tokenizer: Fingerprint,
    /// Fingerprint of the reference model, once a document has shown it; none where several are allowed.
    pub reference_model: Option<Fingerprint>,
    /// How micro-batches are made.
    pub plan: Plan,
}

impl Identity {
    /// What two of them differ in, in words. A reference model that is not known yet differs from none.
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        let models = self.reference_model.zip(other.reference_model);
        if self.tokenizer != other.tokenizer {
            Some("the tokenizer")
        } else if models.is_some_and(|(one, other)| one != other) {
            Some("the reference model")
        } else {
            self.plan.difference(&other.plan)
        }
    }

    /// A digest that is equal where all of it is: what ranks compare.
    pub fn fingerprint(&self) -> Fingerprint {
        // A plan of numbers and names can always be encoded.
        Fingerprint::of_bytes(&serde_json::to_vec(self).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::{Identity, MICRO_BATCHES_MAX, Plan, PlanError};
    use crate::pack::{BatchShape, Packing};
    use crate::stream::Extent;
    use sluice_schemas::fingerprint::Fingerprint;

    fn identity() -> Identity {
        let plan = Plan {
            topic: "t".into(),
            extent: Extent::Follow,
            shape: BatchShape { rows: 2, len: 8 },
            packing: Packing::default(),
            micro_batches: 4,
            shuffle_buffer: 10,
            seed: 1,
        };
        Identity { tokenizer: Fingerprint::of_bytes(b"t"), reference_model: None, plan }
    }

    #[test]
    fn what_differs_is_named() {
        let one = identity();
        let mut other = identity();
        other.reference_model = Some(Fingerprint::of_bytes(b"m"));
        assert_eq!(one.difference(&other), None);
        assert_ne!(one.fingerprint(), other.fingerprint());
        let mut third = other.clone();
        third.reference_model = Some(Fingerprint::of_bytes(b"n"));
        assert_eq!(other.difference(&third), Some("the reference model"));
        other.plan.seed = 2;
        assert_eq!(one.difference(&other), Some("the seed"));
        assert_eq!([0, 1, 10].map(|lanes| one.plan.shuffle_buffer_of_lane(lanes)), [10, 10, 1]);
        assert_eq!(one.plan.shuffle_buffer_of_lane(4), 3);
    }

    #[test]
    fn sizes_that_no_memory_holds_are_refused_with_the_most_that_can_be_had() {
        let mut plan = identity().plan;
        assert_eq!(plan.check(), Ok(()));
        plan.micro_batches = MICRO_BATCHES_MAX;
        plan.shape = BatchShape { rows: 1 << 16, len: 1 << 10 };
        assert_eq!(plan.check(), Ok(()));
        plan.shape.rows += 1;
        assert_eq!(plan.check(), Err(PlanError::Cells { rows: (1 << 16) + 1, len: 1 << 10 }));
        plan.shape.rows = usize::MAX;
        assert_eq!(plan.check(), Err(PlanError::Cells { rows: usize::MAX, len: 1 << 10 }));
        plan.micro_batches = MICRO_BATCHES_MAX + 1;
        assert_eq!(plan.check(), Err(PlanError::MicroBatches(65_537)));
    }
}
