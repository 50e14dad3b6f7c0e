//! `sluice-train experiment`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::inspect::print_line;
use super::training::stop_on_signals;
use crate::experiment::{self, Interrupted, Options};

/// Arguments of `sluice-train experiment`.
#[derive(Args, Clone, Debug)]
pub(super) struct ExperimentArguments {
    /// Which one
    #[arg(value_enum)]
    experiment: Experiment,
    /// All of it in a few minutes, with models that learn next to nothing: to see that it works
    #[arg(long, env = "SLUICE_TRAIN_QUICK")]
    quick: bool,
    /// Folder of the runs; one that was interrupted goes on [default: target/experiment-1 or target/experiment-1-quick]
    #[arg(long, env = "SLUICE_TRAIN_OUT", value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Folder for data, table and plots [default: benches/results/experiment-1, with --quick results in --out]
    #[arg(long, env = "SLUICE_TRAIN_RESULTS", value_name = "FOLDER")]
    results: Option<PathBuf>,
    /// A checkout of Sluice, whose scripts build the text
    #[arg(long, env = "SLUICE_TRAIN_SOURCES", value_name = "FOLDER", default_value = ".")]
    sources: PathBuf,
    /// The daemon that scores [default: sluiced beside this program]
    #[arg(long, env = "SLUICE_TRAIN_DAEMON", value_name = "FILE")]
    daemon: Option<PathBuf>,
    /// Folder with GSM8K's train.jsonl, to evaluate on as well; never trained on
    #[arg(long, env = "SLUICE_TRAIN_GSM8K", value_name = "FOLDER")]
    gsm8k: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Experiment {
    /// Selected tokens against all tokens and random ones: shares, seeds, sizes, and the paper's setting
    #[value(name = "1")]
    First,
}

/// Runs an experiment, or what is left of it, and prints its table.
pub(super) fn experiment(arguments: &ExperimentArguments) -> anyhow::Result<()> {
    let Experiment::First = arguments.experiment;
    let stop = stop_on_signals()?;
    let quick = if arguments.quick { "-quick" } else { "" };
    let out = arguments.out.clone().unwrap_or_else(|| format!("target/experiment-1{quick}").into());
    let results = arguments.results.clone().unwrap_or_else(|| {
        if arguments.quick { out.join("results") } else { "benches/results/experiment-1".into() }
    });
    let mut command = "sluice-train experiment 1".to_owned();
    for (flag, is_given) in [("--quick", arguments.quick), ("--gsm8k FOLDER", arguments.gsm8k.is_some())] {
        if is_given {
            command = format!("{command} {flag}");
        }
    }
    let options = Options {
        is_quick: arguments.quick,
        out,
        results,
        sources: arguments.sources.clone(),
        daemon: arguments.daemon.clone(),
        gsm8k: arguments.gsm8k.clone(),
        command,
    };
    match experiment::run(&options, &stop) {
        Ok(table) => {
            print_line(table.trim_end())?;
            super::say(format_args!("the results are in {}", options.results.display()));
            Ok(())
        }
        Err(error) if error.is::<Interrupted>() => {
            super::say(format_args!("{error}"));
            Ok(())
        }
        Err(error) => Err(error),
    }
}
