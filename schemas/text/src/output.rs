//! Words for people on standard error, and data on standard output.
//!
//! `println!` and `eprintln!` panic where nobody reads or the disk is full.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

use anyhow::Context;

/// Says something on standard error.
pub fn say(text: Arguments<'_>) {
    // Nothing can be done where nobody listens.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Whoever reads standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Takes what is written.
    Listens,
    /// Has closed the pipe, having seen enough (`head`): no failure, and no reason to go on.
    Gone,
}

/// Writes a line of data, and sees it out.
pub fn print_line(line: &str) -> anyhow::Result<Reader> {
    let mut output = std::io::stdout().lock();
    match writeln!(output, "{line}").and_then(|()| output.flush()) {
        Ok(()) => Ok(Reader::Listens),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}

/// Prints what clap has to say; its exit code, where it asks for none of its own. `usage` is that of a wrong command
/// line.
pub fn print_clap(error: &clap::Error, usage: u8) -> u8 {
    let to_stderr = error.use_stderr();
    match error.print() {
        Err(failure) if !to_stderr && failure.kind() != ErrorKind::BrokenPipe => {
            say(format_args!("error: cannot write to standard output: {failure}"));
            1
        }
        _ if to_stderr => usage,
        // `--help` and `--version` are asked for.
        _ => 0,
    }
}
