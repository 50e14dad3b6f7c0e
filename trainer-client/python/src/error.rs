//! Errors of the feed as exceptions.

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use sluice_feed::stream::StreamError as FeedError;

create_exception!(
    sluice_feed,
    SluiceError,
    PyException,
    "What sluice_feed raises beside ValueError for a wrong setting."
);
create_exception!(
    sluice_feed,
    ConfigurationError,
    PyValueError,
    "A setting that cannot be used; nothing has been read."
);
create_exception!(
    sluice_feed,
    StreamError,
    SluiceError,
    "The topic cannot be read on, or holds what this run cannot use."
);
create_exception!(sluice_feed, StateError, SluiceError, "A state that this stream cannot go on from.");
create_exception!(
    sluice_feed,
    RankError,
    SluiceError,
    "Another rank has failed, or ranks differ in what they read."
);

/// The exception for an error of the feed.
pub(crate) fn raised(error: FeedError) -> PyErr {
    let message = error.to_string();
    match error {
        FeedError::Settings(_)
        | FeedError::PropertyFile(_)
        | FeedError::UnknownProperty(_)
        | FeedError::PropertyValue(_)
        | FeedError::OwnedProperty(_)
        | FeedError::Plan(_)
        | FeedError::Shard { .. } => ConfigurationError::new_err(message),
        FeedError::Snapshot(_)
        | FeedError::Removed { .. }
        | FeedError::Shorter { .. }
        | FeedError::MadeAnew { .. } => StateError::new_err(message),
        FeedError::EmptyTopic(topic) => {
            let what = format!(
                "topic {topic:?} holds no documents; fill it first, or give epochs=None to wait for them"
            );
            StreamError::new_err(what)
        }
        FeedError::OtherRank | FeedError::SeveralReferences | FeedError::Agreement(_) => {
            RankError::new_err(message)
        }
        _ => StreamError::new_err(message),
    }
}

/// A setting that cannot be used.
pub(crate) fn refused(error: impl ToString) -> PyErr {
    ConfigurationError::new_err(error.to_string())
}
