//! The experiments of the project: what is asked for, turned into the options of `sluice_benches::experiments`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use sluice_benches::experiments::{self, Experiment, Interrupted, Options};
use sluice_text::output::{print_clap, print_line, say};
use sluice_trainer::failure::{Classify, EXIT_USAGE, exit_code};
use sluice_trainer::watch::process::{keep_freed_memory, stop_on_signals};

// As in sluice-train: the steps that are timed before the runs are to take as long as those of the runs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Run an experiment of the project from text to table and plot; the same command goes on where it was interrupted.
///
/// Every flag can be given in the environment as SLUICE_EXPERIMENT_ and its name: SLUICE_EXPERIMENT_OUT for --out.
/// Variables SLUICE_TRAIN_* and SLUICED_* do not reach the programs that it runs.
/// Progress goes to standard error, the table to standard output.
#[allow(clippy::doc_markdown, reason = "the text is shown in a terminal as it stands")]
#[derive(Debug, Parser)]
#[command(name = "experiment", version, max_term_width = 110)]
#[command(
    after_help = "Exit codes: 0 done or stopped by a signal, 64 wrong arguments, 65 wrong data, 130 or 143 stopped at once \
                  by a second signal, 1 anything else."
)]
struct Cli {
    /// Which one
    #[arg(value_enum)]
    experiment: Name,
    /// All of it in a few minutes, with models that learn next to nothing: to see that it works
    #[arg(long, env = "SLUICE_EXPERIMENT_QUICK")]
    quick: bool,
    /// Only this setting (of experiment 1 scratch, continual, continual-mixed; of the map map-05-unrelated and the like);
    /// repeatable, in the environment separated by commas
    #[arg(long = "setting", env = "SLUICE_EXPERIMENT_SETTING", value_name = "NAME", value_delimiter = ',')]
    settings: Vec<String>,
    /// Train every kind of student at each of these learning rates, and report its best; as many times the time
    /// [default: one, 1e-3 from the base model and 2e-3 from fresh weights]
    #[arg(long, env = "SLUICE_EXPERIMENT_LEARNING_RATES", value_name = "RATE,...", value_delimiter = ',')]
    learning_rates: Vec<f64>,
    /// So many seeds of each kind; more can be added to what is finished [default: 5 in experiment 1, 3 in the others, 2 in
    /// experiment 5 and in the map]
    #[arg(long, env = "SLUICE_EXPERIMENT_SEEDS", value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: Option<u64>,
    /// Folder of the runs, which the experiments share: what is there is not trained again, and what was interrupted goes on
    /// [default: target/experiments, of experiment pretrained target/experiment-pretrained, and with --quick -quick behind it]
    #[arg(long, env = "SLUICE_EXPERIMENT_OUT", value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Folder for data, table and plots [default: benches/results/experiment-N with the names of settings and flags behind it,
    /// with --quick the same in --out]
    #[arg(long, env = "SLUICE_EXPERIMENT_RESULTS", value_name = "FOLDER")]
    results: Option<PathBuf>,
    /// A checkout of Sluice, whose scripts build the text
    #[arg(long, env = "SLUICE_EXPERIMENT_SOURCES", value_name = "FOLDER", default_value = ".")]
    sources: PathBuf,
    /// The daemon that scores [default: sluiced beside this program]
    #[arg(long, env = "SLUICE_EXPERIMENT_DAEMON", value_name = "FILE")]
    daemon: Option<PathBuf>,
    /// The trainer [default: sluice-train beside this program]
    #[arg(long, env = "SLUICE_EXPERIMENT_TRAINER", value_name = "FILE")]
    trainer: Option<PathBuf>,
    /// Checkpoint of the pretrained model, as sluice-train run --init takes it, its tokenizer.json beside it
    /// [default: SmolLM2-135M, which ops/smollm2 makes]
    #[arg(long, env = "SLUICE_EXPERIMENT_BASE", value_name = "FOLDER")]
    base: Option<PathBuf>,
    /// Folder with GSM8K's train.jsonl, to evaluate on as well; never trained on
    #[arg(long, env = "SLUICE_EXPERIMENT_GSM8K", value_name = "FOLDER")]
    gsm8k: Option<PathBuf>,
}

