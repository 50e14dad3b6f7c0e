//! Which topic a name stands for: brokers (since Kafka 2.8) give each topic an id of its own, and another one to a topic
//! that is deleted and made anew.
//!
//! librdkafka (2.12) goes on in the new topic where it was in the old one, and passes over everything before that
//! (`rd_kafka_topic_metadata_update`, with a remark that it should not). It tells the ids in its log alone.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;

/// The context of the client's property `debug` whose lines tell ids.
pub const DEBUG_METADATA: &str = "metadata";
/// What stands for no id: sixteen bytes of nothing, in base64.
const NONE: &str = "AAAAAAAAAAAAAAAAAAAAAA";

/// Has the client log what belongs to `context`, one of those of its property `debug`, beside what the user asks for.
pub fn listen(config: &mut ClientConfig, context: &str) {
    let contexts = match config.get("debug") {
        Some(others) if !others.is_empty() => format!("{others},{context}"),
        _ => context.to_owned(),
    };
    config.set("debug", contexts).set_log_level(RDKafkaLogLevel::Debug);
}

/// A topic that is not the one any more that had its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MadeAnew {
    /// The id of the topic that was.
    pub earlier: String,
    /// The id of the topic that is.
    pub later: String,
}

#[derive(Debug)]
struct Ids {
    taken: String,
    now: String,
}

/// The ids of topics as one client, or one after the other, hears of them.
#[derive(Debug, Default)]
pub struct TopicIds(Mutex<HashMap<String, Ids>>);

impl TopicIds {
    /// Takes a line of the client's log.
    pub fn hear(&self, facility: &str, message: &str) {
        let Some((topic, id)) = told(facility, message) else { return };
        let mut ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = ids.entry(topic.to_owned());
        known
            .and_modify(|ids| id.clone_into(&mut ids.now))
            .or_insert_with(|| Ids { taken: id.to_owned(), now: id.to_owned() });
    }

    /// The id of `topic`: the first that was heard, or the last that was taken for it.
    pub fn id(&self, topic: &str) -> Option<String> {
        let ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ids.get(topic).map(|ids| ids.taken.clone())
    }

    /// Whether `topic` has another id by now.
    pub fn made_anew(&self, topic: &str) -> Option<MadeAnew> {
        let ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Ids { taken, now } = ids.get(topic)?;
        (taken != now).then(|| MadeAnew { earlier: taken.clone(), later: now.clone() })
    }

    /// Takes `id` for that of `topic`, as an earlier client heard it.
    pub fn expect(&self, topic: &str, id: String) {
        let mut ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = ids.entry(topic.to_owned());
        known
            .and_modify(|ids| ids.taken.clone_from(&id))
            .or_insert_with(|| Ids { taken: id.clone(), now: id });
    }

    /// Takes the id that `topic` has by now for its own.
    pub fn take(&self, topic: &str) {
        let mut ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ids) = ids.get_mut(topic) {
            ids.now.clone_into(&mut ids.taken);
        }
    }
}

/// The topic and the id that a line tells.
fn told<'a>(facility: &str, message: &'a str) -> Option<(&'a str, &'a str)> {
    if facility != "METADATA" {
        return None;
    }
    let (topic, ids) = message.split_once(" changed id from ")?;
    let topic = topic.rsplit_once("Topic ").map_or(topic, |(_, topic)| topic);
    let (_, id) = ids.split_once(" to ")?;
    (id != NONE).then_some((topic, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str =
        "[thrd:main]: Topic a.b changed id from AAAAAAAAAAAAAAAAAAAAAA to 5v5NtFUqT4CYhVXEZV3Wbw";
    const SECOND: &str =
        "[thrd:main]: Topic a.b changed id from 5v5NtFUqT4CYhVXEZV3Wbw to 0pCyJ8DkSZ2cVZ4ihkqDMQ";

    #[test]
    fn a_topic_with_another_id_is_another_topic() {
        let ids = TopicIds::default();
        assert_eq!((ids.id("a.b"), ids.made_anew("a.b")), (None, None));
        ids.hear("METADATA", FIRST);
        // A client tells it again when it forgets about the topic and comes back to it.
        ids.hear("METADATA", FIRST);
        assert_eq!((ids.id("a.b").as_deref(), ids.made_anew("a.b")), (Some("5v5NtFUqT4CYhVXEZV3Wbw"), None));
        ids.hear("METADATA", SECOND);
        let made_anew = MadeAnew {
            earlier: "5v5NtFUqT4CYhVXEZV3Wbw".to_owned(),
            later: "0pCyJ8DkSZ2cVZ4ihkqDMQ".to_owned(),
        };
        assert_eq!((ids.made_anew("a.b"), ids.made_anew("a")), (Some(made_anew), None));
        ids.take("a.b");
        assert_eq!((ids.id("a.b").as_deref(), ids.made_anew("a.b")), (Some("0pCyJ8DkSZ2cVZ4ihkqDMQ"), None));
    }

    #[test]
    fn an_id_that_an_earlier_client_heard_is_held_against_this_ones() {
        for is_heard_first in [true, false] {
            for (message, is_made_anew) in [(FIRST, false), (SECOND, true)] {
                let ids = TopicIds::default();
                let expect = || ids.expect("a.b", "5v5NtFUqT4CYhVXEZV3Wbw".to_owned());
                if is_heard_first {
                    ids.hear("METADATA", message);
                    expect();
                } else {
                    expect();
                    ids.hear("METADATA", message);
                }
                assert_eq!(ids.made_anew("a.b").is_some(), is_made_anew);
                assert_eq!(ids.id("a.b").as_deref(), Some("5v5NtFUqT4CYhVXEZV3Wbw"));
            }
        }
    }

    #[test]
    fn a_broker_without_ids_tells_none() {
        let ids = TopicIds::default();
        ids.hear(
            "METADATA",
            "[thrd:main]: Topic a changed id from 5v5NtFUqT4CYhVXEZV3Wbw to AAAAAAAAAAAAAAAAAAAAAA",
        );
        ids.hear("METADATA", "[thrd:main]: Topic a [0] Leader 1 Epoch 0");
        assert_eq!(ids.id("a"), None);
    }
}
