//! `sluiced topics create`: the three topics on a real cluster.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::error::RDKafkaErrorCode;

use crate::dev_broker::parse_topic;
use crate::exit::{ExitCode as _, UNAVAILABLE, USAGE};
use crate::kafka::{self, PlainContext};

const OAUTHBEARER: &str = "OAUTHBEARER";

/// Creates those of `topics` (`NAME:PARTITIONS`) that do not exist yet.
pub fn create(
    bootstrap_servers: &str,
    properties: &BTreeMap<String, String>,
    topics: &[String],
    replication: i32,
) -> anyhow::Result<()> {
    let topics = topics.iter().map(|topic| parse_topic(topic)).collect::<anyhow::Result<Vec<_>>>();
    let topics = topics.exit_code(USAGE)?;
    if ["sasl.mechanism", "sasl.mechanisms"]
        .iter()
        .any(|key| properties.get(*key).is_some_and(|it| it == OAUTHBEARER))
    {
        return Err(anyhow!(
            "topics cannot be created over {OAUTHBEARER}, for whose tokens the admin client of rust-rdkafka never asks; \
             create them with Kafka's own kafka-topics.sh, or over another mechanism"
        ))
        .exit_code(USAGE);
    }
    let admin: AdminClient<PlainContext> = kafka::client_config(bootstrap_servers, properties)
        .create_with_context(PlainContext::default())
        .map_err(kafka::setting_error)
        .exit_code(USAGE)?;
    kafka::reach(admin.inner(), bootstrap_servers, || {}).exit_code(UNAVAILABLE)?;
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