/// The experiments by their names.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Name {
    /// Selected tokens against all tokens and random ones, with controls
    #[value(name = "1")]
    Rules,
    /// How many tokens to keep
    #[value(name = "2")]
    Shares,
    /// References that do not fit: of another domain, and of general text
    #[value(name = "3")]
    References,
    /// Shares that change over the run
    #[value(name = "4")]
    Schedules,
    /// Sizes of the student, over a factor of 36
    #[value(name = "5")]
    Sizes,
    /// The stream as its own reference, and a reference smaller than the student
    #[value(name = "6")]
    SelfReference,
    /// How single tokens fare: their four categories, and which losses go with those of answers
    #[value(name = "7")]
    Tokens,
    /// Gradients through the kept tokens alone, over tokens and over FLOPs
    #[value(name = "8")]
    Gradients,
    /// Where it pays: how rare the target is, and how much noise is inside it
    Map,
    /// A pretrained model of 135M parameters goes on with the noisy stream: an hour and a half
    Pretrained,
}

impl From<Name> for Experiment {
    fn from(name: Name) -> Self {
        match name {
            Name::Rules => Self::Rules,
            Name::Shares => Self::Shares,
            Name::References => Self::References,
            Name::Schedules => Self::Schedules,
            Name::Sizes => Self::Sizes,
            Name::SelfReference => Self::SelfReference,
            Name::Tokens => Self::Tokens,
            Name::Gradients => Self::Gradients,
            Name::Map => Self::Map,
            Name::Pretrained => Self::Pretrained,
        }
    }
}

fn main() -> ExitCode {
    keep_freed_memory();
    run(std::env::args_os())
}

/// Runs what the arguments name, and says how it ended.
fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            return ExitCode::from(print_clap(&error, EXIT_USAGE));
        }
    };
    match experiment(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => {
            say(format_args!("{error}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(format_args!("error: {error:#}"));
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Runs an experiment, or what is left of it, and prints its table.
fn experiment(cli: Cli) -> anyhow::Result<()> {
    let experiment = Experiment::from(cli.experiment);
    let stop = stop_on_signals()?;
    let is_pretrained = experiment == Experiment::Pretrained;
    if cli.base.is_some() && !is_pretrained {
        let error =
            anyhow::anyhow!("--base is the model of experiment pretrained: leave it out, or give that one");
        return Err(error).or_usage();
    }
    let first = match experiment {
        Experiment::Map | Experiment::Pretrained => experiment.name().to_owned(),
        other => format!("experiment-{}", other.name()),
    };
    let rates = (!cli.learning_rates.is_empty()).then_some("rates");
    let parts = std::iter::once(first.as_str()).chain(cli.settings.iter().map(String::as_str)).chain(rates);
    let name = parts.collect::<Vec<_>>().join("-");
    let folder = if is_pretrained { "target/experiment-pretrained" } else { "target/experiments" };
    let quick = if cli.quick { "-quick" } else { "" };
    let out = cli.out.unwrap_or_else(|| format!("{folder}{quick}").into());
    let results = cli.results.unwrap_or_else(|| {
        let folder = if cli.quick { out.join("results") } else { "benches/results".into() };
        folder.join(&name)
    });
    let mut command = format!("experiment {}", experiment.name());
    let flags = [("--quick", cli.quick), ("--gsm8k FOLDER", cli.gsm8k.is_some())];
    for (flag, _) in flags.into_iter().filter(|(_, is_given)| *is_given) {
        command = format!("{command} {flag}");
    }
    for setting in &cli.settings {
        command = format!("{command} --setting {setting}");
    }
    if !cli.learning_rates.is_empty() {
        let rates: Vec<String> = cli.learning_rates.iter().map(f64::to_string).collect();
        command = format!("{command} --learning-rates {}", rates.join(","));
    }
    if let Some(seeds) = cli.seeds {
        command = format!("{command} --seeds {seeds}");
    }
    let options = Options {
        experiment,
        base: cli.base,
        seeds: cli.seeds,
        is_quick: cli.quick,
        settings: cli.settings,
        learning_rates: cli.learning_rates,
        out,
        results,
        sources: cli.sources,
        daemon: cli.daemon,
        trainer: cli.trainer,
        gsm8k: cli.gsm8k,
        command,
    };
    let table = experiments::run(&options, &stop)?;
    print_line(table.trim_end())?;
    say(format_args!("the results are in {}", options.results.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Cli;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_can_be_given_in_the_environment() {
        for argument in Cli::command().get_arguments() {
            let Some(long) = argument.get_long() else { continue };
            let expected = format!("SLUICE_EXPERIMENT_{}", long.replace('-', "_").to_uppercase());
            let named = argument.get_env().map(|name| name.to_string_lossy().into_owned());
            assert_eq!(named.as_deref(), Some(expected.as_str()), "--{long}");
        }
    }
}
