//! Writes what is made from the command line: manual pages and shell completions. `ops/package` calls it.
//!
//!     manuals FOLDER        man/ and completions/ in FOLDER

use std::path::PathBuf;

use anyhow::Context as _;
use clap_complete::Shell;
use sluice_trainer::cli;

fn main() -> anyhow::Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).context("give a folder")?);
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    std::fs::create_dir_all(&man)?;
    std::fs::create_dir_all(&completions)?;
    clap_mangen::generate_to(cli::command(), &man)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut cli::command(), "sluice-train", &completions)?;
    }
    Ok(())
}
