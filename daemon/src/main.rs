//! `sluiced`: see `sluiced --help`.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use sluice_daemon::{cli, exit};
use sluice_text::output::say;

/// Keeps ONNX Runtime from writing a device id and usage figures into the user's cache. It looks at the variable when
/// its library is loaded, before any setting can reach it.
const NO_TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

fn main() -> ExitCode {
    if std::env::var_os(NO_TELEMETRY).is_none() {
        // A process cannot safely change its own environment, so it begins again with another.
        let mut arguments = std::env::args_os();
        let error = match std::env::current_exe() {
            Ok(this) => Command::new(this)
                .arg0(arguments.next().unwrap_or_default())
                .args(arguments)
                .env(NO_TELEMETRY, "1")
                .exec(),
            Err(error) => error,
        };
        say(format_args!("sluiced: cannot begin without telemetry: {error}; set {NO_TELEMETRY}=1"));
        return ExitCode::FAILURE;
    }
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("sluiced: {error:#}"));
            ExitCode::from(exit::code_of(&error))
        }
    }
}
