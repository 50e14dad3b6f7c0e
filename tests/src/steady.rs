//! One daemon at full load for as long as one likes: whether its memory, its file descriptors or its threads grow.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{TokenIds, TokenizedDocument};

use crate::{Daemon, Kafka};

const PARTITIONS: i32 = 4;
/// Documents that are made once and sent again and again.
const DOCUMENTS: usize = 4096;
const TOKENS: std::ops::Range<usize> = 20..800;
const VOCABULARY: u32 = 512;
/// Records that wait for the daemon, at least while the load keeps up and at most: more than librdkafka reads ahead (64 MiB), so
/// that what it holds does not go up and down with the load.
const BACKLOG: usize = 100_000;
/// Each topic keeps so much of a partition, in segments of so much.
const KEPT: [(&str, &str); 2] = [("retention.bytes", "200000000"), ("segment.bytes", "50000000")];
const SAMPLE: Duration = Duration::from_secs(5);
/// Samples between two lines of progress.
const SAMPLES_A_LINE: usize = 6;
/// By then a daemon has what it needs.
const SETTLED: Duration = Duration::from_mins(5);
/// What is compared is the mean of so long.
const WINDOW: Duration = Duration::from_mins(1);

/// A daemon at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Duration,
    /// Memory of the process that is in the machine's.
    resident_bytes: u64,
    descriptors: usize,
    threads: usize,
    documents: f64,
    tokens: f64,
    /// Time in the model.
    model_seconds: f64,
}

impl Sample {
    fn take(daemon: &Daemon, begun: Instant) -> Self {
        let process = format!("/proc/{}", daemon.id());
        let status = std::fs::read_to_string(format!("{process}/status")).unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"));
        let count = |folder: &str| std::fs::read_dir(format!("{process}/{folder}")).unwrap().count();
        let (_, metrics) = daemon.get("/metrics");
        let metric = |name: &str| -> f64 {
            let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.unwrap_or_else(|| panic!("no metric {name}")).parse().unwrap()
        };
        Self {
            at: begun.elapsed(),
            resident_bytes: kib.unwrap().trim().parse::<u64>().unwrap() * 1024,
            descriptors: count("fd"),
            threads: count("task"),
            documents: metric("sluiced_documents_scored_total"),
            tokens: metric("sluiced_tokens_scored_total"),
            model_seconds: metric("sluiced_batch_seconds_sum"),
        }
    }
}

/// What was seen.
#[derive(Debug)]
pub struct Steady {
    samples: Vec<Sample>,
}

/// A minute of it.
struct Window<'a>(&'a [Sample]);

impl Window<'_> {
    fn resident_megabytes(&self) -> f64 {
        self.0.iter().map(|sample| sample.resident_bytes as f64 / 1e6).sum::<f64>() / self.0.len() as f64
    }

    fn most(&self, of: impl Fn(&Sample) -> usize) -> usize {
        self.0.iter().map(of).max().unwrap_or(0)
    }
}

impl Steady {
    /// The minute that ends at this time.
    fn until(&self, end: Duration) -> Window<'_> {
        let first = self.samples.partition_point(|sample| sample.at + WINDOW < end);
        let last = self.samples.partition_point(|sample| sample.at <= end);
        Window(&self.samples[first..last])
    }

    fn both(&self) -> (Window<'_>, Window<'_>) {
        let end = self.samples.last().map_or(Duration::ZERO, |sample| sample.at);
        (self.until(SETTLED.min(end)), self.until(end))
    }

    /// How much more memory there is at the end than after the first five minutes, as a share of that.
    pub fn growth(&self) -> f64 {
        let (settled, end) = self.both();
        end.resident_megabytes() / settled.resident_megabytes() - 1.0
    }

    /// File descriptors and threads more than after the first five minutes.
    pub fn more(&self) -> (usize, usize) {
        let (settled, end) = self.both();
        let more = |of: fn(&Sample) -> usize| end.most(of).saturating_sub(settled.most(of));
        (more(|sample| sample.descriptors), more(|sample| sample.threads))
    }
}

