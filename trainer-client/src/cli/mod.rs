//! The command line: what people ask for, turned into the types of the other rooms.

mod advice;
mod arguments;
mod forecast;
mod inspect;
mod model;
mod optimization;
mod reference;
mod run;
mod selection;
mod source;
mod training;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::failure::{EXIT_USAGE, exit_code};
use crate::model::DeviceName;
use sluice_text::output::{print_clap, say};

/// Train language models on the tokens that are worth it (Selective Language Modeling, Rho-1, arXiv 2404.07965).
///
/// Every flag can be given in the environment as SLUICE_TRAIN_ and its name: SLUICE_TRAIN_TOPIC for --topic.
/// Progress and logs go to standard error, results to standard output.
#[allow(clippy::doc_markdown, reason = "the text is shown in a terminal as it stands")]
#[derive(Debug, Parser)]
#[command(name = "sluice-train", version, max_term_width = 110)]
#[command(
    after_help = "Exit codes: 0 done or stopped by a signal, 64 wrong arguments, 65 wrong data, 66 no tokenizer, \
                        69 no broker, no such topic, no such device, or the address of the metrics or the run folder is taken, 130 or 143 \
                        stopped at once by a second signal, 1 anything else."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model on a scored topic
    Run(run::RunArguments),
    /// Say, from a sample of a scored topic, whether selection can be expected to help
    ///
    /// Which sources the reference predicts better than the model that will be trained (--init), what `--keep adaptive` and
    /// fixed shares would keep of each at the first step, and how streams like this one fared in an experiment. Reads from the
    /// beginning, belongs to no consumer group, commits nothing and writes nothing.
    Forecast(forecast::ForecastArguments),
    /// Train a reference model on a topic of curated tokenized documents
    Reference(reference::ReferenceArguments),
    /// Write a run's last checkpoint as an ONNX model that `sluiced serve` can load
    Export(inspect::ExportArguments),
    /// Measure a checkpoint's loss on held-out text; one JSON line per set on standard output
    Evaluate(inspect::EvaluateArguments),
    /// Try a device; aborts where it cannot be used
    #[command(hide = true)]
    ProbeDevice {
        /// As --device names it.
        device: DeviceName,
    },
    /// Compare runs: one self-contained HTML file, and the table on standard output
    Report(inspect::ReportArguments),
}

/// The whole command line.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command that the arguments name, and says how it ended.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            return ExitCode::from(print_clap(&error, EXIT_USAGE));
        }
    };
    log_to_stderr();
    let done = match &cli.command {
        Command::Run(arguments) => run::run(arguments),
        Command::Forecast(arguments) => forecast::forecast(arguments),
        Command::Reference(arguments) => reference::reference(arguments),
        Command::Export(arguments) => inspect::export(arguments),
        Command::Evaluate(arguments) => inspect::evaluate(arguments),
        Command::ProbeDevice { device } => {
            device.probe();
            Ok(())
        }
        Command::Report(arguments) => inspect::report(arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            match advice::advice(&error) {
                Some(advice) => say(format_args!("error: {error:#}; {advice}")),
                None => say(format_args!("error: {error:#}")),
            }
            ExitCode::from(exit_code(&error))
        }
    }
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("SLUICE_TRAIN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // A second subscriber in one process (in tests) is no reason to stop.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_sound() {
        super::command().debug_assert();
    }

    #[test]
    fn every_flag_can_be_given_in_the_environment() {
        for command in super::command().get_subcommands() {
            for argument in command.get_arguments().filter(|argument| argument.get_long().is_some()) {
                let Some(long) = argument.get_long() else { continue };
                let expected = format!("SLUICE_TRAIN_{}", long.replace('-', "_").to_uppercase());
                let named = argument.get_env().map(|name| name.to_string_lossy().into_owned());
                assert_eq!(named.as_deref(), Some(expected.as_str()), "--{long} of {}", command.get_name());
            }
        }
    }
}
