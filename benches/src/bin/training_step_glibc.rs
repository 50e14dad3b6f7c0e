//! The same steps as `training_step worker`, with the C library's allocator instead of mimalloc.

use clap::Parser;
use sluice_benches::step::{Setup, worker};

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    setup: Setup,
}

fn main() -> anyhow::Result<()> {
    worker(&Cli::parse().setup)
}
