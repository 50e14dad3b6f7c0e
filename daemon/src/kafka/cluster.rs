//! What is asked of the brokers before anything is read or written.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use rdkafka::client::{Client, ClientContext};
use rdkafka::metadata::Metadata;

use super::context::{Context, Hooks};
use crate::config::{Delivery, Kafka};

/// How long a broker may take to answer the first question, and how often it is asked.
const REACH: Duration = Duration::from_secs(10);
const REACH_TURN: Duration = Duration::from_secs(1);
/// Events of a client that are heard between two questions.
const EVENTS_A_TURN: usize = 100;
/// How much longer one may take that accepts connections: librdkafka gives TLS and authentication as much
/// (`socket.connection.setup.timeout.ms`), and a busy machine needs it.
const SET_UP: Duration = Duration::from_secs(30);
/// How long a connection may take to be accepted.
const ACCEPT: Duration = Duration::from_secs(5);

/// The cluster's metadata, or an error that names the address. `serve` runs the client's callbacks, without which it
/// gets no token and says nothing; a client with a thread of its own needs nothing there.
pub fn reach<H: Hooks>(
    client: &Client<Context<H>>,
    bootstrap_servers: &str,
    serve: impl Fn(),
) -> anyhow::Result<Metadata>
where
    Context<H>: ClientContext,
{
    // One event a call, of which an attempt to connect makes several, and what a person must mend stands behind the others.
    let serve = || (0..EVENTS_A_TURN).for_each(|_| serve());
    let begun = Instant::now();
    let mut is_accepted = None;
    loop {
        serve();
        let error = match client.fetch_metadata(None, REACH_TURN) {
            Ok(metadata) => return Ok(metadata),
            Err(error) => error,
        };
        let waited = begun.elapsed();
        if waited < REACH {
            continue;
        }
        serve();
        // What broker and client do not accept of each other has been said, and waiting mends nothing.
        let is_refused = client.context().has_complained();
        if !is_refused && *is_accepted.get_or_insert_with(|| accepts(bootstrap_servers)) {
            if waited < REACH + SET_UP {
                continue;
            }
            return Err(anyhow!(error)).with_context(|| {
                format!(
                    "a broker accepts connections at {bootstrap_servers} and answers nothing within {} s; check that it is \
                     not overloaded, and that security.protocol is that of its listener",
                    (REACH + SET_UP).as_secs()
                )
            });
        }
        return Err(anyhow!(error)).with_context(|| {
            format!(
                "no broker answers at {bootstrap_servers} within {} s; check kafka.bootstrap_servers and that the broker \
                 runs",
                REACH.as_secs()
            )
        });
    }
}

/// Whether somebody takes a connection at one of the addresses.
fn accepts(bootstrap_servers: &str) -> bool {
    let addresses = bootstrap_servers.split(',').filter_map(|server| server.trim().to_socket_addrs().ok());
    addresses.flatten().any(|address| TcpStream::connect_timeout(&address, ACCEPT).is_ok())
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
