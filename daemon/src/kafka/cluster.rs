//! What is asked of the brokers before anything is read or written.

use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use rdkafka::client::{Client, ClientContext};
use rdkafka::metadata::Metadata;

use crate::config::{Delivery, Kafka};

/// How long a broker may take to answer the first question, and how often it is asked.
const REACH: Duration = Duration::from_secs(10);
const REACH_TURN: Duration = Duration::from_secs(1);

/// The cluster's metadata, or an error that names the address. `serve` runs the client's callbacks, without which it
/// gets no token and says nothing; a client with a thread of its own needs nothing there.
pub fn reach<C: ClientContext>(
    client: &Client<C>,
    bootstrap_servers: &str,
    serve: impl Fn(),
) -> anyhow::Result<Metadata> {
    let deadline = Instant::now() + REACH;
    loop {
        serve();
        match client.fetch_metadata(None, REACH_TURN) {
            Ok(metadata) => return Ok(metadata),
            Err(_) if Instant::now() < deadline => {}
            Err(error) => {
                serve();
                return Err(anyhow!(error)).with_context(|| {
                    format!(
                        "no broker answers at {bootstrap_servers} within {} s; check kafka.bootstrap_servers and that \
                         the broker runs",
                        REACH.as_secs()
                    )
                });
            }
        }
    }
}

/// Whether the brokers are librdkafka's mock cluster.
pub fn is_mock<C: ClientContext>(client: &Client<C>) -> bool {
    client.fetch_cluster_id(Duration::from_secs(10)).is_some_and(|cluster| cluster.starts_with("mockCluster"))
}

/// Refuses `delivery` where the brokers cannot keep its promise.
///
/// librdkafka's mock cluster takes transactions and neither isolates them nor keeps their offsets, so that every start
/// would read everything again.
pub fn check_delivery<C: ClientContext>(client: &Client<C>, delivery: Delivery) -> anyhow::Result<()> {
    if delivery == Delivery::ExactlyOnce && is_mock(client) {
        bail!(
            "this is librdkafka's mock cluster (sluiced dev-broker), which keeps no transactions; set kafka.delivery to \
             at-least-once"
        );
    }
    Ok(())
}

/// Refuses to begin where a topic of `settings` does not exist: records would be read that could go nowhere.
pub fn check_topics(metadata: &Metadata, settings: &Kafka) -> anyhow::Result<()> {
    let topics = [
        ("documents_topic", &settings.documents_topic),
        ("scored_topic", &settings.scored_topic),
        ("dead_letter_topic", &settings.dead_letter_topic),
    ];
    for (key, topic) in topics {
        if partitions(metadata, topic).is_none() {
            bail!(
                "the topic `{topic}` does not exist at {}, or this user may not see it; create it with `sluiced topics \
                 create`, or set kafka.{key}",
                settings.bootstrap_servers
            );
        }
    }
    Ok(())
}

/// Number of partitions of `topic`, or nothing where it does not exist.
pub fn partitions(metadata: &Metadata, topic: &str) -> Option<usize> {
    shape(metadata, topic).map(|(partitions, _)| partitions)
}

/// Number of partitions of `topic` and of copies of the first, or nothing where it does not exist.
pub fn shape(metadata: &Metadata, topic: &str) -> Option<(usize, usize)> {
    let topic = metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none())?;
    let copies = topic.partitions().first().map_or(0, |partition| partition.replicas().len());
    Some((topic.partitions().len(), copies))
}
