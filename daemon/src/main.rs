//! `sluiced`: see `sluiced --help`.

use std::process::ExitCode;

use sluice_daemon::{cli, exit};

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluiced: {error:#}");
            ExitCode::from(exit::code_of(&error))
        }
    }
}
