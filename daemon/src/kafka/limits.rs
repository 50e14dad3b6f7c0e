//! What the brokers allow of the times that the clients ask for. Beyond it they refuse to begin, again and again.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rdkafka::admin::{AdminClient, AdminOptions, ConfigResource, ResourceSpecifier};
use rdkafka::metadata::Metadata;

use super::context::PlainContext;
use super::settings::{client_config, consumer_config, setting_error, transaction_timeout};
use crate::config::{Delivery, Kafka};

/// How long the brokers may take to tell their settings.
const CALL: Duration = Duration::from_secs(10);
const MIN_SESSION: &str = "group.min.session.timeout.ms";
const MAX_SESSION: &str = "group.max.session.timeout.ms";
const MAX_TRANSACTION: &str = "transaction.max.timeout.ms";

/// Refuses times that the brokers do not allow; says in words what could be found out.
pub fn check_limits(settings: &Kafka, metadata: &Metadata) -> anyhow::Result<String> {
    let limits = match broker_settings(settings, metadata) {
        Ok(limits) => limits,
        // Its user may not ask, or it is no Kafka: what is not known is no reason to refuse.
        Err(error) => {
            return Ok(format!("not known, for the brokers do not tell their settings ({error:#})"));
        }
    };
    let session = consumer_config(settings).get("session.timeout.ms").and_then(|it| it.parse().ok());
    let transaction = match settings.delivery {
        Delivery::ExactlyOnce => u64::try_from(transaction_timeout(settings)?.as_millis()).ok(),
        Delivery::AtLeastOnce => None,
    };
    compare(&limits, session, transaction)
}

/// Compares times in milliseconds, as far as they are known.
fn compare(
    limits: &HashMap<String, u64>,
    session: Option<u64>,
    transaction: Option<u64>,
) -> anyhow::Result<String> {
    let checks = [
        ("session.timeout.ms", session, limits.get(MIN_SESSION), MIN_SESSION, true),
        ("session.timeout.ms", session, limits.get(MAX_SESSION), MAX_SESSION, false),
        ("transaction.timeout.ms", transaction, limits.get(MAX_TRANSACTION), MAX_TRANSACTION, false),
    ];
    let mut within = Vec::new();
    for (key, asked, limit, name, is_least) in checks {
        let (Some(asked), Some(&limit)) = (asked, limit) else { continue };
        let (is_beyond, word) = if is_least { (asked < limit, "less") } else { (asked > limit, "more") };
        if is_beyond {
            bail!(
                "{key} = {asked} is {word} than the brokers' {name} = {limit}, so that they would refuse every start; set {key} in \
                 kafka.properties, or the brokers' limit"
            );
        }
        within.push(format!("{key} = {asked} is within {name} = {limit}"));
    }
    Ok(within.join(", "))
}

/// The settings of the first broker that are numbers.
fn broker_settings(settings: &Kafka, metadata: &Metadata) -> anyhow::Result<HashMap<String, u64>> {
    if settings.properties.values().any(|value| value == "OAUTHBEARER") {
        bail!("rust-rdkafka's admin client never asks for OAUTHBEARER tokens");
    }
    let broker = metadata.brokers().first().context("there is no broker")?.id();
    let admin: AdminClient<PlainContext> = client_config(&settings.bootstrap_servers, &settings.properties)
        .create_with_context(PlainContext::default())
        .map_err(setting_error)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let options = AdminOptions::new().request_timeout(Some(CALL));
    let asked = [ResourceSpecifier::Broker(broker)];
    let answer = runtime.block_on(admin.describe_configs(&asked, &options))?;
    let ConfigResource { entries, .. } = answer.into_iter().next().context("an empty answer")??;
    let numbers = entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?.parse().ok()?)));
    Ok(numbers.collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn limits() -> HashMap<String, u64> {
        [(MIN_SESSION, 6_000), (MAX_SESSION, 1_800_000), (MAX_TRANSACTION, 900_000)]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }

    #[test]
    fn what_the_brokers_allow_is_taken_to_the_last_millisecond() {
        assert!(compare(&limits(), Some(6_000), Some(900_000)).is_ok());
        assert!(compare(&limits(), Some(1_800_000), None).is_ok());
        for (session, transaction, words) in [
            (
                5_999,
                1,
                "session.timeout.ms = 5999 is less than the brokers' group.min.session.timeout.ms = 6000",
            ),
            (
                1_800_001,
                1,
                "session.timeout.ms = 1800001 is more than the brokers' group.max.session.timeout.ms",
            ),
            (
                6_000,
                900_001,
                "transaction.timeout.ms = 900001 is more than the brokers' transaction.max.timeout.ms",
            ),
        ] {
            let error = compare(&limits(), Some(session), Some(transaction)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn what_is_not_known_is_no_reason_to_refuse() {
        assert_eq!(compare(&HashMap::new(), Some(1), Some(u64::MAX)).unwrap(), "");
    }
}
