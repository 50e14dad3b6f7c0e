//! Which exit code an error ends the program with (the codes are those of BSD's `sysexits.h`).

use sluice_feed::stream::StreamError;
use sluice_text::TokenizerError;

/// Wrong arguments or configuration.
pub const EXIT_USAGE: u8 = 64;
/// Data that is not what it should be.
pub const EXIT_DATA: u8 = 65;
/// A file that must be there is not, or cannot be read.
pub const EXIT_NO_INPUT: u8 = 66;
/// A broker that cannot be reached or that has no such topic, an address that is taken, or a device that cannot be had.
pub const EXIT_UNAVAILABLE: u8 = 69;
/// Anything else.
pub const EXIT_FAILURE: u8 = 1;

/// An error with a known cause: the arguments, the data, or what is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The arguments or the configuration are wrong.
    #[error("{0}")]
    Usage(String),
    /// The data are wrong.
    #[error("{0}")]
    Data(String),
    /// A file that must be there is not.
    #[error("{0}")]
    NoInput(String),
    /// Something that is needed is not to be had now.
    #[error("{0}")]
    Unavailable(String),
}

/// Says what kind of failure an error is.
pub trait Classify<T> {
    /// Wrong arguments or configuration.
    fn or_usage(self) -> anyhow::Result<T>;
    /// Wrong data.
    fn or_data(self) -> anyhow::Result<T>;
    /// A device that cannot be had.
    fn or_unavailable(self) -> anyhow::Result<T>;
    /// A file that must be there is not, or is not one.
    fn or_no_input(self) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Classify<T> for Result<T, E> {
    fn or_usage(self) -> anyhow::Result<T> {
        self.map_err(|error| Failure::Usage(chain(error)).into())
    }

    fn or_data(self) -> anyhow::Result<T> {
        self.map_err(|error| Failure::Data(chain(error)).into())
    }

    fn or_unavailable(self) -> anyhow::Result<T> {
        self.map_err(|error| Failure::Unavailable(chain(error)).into())
    }

    fn or_no_input(self) -> anyhow::Result<T> {
        self.map_err(|error| Failure::NoInput(chain(error)).into())
    }
}

/// An error and its causes on one line.
fn chain(error: impl Into<anyhow::Error>) -> String {
    format!("{:#}", error.into())
}

/// Exit code for an error that ended a command.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return match failure {
            Failure::Usage(_) => EXIT_USAGE,
            Failure::Data(_) => EXIT_DATA,
            Failure::NoInput(_) => EXIT_NO_INPUT,
            Failure::Unavailable(_) => EXIT_UNAVAILABLE,
        };
    }
    match error.downcast_ref::<TokenizerError>() {
        Some(TokenizerError::Unreadable { .. }) => return EXIT_NO_INPUT,
        Some(TokenizerError::Invalid { .. }) => return EXIT_DATA,
        None => {}
    }
    match error.downcast_ref::<StreamError>() {
        Some(StreamError::Unreachable { .. } | StreamError::NoSuchTopic { .. }) => EXIT_UNAVAILABLE,
        Some(
            StreamError::PropertyFile(_)
            | StreamError::Settings(_)
            | StreamError::UnknownProperty(_)
            | StreamError::PropertyValue(_)
            | StreamError::OwnedProperty(_)
            | StreamError::NoEntropies { .. }
            | StreamError::NoLosses { .. }
            | StreamError::NoAttribute { .. }
            | StreamError::Plan(_)
            | StreamError::Shard { .. }
            | StreamError::UnequalContexts { .. },
        ) => EXIT_USAGE,
        Some(
            StreamError::EmptyTopic(_)
            | StreamError::File { .. }
            | StreamError::Record { .. }
            | StreamError::Kind { .. }
            | StreamError::Losses { .. }
            | StreamError::ForeignReference { .. }
            | StreamError::NotAllowed { .. }
            | StreamError::ForeignContext { .. }
            | StreamError::SeveralReferences
            | StreamError::Windows { .. }
            | StreamError::Snapshot(_)
            | StreamError::Rereads { .. }
            | StreamError::ForeignBos { .. }
            | StreamError::Removed { .. }
            | StreamError::Shorter { .. }
            | StreamError::MadeAnew { .. },
        ) => EXIT_DATA,
        Some(
            StreamError::Broker { .. }
            | StreamError::ReaderGone(_)
            | StreamError::OtherRank
            | StreamError::Agreement(_),
        )
        | None => EXIT_FAILURE,
    }
}
