//! Writes what is made from the command line and the settings: manual pages, shell completions, the reference of all
//! settings and the package's configuration file. `ops/docs/generate` calls it.
//!
//!     documents FOLDER        man/, completions/, configuration.md and sluiced.toml in FOLDER

use std::path::PathBuf;

use anyhow::Context as _;
use clap_complete::Shell;
use sluice_daemon::{cli, config};

fn main() -> anyhow::Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).context("give a folder")?);
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    std::fs::create_dir_all(&man)?;
    std::fs::create_dir_all(&completions)?;
    clap_mangen::generate_to(cli::command(), &man)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut cli::command(), "sluiced", &completions)?;
    }
    std::fs::write(folder.join("configuration.md"), config::reference())?;
    std::fs::write(folder.join("sluiced.toml"), config::example())?;
    Ok(())
}
