//! Records that are gone before they were read.

use std::time::Instant;

use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::topic_partition_list::Offset;

use super::offsets::committed;
use super::{Gap, PROBE_TIMEOUT, Source};

impl Source<'_> {
    /// Takes the client's word that some partition cannot be read on. It does not say which, nor does it read that one
    /// again by itself. It is believed where the log of a partition that is read has lost the place: then a person must
    /// decide, and not a service manager try again. Otherwise reading begins anew where the group stands.
    pub(super) fn gap(&self, error: &KafkaError) -> anyhow::Result<Option<Gap>> {
        let unknown = match self.lost_place() {
            Ok(Some(words)) => {
                tracing::error!(%error, "{words}; finishing what was read before");
                return Ok(Some(Gap { found: Instant::now(), words }));
            }
            Ok(None) => None,
            Err(unknown) => Some(unknown),
        };
        if let Some(others) = self.notices.due("gap") {
            tracing::warn!(
                %error,
                unknown = unknown.map(tracing::field::display),
                others_since_last_warning = others,
                "the client has stopped reading a partition, and none is known to have lost its place; reading begins anew"
            );
        }
        self.assignment.place_anew(&self.consumer)?;
        Ok(None)
    }

    /// The partition whose log has no record where it would be read on, in words.
    fn lost_place(&self) -> KafkaResult<Option<String>> {
        let topic = &self.config.kafka.documents_topic;
        let positions = self.consumer.position()?;
        for (partition, begun) in self.assignment.begun() {
            let position = positions.find_partition(topic, partition).map(|element| element.offset());
            let ((Some(Offset::Offset(next)), _) | (_, Offset::Offset(next))) = (position, begun) else {
                continue;
            };
            let (begin, end) = self.consumer.fetch_watermarks(topic, partition, PROBE_TIMEOUT)?;
            if (begin..=end).contains(&next) {
                continue;
            }
            // What an open transaction holds up is settled before anything is said.
            let committed = match committed(&self.consumer, topic, partition, PROBE_TIMEOUT)?.offset {
                // Another daemon has gone on with it, and what it committed was removed: this one comes back late.
                Offset::Offset(offset) if (begin..=end).contains(&offset) => continue,
                Offset::Offset(offset) => offset.to_string(),
                _ => "nothing".to_owned(),
            };
            // Exact in a topic that nobody writes to in transactions, whose ends take an offset each.
            let gone = match begin - next {
                gone @ 1.. => {
                    format!("{gone} records were removed before they were read: retention was faster")
                }
                _ => "the topic was made anew".to_owned(),
            };
            return Ok(Some(format!(
                "partition {partition} of the topic `{topic}` has no record any more at offset {next}, where it would be read on \
                 (committed: {committed}): its log begins at {begin} and ends at {end}; {gone}; \
                 decide where to go on and set that partition alone, with all daemons of the group stopped: \
                 kafka-consumer-groups.sh --reset-offsets --topic {topic}:{partition} --to-offset {begin}"
            )));
        }
        Ok(None)
    }
}
