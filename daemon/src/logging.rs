//! Log lines on standard error, for people or as JSON. Ids are fields; payloads and secrets are never logged.

use anyhow::anyhow;
use tracing_subscriber::EnvFilter;

use crate::config::Log;

/// Starts logging as `log` says; `RUST_LOG` wins over its level.
pub fn start(log: &Log) -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(filter) => EnvFilter::try_new(filter),
        Err(_) => EnvFilter::try_new(&log.level),
    }
    .map_err(|error| anyhow!("log.level: `{}` is no filter: {error}", log.level))?;
    let lines =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let started = if log.format == "json" {
        lines.json().flatten_event(true).try_init()
    } else {
        let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
        lines.with_ansi(ansi).try_init()
    };
    started.map_err(|error| anyhow!("cannot start logging: {error}"))
}
