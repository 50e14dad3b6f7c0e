//! The core of `sluice_feed`: the feed and the selection of the crate `sluice-feed`, as Python sees them. Everything that
//! waits or computes for long releases the GIL.
#![allow(clippy::doc_markdown, reason = "doc comments are Python's docstrings")]
#![allow(
    clippy::needless_pass_by_value,
    reason = "what Python hands over arrives as values, and errors are mapped as such"
)]

mod batch;
mod error;
mod feed;
mod metrics;
mod selection;
mod waiting;

use pyo3::pymodule;

/// The compiled half of `sluice_feed`.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::batch::Batch;
    #[pymodule_export]
    use crate::error::{ConfigurationError, RankError, SluiceError, StateError, StreamError};
    #[pymodule_export]
    use crate::feed::Feed;
    #[pymodule_export]
    use crate::selection::Selection;

    /// Has what the feed says (a stall, a new partition, a broker in trouble) go to Python's `logging`.
    #[pymodule_init]
    #[allow(clippy::unnecessary_wraps, reason = "what PyO3 calls")]
    fn init(_module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        // A second import finds the logger installed.
        let _ = pyo3_log::try_init();
        Ok(())
    }
}
