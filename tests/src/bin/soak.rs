//! `tests/soak`: any number of faults against daemons on a real Kafka, or one daemon at full load; ends with one line of
//! figures.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use sluice_tests::oracle::{Options, run};
use sluice_tests::{Kafka, Shape, golden, root, steady};
use sluice_text::output::{print_line, say};

/// How much more memory a daemon may have at the end than after the first five minutes.
const GROWTH_MAX: f64 = 0.02;

/// Injects faults into daemons on a real Kafka and checks that every document comes out exactly once.
#[derive(Debug, Parser)]
struct Arguments {
    /// Faults to inject.
    #[arg(long, default_value_t = 20)]
    faults: usize,
    /// Decides which, when, and what the documents say.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Daemons that share the group.
    #[arg(long, default_value_t = 3)]
    daemons: usize,
    /// Brokers: 1, or 3 of which one at a time is stopped or killed.
    #[arg(long, default_value_t = 1)]
    brokers: usize,
    /// Documents a second.
    #[arg(long, default_value_t = 40)]
    documents_per_second: u64,
    /// Switch transactions off: the oracle must then find doubles.
    #[arg(long)]
    at_least_once: bool,
    /// No faults: one daemon at full load for so many minutes, which must not grow.
    #[arg(long, conflicts_with_all = ["faults", "seed", "daemons", "documents_per_second", "at_least_once"])]
    steady_minutes: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let shape = Shape { brokers: arguments.brokers, tls_sasl: false };
    let kafka = Kafka::start_with(&root().join(format!("target/soak-kafka-{}", arguments.brokers)), shape);
    if let Some(minutes) = arguments.steady_minutes {
        return stay(&kafka, Duration::from_mins(minutes));
    }
    let options = Options {
        seed: arguments.seed,
        faults: arguments.faults,
        daemons: arguments.daemons,
        exactly_once: !arguments.at_least_once,
        documents_per_second: arguments.documents_per_second,
    };
    let findings = run(&kafka, &golden("tiny-llama"), &options);
    say(format_args!("faults of each kind: {:?}", findings.kinds));
    for (stall, recovery) in &findings.stalls {
        say(format_args!("stood still for at most {stall}, and {recovery} after the last loss of a daemon"));
    }
    if let Err(error) = print_line(&findings.to_string()) {
        say(format_args!("{error:#}: {findings}"));
        return ExitCode::FAILURE;
    }
    if findings.is_clean() {
        ExitCode::SUCCESS
    } else {
        say(format_args!("{findings:#?}"));
        let words = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        say(format_args!("run it again: tests/soak {words}"));
        ExitCode::FAILURE
    }
}

/// Keeps a daemon busy for `length`.
fn stay(kafka: &Kafka, length: Duration) -> ExitCode {
    let found = steady::run(kafka, &golden("tiny-llama"), length);
    if let Err(error) = print_line(&found.to_string()) {
        say(format_args!("{error:#}: {found}"));
        return ExitCode::FAILURE;
    }
    let is_steady = found.growth() <= GROWTH_MAX && found.more() == (0, 0);
    if is_steady { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
