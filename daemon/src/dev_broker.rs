//! `sluiced dev-broker`: librdkafka's mock cluster, for the demo and for trying things out.
//!
//! It speaks the real protocol on a real socket, and keeps at most 5 MiB a partition, in memory. It proves nothing
//! about exactly-once delivery.

use std::io::Read as _;

use crate::exit::{ExitCode as _, USAGE};
use anyhow::{Context as _, bail};
use rdkafka::mocking::MockCluster;
use sluice_text::output::{Reader, print_line};
use tokio::signal::unix::{SignalKind, signal};

/// Longest name of a topic.
const TOPIC_NAME_MAX: usize = 249;

/// Starts a broker with `topics` (`NAME:PARTITIONS`), prints its address and serves until a signal or, where
/// `until_stdin_closes` says so, the end of standard input.
pub fn run(topics: &[String], until_stdin_closes: bool) -> anyhow::Result<()> {
    let cluster = MockCluster::new(1).context("cannot start the mock cluster")?;
    for topic in topics {
        let (name, partitions) = parse_topic(topic).exit_code(USAGE)?;
        cluster
            .create_topic(name, partitions, 1)
            .with_context(|| format!("cannot create the topic `{name}` with {partitions} partitions"))?;
    }
    if print_line(&cluster.bootstrap_servers())? == Reader::Gone {
        // Nobody knows its address.
        return Ok(());
    }
    tracing::info!(
        bootstrap_servers = cluster.bootstrap_servers(),
        "broker is up; it keeps 5 MiB a partition, in memory, and forgets all when it stops"
    );

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let (closed_in, closed) = tokio::sync::oneshot::channel::<()>();
        if until_stdin_closes {
            std::thread::spawn(move || {
                let _ = std::io::stdin().read_to_end(&mut Vec::new());
                let _ = closed_in.send(());
            });
        } else {
            // Kept, so that the channel never reports an end.
            std::mem::forget(closed_in);
        }
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = closed => {}
        }
        Ok(())
    })
}

/// `NAME:PARTITIONS` into its parts.
pub fn parse_topic(text: &str) -> anyhow::Result<(&str, i32)> {
    let (name, partitions) = text.rsplit_once(':').unwrap_or((text, ""));
    let Ok(partitions @ 1..=10_000) = partitions.parse() else {
        bail!("`{text}` is no topic; give NAME:PARTITIONS, such as sluice.documents:8");
    };
    let is_letter = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_' | '-');
    if name.is_empty()
        || name.len() > TOPIC_NAME_MAX
        || [".", ".."].contains(&name)
        || !name.chars().all(is_letter)
    {
        bail!(
            "`{name}` is no name that Kafka takes for a topic: 1 to {TOPIC_NAME_MAX} of the letters a-z, A-Z, digits, dot, \
             underscore and hyphen"
        );
    }
    Ok((name, partitions))
}
