//! The stream against librdkafka's mock cluster: order, ends, and refusals.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdkafka::types::RDKafkaRespErr;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names::{SCORED_DOCUMENT, TOKENIZED_DOCUMENT};
use sluice_trainer::failure::exit_code;
use sluice_trainer::stream::{
    Broker, Decoder, DocumentStream, Extent, KafkaStream, PROPERTIES_OWNED, StreamError, TopicKind,
};
use support::{Cluster, cluster, produce, produce_as, produce_scored, scored, tokenized};

const TOPIC: &str = "scored";

fn tokenizer() -> Fingerprint {
    Fingerprint::of_bytes(b"tokenizer")
}

fn model() -> Fingerprint {
    Fingerprint::of_bytes(b"model")
}

fn document(id: &str) -> Vec<u8> {
    scored(tokenized(id, "s", &[1, 2, 3], tokenizer()), 1.0, model()).encode().to_vec()
}

fn open(cluster: &Cluster, extent: Extent, stop: &Arc<AtomicBool>) -> Result<KafkaStream, StreamError> {
    let broker = Broker::new(cluster.bootstrap_servers(), vec![])?;
    let decoder = Decoder::new(TopicKind::Scored, tokenizer(), 10);
    KafkaStream::open(broker, TOPIC, extent, decoder, Arc::clone(stop))
}

fn drain(stream: &mut KafkaStream) -> Result<Vec<String>, StreamError> {
    let mut ids = Vec::new();
    while let Some(document) = stream.next_document()? {
        ids.push(document.id().to_owned());
    }
    Ok(ids)
}

fn read_all(cluster: &Cluster) -> Result<Vec<String>, StreamError> {
    drain(&mut open(cluster, Extent::UntilEnd { epochs: 1 }, &Arc::default())?)
}

#[test]
fn partitions_take_strict_turns_and_every_epoch_is_the_same() {
    let cluster = cluster(TOPIC, 3);
    let lengths = [40, 7, 25];
    for partition in [2usize, 0, 1] {
        let payloads = (0..lengths[partition])
            .map(|number| (partition as i32, document(&format!("{partition}/{number}"))));
        produce(&cluster.bootstrap_servers(), TOPIC, payloads);
    }
    let once: Vec<String> = (0..40)
        .flat_map(|number| (0..3).filter(move |&p| number < lengths[p]).map(move |p| format!("{p}/{number}")))
        .collect();
    assert_eq!(read_all(&cluster).unwrap(), once);

    let mut stream = open(&cluster, Extent::UntilEnd { epochs: 3 }, &Arc::default()).unwrap();
    assert_eq!(drain(&mut stream).unwrap(), [once.clone(), once.clone(), once].concat());
    let position = stream.position();
    assert_eq!((position.epoch, position.documents), (3, 216));
    let offsets = position.partitions.iter().map(|(&partition, at)| (partition, at.next_offset));
    assert_eq!(offsets.collect::<Vec<_>>(), [(0, 40), (1, 7), (2, 25)]);
    assert_eq!(stream.reference_model(), Some(model()));
}

#[test]
fn more_than_the_buffers_hold_arrives_whole() {
    let cluster = cluster(TOPIC, 2);
    let tokens: Vec<u32> = (0..40_000).map(|token| token % 10).collect();
    let documents: Vec<_> = (0..40)
        .map(|n| scored(tokenized(&format!("d{n}"), "s", &tokens, tokenizer()), 1.0, model()))
        .collect();
    produce_scored(&cluster, TOPIC, 2, &documents);
    // 1.6M tokens wait in a queue of 1M, so the reader must stop and go on.
    let expected: Vec<String> = (0..40).map(|n| format!("d{n}")).collect();
    let mut stream = open(&cluster, Extent::UntilEnd { epochs: 1 }, &Arc::default()).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(drain(&mut stream).unwrap(), expected);
}

#[test]
fn a_followed_topic_waits_for_the_partition_whose_turn_it_is() {
    let cluster = cluster(TOPIC, 2);
    let stop = Arc::new(AtomicBool::new(false));
    produce(&cluster.bootstrap_servers(), TOPIC, [(1, document("1/0")), (1, document("1/1"))]);
    let mut stream = open(&cluster, Extent::Follow, &stop).unwrap();
    let servers = cluster.bootstrap_servers();
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(700));
        produce(&servers, TOPIC, [(0, document("0/0"))]);
    });
    let started = Instant::now();
    assert_eq!(stream.next_document().unwrap().unwrap().id(), "0/0");
    assert!(started.elapsed() > Duration::from_millis(500), "partition 1 was ready, but it was not its turn");
    assert_eq!(stream.next_document().unwrap().unwrap().id(), "1/0");
    late.join().unwrap();
    stop.store(true, Ordering::Relaxed);
    assert_eq!(stream.next_document().unwrap(), None);
}

