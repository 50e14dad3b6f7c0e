//! What one forward pass does to a selection among micro-batches that compete. Prints one JSON object on standard output.

use std::path::PathBuf;

use clap::Parser;
use serde_json::{Value, json};
use sluice_benches::one_pass::{Setup, Texts, compare};
use sluice_text::output::{print_line, say};

// As in sluice-train.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Compares the choice among all micro-batches of a step with those that need one forward pass.
#[derive(Debug, Parser)]
struct Arguments {
    /// A tokenizer.json.
    #[arg(long)]
    tokenizer: PathBuf,
    /// JSON Lines to train the reference on.
    #[arg(long)]
    curated: PathBuf,
    /// JSON Lines to train students on.
    #[arg(long)]
    mixed: PathBuf,
    /// JSON Lines to measure on.
    #[arg(long)]
    held_out: PathBuf,
    #[command(flatten)]
    setup: Setup,
    /// Seeds, a comparison each.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4,5")]
    seeds: Vec<u64>,
}

fn main() -> anyhow::Result<()> {
    let Arguments { tokenizer, curated, mixed, held_out, setup, seeds } = Arguments::parse();
    let texts = Texts::read(&tokenizer, [&curated, &mixed, &held_out])?;
    let compared: Vec<Value> = seeds
        .iter()
        .map(|&seed| {
            say(format_args!("seed {seed}"));
            compare(&texts, &Setup { seed, ..setup })
        })
        .collect::<anyhow::Result<_>>()?;
    let result = json!({
        "setup": { "steps": setup.steps, "micro_batches": setup.micro_batches, "rows": setup.rows, "len": setup.len,
                   "keep": setup.keep, "seeds": seeds },
        "results": compared,
    });
    print_line(&serde_json::to_string_pretty(&result)?)?;
    Ok(())
}
