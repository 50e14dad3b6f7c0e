//! Why bytes are no snapshot, or snapshots no whole.

use safetensors::SafeTensorError;

/// Version of the bytes. Version 1 was kept by rank, in files of another layout; version 2 had no checksum.
pub(super) const FORMAT: u32 = 3;

/// Why bytes are no snapshot, or snapshots no whole.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The bytes are of no safetensors file.
    #[error("it is not a whole file of a feed's state")]
    File(#[from] SafeTensorError),
    /// A part of the file is missing or of the wrong kind.
    #[error("its {0} is missing or of another type")]
    Part(&'static str),
    /// The checksum is of other bytes.
    #[error(
        "its bytes are not those that were written: the file or the memory it lay in is damaged; take an earlier one"
    )]
    Damaged,
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
    /// A snapshot of a run that makes other micro-batches.
    #[error("it is of another run: {0} differs")]
    OtherRun(&'static str),
    /// A stream without some of the lanes.
    #[error(
        "it is of {before} lanes (partitions of the topic), and there are {now} now: what was read of the others, and not \
         learnt from, would be lost"
    )]
    FewerLanes {
        /// Lanes that the run read.
        before: usize,
        /// Lanes that there are.
        now: usize,
    },
    /// Parts of several runs, or of several steps.
    #[error("the parts of the ranks do not belong together: {0} differs")]
    Parts(&'static str),
    /// A lane that no part, or more than one, holds.
    #[error("lane {0} is held by {1} parts, not by one: give the parts of all ranks, each once")]
    Lane(usize, usize),
}