#[test]
fn a_refused_record_is_named_with_its_place() {
    let foreign = scored(tokenized("d", "s", &[1, 2], Fingerprint::of_bytes(b"other")), 1.0, model());
    let beyond = scored(tokenized("d", "s", &[1, 10], tokenizer()), 1.0, model());
    let other_model = scored(tokenized("d", "s", &[1, 2], tokenizer()), 1.0, Fingerprint::of_bytes(b"later"));
    let mut elsewhere = scored(tokenized("d", "s", &[1, 2], tokenizer()), 1.0, model());
    elsewhere.context.window = 128;
    elsewhere.context.stride = 64;
    let mut cut = document("d");
    cut.truncate(cut.len() - 1);
    let both = format!("by tokenizer {}, and this one is {}", Fingerprint::of_bytes(b"other"), tokenizer());
    for (payload, expected) in [
        (foreign.encode().to_vec(), both.as_str()),
        (beyond.encode().to_vec(), "token id 10 at position 1 is beyond the vocabulary of 10"),
        (other_model.encode().to_vec(), "was scored by reference model"),
        (elsewhere.encode().to_vec(), "in windows of 128 tokens every 64"),
        (cut, "not a valid record"),
        (vec![], "no payload"),
    ] {
        let cluster = cluster(TOPIC, 2);
        produce(&cluster.bootstrap_servers(), TOPIC, [(0, document("good")), (1, payload)]);
        let error = read_all(&cluster).unwrap_err();
        let shown = error.to_string();
        assert!(shown.contains("topic \"scored\", partition 1, offset 0"), "{shown}");
        assert!(shown.contains(expected), "{shown}");
        assert_eq!(exit_code(&error.into()), 65);
    }
}

#[test]
fn a_stream_can_be_left_at_any_moment() {
    let cluster = cluster(TOPIC, 3);
    produce(&cluster.bootstrap_servers(), TOPIC, (0..90).map(|n| (n % 3, document(&n.to_string()))));
    for taken in 0..60 {
        let mut stream = open(&cluster, Extent::UntilEnd { epochs: 2 }, &Arc::default()).unwrap();
        for _ in 0..3 * taken {
            assert!(stream.next_document().unwrap().is_some());
        }
    }
}

#[test]
fn an_empty_topic_is_said_to_be_empty() {
    let error = read_all(&cluster(TOPIC, 2)).unwrap_err();
    assert!(matches!(error, StreamError::EmptyTopic(_)), "{error}");
}

#[test]
fn a_broker_that_is_down_is_named_in_time() {
    let broker = Broker::new("127.0.0.1:1".to_owned(), vec![]).unwrap();
    let decoder = Decoder::new(TopicKind::Scored, tokenizer(), 10);
    let started = Instant::now();
    let error = KafkaStream::open(broker, TOPIC, Extent::Follow, decoder, Arc::default()).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(15));
    let shown = error.to_string();
    assert!(shown.contains("127.0.0.1:1") && shown.contains("Connection refused"), "{shown}");
    assert_eq!(exit_code(&error.into()), 69);
}

#[test]
fn a_topic_of_the_other_kind_is_said_to_be_one() {
    let plain = tokenized("d", "s", &[1, 2, 3], tokenizer()).encode().to_vec();
    for (said, payload, read, expected) in [
        (
            TOKENIZED_DOCUMENT,
            plain.clone(),
            TopicKind::Scored,
            Err("a topic of tokenized documents; `run` wants"),
        ),
        (
            SCORED_DOCUMENT,
            document("d"),
            TopicKind::Documents,
            Err("a topic of scored documents; `reference` wants"),
        ),
        (TOKENIZED_DOCUMENT, plain, TopicKind::Documents, Ok(())),
        (SCORED_DOCUMENT, document("d"), TopicKind::Scored, Ok(())),
    ] {
        let cluster = cluster(TOPIC, 1);
        produce_as(&cluster.bootstrap_servers(), TOPIC, Some(said), [(0, payload)]);
        let broker = Broker::new(cluster.bootstrap_servers(), vec![]).unwrap();
        let decoder = Decoder::new(read, tokenizer(), 10);
        let extent = Extent::UntilEnd { epochs: 1 };
        let mut stream = KafkaStream::open(broker, TOPIC, extent, decoder, Arc::default()).unwrap();
        match (drain(&mut stream), expected) {
            (Ok(ids), Ok(())) => assert_eq!(ids, ["d"]),
            (Err(error), Err(expected)) => {
                let shown = error.to_string();
                assert!(shown.contains(expected) && shown.contains("partition 0, offset 0"), "{shown}");
                assert_eq!(exit_code(&error.into()), 65);
            }
            (found, _) => panic!("{said} read as {read:?}: {found:?}"),
        }
    }
}

#[test]
fn a_topic_that_is_not_there_is_unavailable() {
    let cluster = cluster(TOPIC, 1);
    let unknown = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    cluster.topic_error(TOPIC, unknown).unwrap();
    let error = open(&cluster, Extent::Follow, &Arc::default()).unwrap_err();
    assert!(matches!(error, StreamError::NoSuchTopic { .. }), "{error}");
    assert_eq!(exit_code(&error.into()), 69);
}

#[test]
fn a_property_that_librdkafka_refuses_is_named_without_its_value() {
    for (key, expected) in
        [("sasl.passwrd", "is unknown"), ("ssl.endpoint.identification.algorithm", "not accepted")]
    {
        let Err(error) = Broker::new("b:1".to_owned(), vec![(key.to_owned(), "hunter2".to_owned())]) else {
            panic!("{key} is refused")
        };
        let error = anyhow::Error::from(error);
        let shown = format!("{error:#} {error:?}");
        assert!(shown.contains(key) && shown.contains(expected) && !shown.contains("hunter2"), "{shown}");
        assert_eq!(exit_code(&error), 64);
    }
}

#[test]
fn settings_that_offsets_rest_on_are_refused() {
    for key in PROPERTIES_OWNED {
        let Err(error) = Broker::new("b:1".to_owned(), vec![(key.to_owned(), "x".to_owned())]) else {
            panic!("{key} is refused")
        };
        assert!(error.to_string().contains(key));
        assert_eq!(exit_code(&error.into()), 64);
    }
}
