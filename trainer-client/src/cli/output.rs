//! Words for people on standard error, and data on standard output.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

use anyhow::Context;

/// Says something on standard error.
pub(super) fn say(text: Arguments<'_>) {
    // Nothing can be done where nobody listens, and `eprintln!` would panic.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Whoever reads standard output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// Takes what is written.
    Listens,
    /// Has closed the pipe, having seen enough (`head`): no failure.
    Gone,
}

/// Writes a line of data.
pub(super) fn print_line(line: &str) -> anyhow::Result<Reader> {
    let mut output = std::io::stdout();
    match writeln!(output, "{line}").and_then(|()| output.flush()) {
        Ok(()) => Ok(Reader::Listens),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}
