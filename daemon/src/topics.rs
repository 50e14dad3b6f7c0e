//! `sluiced topics create`: the three topics on a real cluster.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;

use crate::dev_broker::parse_topic;
use crate::exit::{ExitCode as _, UNAVAILABLE, USAGE};
use crate::kafka;

/// Creates those of `topics` (`NAME:PARTITIONS`) that do not exist yet.
pub fn create(bootstrap_servers: &str, topics: &[String], replication: i32) -> anyhow::Result<()> {
    let topics = topics.iter().map(|topic| parse_topic(topic)).collect::<anyhow::Result<Vec<_>>>();
    let topics = topics.exit_code(USAGE)?;
    let admin: AdminClient<DefaultClientContext> =
        kafka::client_config(bootstrap_servers, &std::collections::BTreeMap::new()).create()?;
    kafka::reach(admin.inner(), bootstrap_servers, Duration::from_secs(10)).exit_code(UNAVAILABLE)?;
    if kafka::is_mock(admin.inner()) {
        return Err(anyhow!(
            "this is librdkafka's mock cluster, which creates no topics when asked; give them to `sluiced dev-broker` as \
             --topic NAME:PARTITIONS"
        ))
        .exit_code(USAGE);
    }
    let wanted: Vec<_> = topics
        .iter()
        .map(|(name, partitions)| NewTopic::new(name, *partitions, TopicReplication::Fixed(replication)))
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let options = AdminOptions::new().operation_timeout(Some(Duration::from_secs(30)));
    let created = runtime.block_on(admin.create_topics(&wanted, &options)).context("cannot create topics")?;
    for result in created {
        match result {
            Ok(topic) => tracing::info!(topic, "created"),
            Err((topic, RDKafkaErrorCode::TopicAlreadyExists)) => tracing::info!(topic, "exists already"),
            Err((topic, error)) => bail!("cannot create the topic `{topic}`: {error}"),
        }
    }
    Ok(())
}
