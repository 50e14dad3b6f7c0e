//! `sluiced`: see `sluiced --help`.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use sluice_daemon::{cli, exit};
use sluice_text::output::say;

/// Variables that libraries look at before any setting can reach them, with what they are where nobody has set them.
///
/// ONNX Runtime writes a device id and usage figures into the user's cache unless told not to. How glibc's allocator is told to
/// waste less is in ADR 14.
const VARIABLES: [(&str, &str); 4] = [
    ("ORT_DISABLE_TELEMETRY", "1"),
    ("MALLOC_ARENA_MAX", "2"),
    ("MALLOC_MMAP_THRESHOLD_", "262144"),
    ("MALLOC_TRIM_THRESHOLD_", "8388608"),
];

fn main() -> ExitCode {
    let missing: Vec<_> =
        VARIABLES.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    if !missing.is_empty() {
        // A process cannot safely change its own environment, so it begins again with another.
        let names: Vec<_> = missing.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut arguments = std::env::args_os();
        let error = match std::env::current_exe() {
            Ok(this) => Command::new(this)
                .arg0(arguments.next().unwrap_or_default())
                .args(arguments)
                .envs(missing)
                .exec(),
            Err(error) => error,
        };
        say(format_args!("sluiced: cannot begin again: {error}; set {}", names.join(" ")));
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
