//! Log lines on standard error, for people or as JSON. Ids are fields; payloads and secrets are never logged.

use std::sync::OnceLock;

use anyhow::anyhow;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::config::Log;

/// Changes what is logged, once logging has started.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging as `log` says; `RUST_LOG` wins over its level.
pub fn start(log: &Log) -> anyhow::Result<()> {
    let (filter, handle) = reload::Layer::new(filter(log)?);
    // A closed or full standard error is no reason to end: what would say so would panic.
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(false).log_internal_errors(false);
    let lines = if log.format == "json" {
        lines.json().flatten_event(true).boxed()
    } else {
        lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed()
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|error| anyhow!("cannot start logging: {error}"))?;
    // Logging starts once, so there is none yet.
    let _ = FILTER.set(handle);
    Ok(())
}

/// Goes over to the level of `log`, as far as `RUST_LOG` does not win over it.
pub fn set_level(log: &Log) -> anyhow::Result<()> {
    let filter = filter(log)?;
    match FILTER.get() {
        Some(handle) => {
            handle.reload(filter).map_err(|error| anyhow!("cannot change the log level: {error}"))
        }
        None => Ok(()),
    }
}

fn filter(log: &Log) -> anyhow::Result<EnvFilter> {
    match std::env::var("RUST_LOG") {
        Ok(filter) => EnvFilter::try_new(filter),
        Err(_) => EnvFilter::try_new(&log.level),
    }
    .map_err(|error| anyhow!("log.level: `{}` is no filter: {error}", log.level))
}