impl fmt::Display for Steady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (settled, end) = self.both();
        let (first, last) = (settled.0[0], end.0[end.0.len() - 1]);
        let seconds = last.at.saturating_sub(first.at).as_secs_f64();
        write!(
            f,
            "{:.0} s at full load: resident {:.1} MB after five minutes, {:.1} MB at the end ({:+.2} %); descriptors {} and \
             {}; threads {} and {}; since then {:.0} documents and {:.0} tokens a second, {:.0} % of the time in the model",
            last.at.as_secs_f64(),
            settled.resident_megabytes(),
            end.resident_megabytes(),
            100.0 * self.growth(),
            settled.most(|sample| sample.descriptors),
            end.most(|sample| sample.descriptors),
            settled.most(|sample| sample.threads),
            end.most(|sample| sample.threads),
            (last.documents - first.documents) / seconds,
            (last.tokens - first.tokens) / seconds,
            100.0 * (last.model_seconds - first.model_seconds) / seconds,
        )
    }
}

/// Keeps one daemon on `kafka` busy for `length`; a line of progress goes to standard error twice a minute.
pub fn run(kafka: &Kafka, model: &Path, length: Duration) -> Steady {
    let name = format!("steady-{}", std::process::id());
    let topics = ["documents", "scored", "dead-letters"].map(|topic| format!("{name}.{topic}"));
    for topic in &topics {
        kafka.create_topic_with(topic, PARTITIONS, &KEPT);
    }
    let [documents, scored, dead_letters] = &topics;
    let flags = [
        ("--kafka-group-id", &name),
        ("--kafka-documents-topic", documents),
        ("--kafka-scored-topic", scored),
        ("--kafka-dead-letter-topic", dead_letters),
    ];
    let flags: Vec<&str> = flags.iter().flat_map(|&(flag, value)| [flag, value.as_str()]).collect();
    let daemon = Daemon::start_with(&kafka.bootstrap_servers, model, &flags);
    let (finished, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| load(kafka, model, documents, &finished, &stop));
        let begun = Instant::now();
        let mut steady = Steady { samples: Vec::new() };
        while begun.elapsed() < length {
            std::thread::sleep(SAMPLE);
            let sample = Sample::take(&daemon, begun);
            finished.store(sample.documents as usize, Ordering::Relaxed);
            steady.samples.push(sample);
            if steady.samples.len().is_multiple_of(SAMPLES_A_LINE) {
                eprintln!(
                    "[{:5.0} s] resident {:.1} MB, {} descriptors, {} threads, {:.0} documents, {:.0} tokens, {:.1} s in the model",
                    sample.at.as_secs_f64(),
                    sample.resident_bytes as f64 / 1e6,
                    sample.descriptors,
                    sample.threads,
                    sample.documents,
                    sample.tokens,
                    sample.model_seconds
                );
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(daemon.stop().code(), Some(0));
        steady
    })
}

/// Sends documents for as long as the daemon does not have enough of them.
fn load(kafka: &Kafka, model: &Path, topic: &str, finished: &AtomicUsize, stop: &AtomicBool) {
    let tokenizer = Fingerprint::of_bytes(&std::fs::read(model.join("tokenizer.json")).unwrap());
    let mut random = fastrand::Rng::with_seed(1);
    let payloads: Vec<(String, Bytes)> = (0..DOCUMENTS)
        .map(|number| {
            let tokens: Vec<u32> = (0..random.usize(TOKENS)).map(|_| random.u32(..VOCABULARY)).collect();
            let id = format!("document-{number}");
            let document = TokenizedDocument {
                id: id.clone(),
                tokens: TokenIds::new(&tokens),
                tokenizer,
                source: String::new(),
                attributes: BTreeMap::new(),
            };
            (id, document.encode())
        })
        .collect();
    let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", &kafka.bootstrap_servers)
        .set("compression.type", "lz4")
        .create()
        .unwrap();
    for (sent, (key, payload)) in payloads.iter().cycle().enumerate() {
        while sent >= finished.load(Ordering::Relaxed) + BACKLOG && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let record = BaseRecord::<str, [u8]>::to(topic).key(key).payload(payload);
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(Duration::from_mins(1)).unwrap();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(minute: u64, resident_bytes: u64, descriptors: usize) -> Sample {
        let at = Duration::from_mins(minute);
        Sample {
            at,
            resident_bytes,
            descriptors,
            threads: 9,
            documents: 0.0,
            tokens: 0.0,
            model_seconds: 0.0,
        }
    }

    #[test]
    fn growth_is_told_from_the_end_of_the_fifth_minute() {
        let of = |minute| match minute {
            0..4 => sample(minute, 50_000_000, 90),
            4..30 => sample(minute, 100_000_000, 20),
            _ => sample(minute, 103_000_000, 21),
        };
        let steady = Steady { samples: (0..=60).map(of).collect() };
        assert!((steady.growth() - 0.03).abs() < 1e-9);
        assert_eq!(steady.more(), (1, 0));
    }
}
