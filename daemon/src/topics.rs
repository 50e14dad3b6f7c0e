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

/// Creates those of `topics` (`NAME:PARTITIONS`) that do not exist yet, with `replication` copies or one. Those that exist
/// and have other numbers of partitions, or of copies where that was asked for, are an error.
pub fn create(
    bootstrap_servers: &str,
    properties: &BTreeMap<String, String>,
    topics: &[String],
    replication: Option<i32>,
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
    let metadata = kafka::reach(admin.inner(), bootstrap_servers, || {}).exit_code(UNAVAILABLE)?;
    if kafka::is_mock(admin.inner()) {
        return Err(anyhow!(
            "this is librdkafka's mock cluster, which creates no topics when asked; give them to `sluiced dev-broker` as \
             --topic NAME:PARTITIONS"
        ))
        .exit_code(USAGE);
    }
    let copies = replication.unwrap_or(1);
    let wanted: Vec<_> = topics
        .iter()
        .map(|(name, partitions)| NewTopic::new(name, *partitions, TopicReplication::Fixed(copies)))
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let options = AdminOptions::new().operation_timeout(Some(Duration::from_secs(30)));
    let created = runtime.block_on(admin.create_topics(&wanted, &options)).context("cannot create topics")?;
    let mut others = Vec::new();
    for result in created {
        match result {
            Ok(topic) => tracing::info!(topic, "created"),
            Err((topic, RDKafkaErrorCode::TopicAlreadyExists)) => {
                let asked = topics.iter().find(|(name, _)| *name == topic).map(|(_, partitions)| *partitions);
                let pair = asked.zip(kafka::shape(&metadata, &topic));
                let other = pair.and_then(|(asked, found)| difference(&topic, (asked, replication), found));
                if other.is_none() {
                    tracing::info!(topic, "exists already");
                }
                others.extend(other);
            }
            Err((topic, error)) => bail!("cannot create the topic `{topic}`: {error}"),
        }
    }
    if others.is_empty() {
        return Ok(());
    }
    Err(anyhow!(
        "{}; ask for what is there, or change it with Kafka's own tools (kafka-topics.sh --alter adds partitions)",
        others.join("; ")
    ))
    .exit_code(USAGE)
}

/// How an existing topic, of `found` partitions and copies, is not what was asked for.
fn difference(name: &str, (partitions, copies): (i32, Option<i32>), found: (usize, usize)) -> Option<String> {
    let (found_partitions, found_copies) = (found.0 as i32, found.1 as i32);
    let mut differences = Vec::new();
    if found_partitions != partitions {
        differences.push(format!("{found_partitions} partitions, not {partitions}"));
    }
    if let Some(copies) = copies.filter(|copies| found_copies != *copies) {
        differences.push(format!("{found_copies} copies of each, not {copies}"));
    }
    (!differences.is_empty())
        .then(|| format!("the topic `{name}` exists and has {}", differences.join(" and ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_that_is_not_as_asked_for_is_named_with_both_numbers() {
        assert_eq!(difference("a", (4, None), (4, 3)), None, "copies that nobody asked for");
        assert_eq!(difference("a", (4, Some(3)), (4, 3)), None);
        assert_eq!(
            difference("a", (8, Some(1)), (4, 3)).as_deref(),
            Some("the topic `a` exists and has 4 partitions, not 8 and 3 copies of each, not 1")
        );
    }
}
