//! Exit codes that mean something (those of BSD's `sysexits.h`).

use std::fmt;

use sluice_text::TokenizerError;

/// Bad command line or configuration: nothing was started, and starting again will not help.
pub const USAGE: u8 = 64;
/// Input that is wrong.
pub const DATA: u8 = 65;
/// A file that must be there is not, or cannot be read.
pub const NO_INPUT: u8 = 66;
/// A service that must be there is not, such as a broker.
pub const UNAVAILABLE: u8 = 69;
/// Another daemon runs under the same name, and each would throw the other out again: a person must tell them apart.
pub const FENCED: u8 = 78;

/// An error that knows its exit code.
#[derive(Debug)]
pub struct ExitError {
    /// The process's exit code.
    pub code: u8,
    /// What went wrong.
    pub error: anyhow::Error,
}

impl fmt::Display for ExitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl std::error::Error for ExitError {}

impl From<TokenizerError> for ExitError {
    fn from(error: TokenizerError) -> Self {
        let code = if matches!(error, TokenizerError::Unreadable { .. }) { NO_INPUT } else { DATA };
        Self { code, error: error.into() }
    }
}

/// Gives an error its exit code.
pub trait ExitCode<T> {
    /// The same result, whose error ends the process with `code`, or with the code that it has already.
    fn exit_code(self, code: u8) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> ExitCode<T> for Result<T, E> {
    fn exit_code(self, code: u8) -> anyhow::Result<T> {
        self.map_err(|error| {
            let error: anyhow::Error = error.into();
            if error.is::<ExitError>() { error } else { ExitError { code, error }.into() }
        })
    }
}

/// The exit code that `error` asks for, 1 where it asks for none.
pub fn code_of(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<ExitError>().map_or(1, |error| error.code)
}
