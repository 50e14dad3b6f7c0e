//! The stream against librdkafka's mock cluster: order, ends, and refusals.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdkafka::types::RDKafkaRespErr;
use sluice_feed::stream::{
    Broker, Decoder, DocumentStream, Extent, KafkaStream, Next, PROPERTIES_OWNED, Position, Shard, Start,
    StreamError, TopicKind, first_context,
};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::names::{SCORED_DOCUMENT, TOKENIZED_DOCUMENT};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_trainer::failure::exit_code;
use support::{
    Cluster, cluster, produce, produce_as, produce_scored, produce_with_tombstones, scored, tokenized,
};

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
    open_with(broker, extent, decoder, Arc::clone(stop))
}

fn open_with(
    broker: Broker,
    extent: Extent,
    decoder: Decoder,
    stop: Arc<AtomicBool>,
) -> Result<KafkaStream, StreamError> {
    KafkaStream::open(broker, TOPIC, extent, Start::whole(), decoder, stop)
}

/// The id of a lane's next document; `None` at its end, or where the stream was asked to stop.
fn next(stream: &mut KafkaStream, lane: usize) -> Result<Option<String>, StreamError> {
    Ok(match stream.next_document(lane)? {
        Next::Document(document) => Some(document.id().to_owned()),
        Next::Ended | Next::Stopped => None,
    })
}

/// All of a stream, one lane after the other.
fn drain(stream: &mut KafkaStream) -> Result<Vec<String>, StreamError> {
    let mut ids = Vec::new();
    for lane in 0..stream.lanes() {
        while let Some(id) = next(stream, lane)? {
            ids.push(id);
        }
    }
    Ok(ids)
}

fn read_all(cluster: &Cluster) -> Result<Vec<String>, StreamError> {
    drain(&mut open(cluster, Extent::UntilEnd { epochs: 1 }, &Arc::default())?)
}

#[test]
fn every_lane_has_its_partitions_order_pass_after_pass() {
    let cluster = cluster(TOPIC, 3);
    let lengths = [40, 7, 25];
    for partition in [2usize, 0, 1] {
        let payloads = (0..lengths[partition])
            .map(|number| (partition as i32, document(&format!("{partition}/{number}"))));
        produce(&cluster.bootstrap_servers(), TOPIC, payloads);
    }
    let once = |lane: usize| (0..lengths[lane]).map(move |number| format!("{lane}/{number}"));
    assert_eq!(read_all(&cluster).unwrap(), (0..3).flat_map(once).collect::<Vec<_>>());

    let mut stream = open(&cluster, Extent::UntilEnd { epochs: 3 }, &Arc::default()).unwrap();
    let thrice = |lane| (0..3).flat_map(move |_| once(lane));
    assert_eq!(drain(&mut stream).unwrap(), (0..3).flat_map(thrice).collect::<Vec<_>>());
    for (lane, length) in lengths.into_iter().enumerate() {
        let Position { epoch, next_offset, documents, .. } = stream.position(lane);
        let length = length as u64;
        assert_eq!((epoch, next_offset as u64, documents), (3, length, 3 * length));
    }
}

#[test]
fn a_lane_goes_on_where_it_was_left_whatever_is_between_its_documents() {
    let cluster = cluster(TOPIC, 2);
    let servers = cluster.bootstrap_servers();
    // Tombstones hold no document, and take no turn.
    let records = (0..30).map(|n| (n % 2, (n % 5 != 1).then(|| document(&n.to_string()))));
    produce_with_tombstones(&servers, TOPIC, None, records);
    let tombstones: Vec<i32> = (0..30).filter(|n| n % 5 == 1).collect();
    let open = |places: &BTreeMap<usize, Position>| {
        let broker = Broker::new(cluster.bootstrap_servers(), vec![]).unwrap();
        let decoder = Decoder::new(TopicKind::Scored, tokenizer(), 10);
        let extent = Extent::UntilEnd { epochs: 2 };
        let start = Start { places: places.clone(), ..Start::whole() };
        KafkaStream::open(broker, TOPIC, extent, start, decoder, Arc::default()).unwrap()
    };
    let expected = |lane: i32| -> Vec<String> {
        let pass = (0..30).filter(|n| n % 2 == lane && !tombstones.contains(n)).map(|n| n.to_string());
        pass.clone().chain(pass).collect()
    };
    for taken in 0..24 {
        let mut stream = open(&BTreeMap::new());
        let mut found = [vec![], vec![]];
        for (lane, found) in found.iter_mut().enumerate() {
            for _ in 0..taken + lane {
                found.extend(next(&mut stream, lane).unwrap());
            }
        }
        let places = (0..2).map(|lane| (lane, stream.position(lane))).collect();
        let mut resumed = open(&places);
        for (lane, found) in found.iter_mut().enumerate() {
            found.extend(std::iter::from_fn(|| next(&mut resumed, lane).unwrap()));
            assert_eq!(*found, expected(lane as i32), "lane {lane}, left after {}", taken + lane);
        }
    }
}

#[test]
fn ranks_read_the_partitions_that_are_dealt_to_them() {
    let cluster = cluster(TOPIC, 4);
    produce(&cluster.bootstrap_servers(), TOPIC, (0..40).map(|n| (n % 4, document(&n.to_string()))));
    let mut all = Vec::new();
    for rank in 0..2 {
        let broker = Broker::new(cluster.bootstrap_servers(), vec![]).unwrap();
        let decoder = Decoder::new(TopicKind::Scored, tokenizer(), 10);
        let start = Start::of(Shard::new(rank, 2).unwrap());
        let extent = Extent::UntilEnd { epochs: 1 };
        let mut stream = KafkaStream::open(broker, TOPIC, extent, start, decoder, Arc::default()).unwrap();
        assert_eq!(stream.lanes(), 4);
        for lane in [rank, rank + 2] {
            all.extend(std::iter::from_fn(|| next(&mut stream, lane).unwrap()));
        }
    }
    all.sort_by_key(|id| id.parse::<u32>().unwrap());
    assert_eq!(all, (0..40).map(|n| n.to_string()).collect::<Vec<_>>());
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
    let expected: Vec<String> =
        (0..40).step_by(2).chain((1..40).step_by(2)).map(|n| format!("d{n}")).collect();
    let mut stream = open(&cluster, Extent::UntilEnd { epochs: 1 }, &Arc::default()).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(drain(&mut stream).unwrap(), expected);
}

#[test]
fn a_followed_lane_waits_for_its_partition() {
    let cluster = cluster(TOPIC, 2);
    let stop = Arc::new(AtomicBool::new(false));
    produce(&cluster.bootstrap_servers(), TOPIC, [(1, document("1/0")), (1, document("1/1"))]);
    let mut stream = open(&cluster, Extent::Follow, &stop).unwrap();
    assert_eq!(next(&mut stream, 1).unwrap().unwrap(), "1/0", "another partition does not hold it up");
    let servers = cluster.bootstrap_servers();
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(700));
        produce(&servers, TOPIC, [(0, document("0/0"))]);
    });
    let started = Instant::now();
    assert_eq!(next(&mut stream, 0).unwrap().unwrap(), "0/0");
    assert!(started.elapsed() > Duration::from_millis(500));
    late.join().unwrap();
    stop.store(true, Ordering::Relaxed);
    assert_eq!(stream.next_document(1).unwrap(), Next::Stopped);
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
    // Contexts that cannot be, or that nobody means, for a document that is longer than a window.
    let within = |window, stride, bos| {
        let mut record = scored(tokenized("d", "s", &[1; 200], tokenizer()), 1.0, model());
        record.context = ContextPolicy { window, stride, bos };
        record.encode().to_vec()
    };
    // The first of its lane is refused for itself, whatever others have shown.
    let mut with_bos = scored(tokenized("d", "s", &[1, 2], tokenizer()), 1.0, model());
    with_bos.context.bos = Bos::Document(10);
    let both = format!("by tokenizer {}, and this one is {}", Fingerprint::of_bytes(b"other"), tokenizer());
    for (payload, expected) in [
        (foreign.encode().to_vec(), both.as_str()),
        (beyond.encode().to_vec(), "token id 10 at position 1 is beyond the vocabulary of 10"),
        (other_model.encode().to_vec(), "was scored by reference model"),
        (elsewhere.encode().to_vec(), "in windows of 128 tokens every 64"),
        (within(128, 0, Bos::None), "in windows of 128 every 0, which would leave some out"),
        (within(128, 128, Bos::None), "in windows of 128 every 128, which would leave some out"),
        (within(128, 127, Bos::Window(1)), "in windows of 128 every 127, which would leave some out"),
        (within(128, 1, Bos::None), "each of its tokens would be read 128 times over"),
        (with_bos.encode().to_vec(), "BOS token 10 before it, which is beyond the vocabulary of 10"),
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
fn a_document_that_sequences_cannot_hold_in_its_contexts_is_refused_where_that_is_asked_for() {
    let record = |length: usize| {
        let mut record =
            scored(tokenized(&length.to_string(), "s", &vec![1; length], tokenizer()), 1.0, model());
        record.context = ContextPolicy { window: 64, stride: 32, bos: Bos::None };
        record.encode().to_vec()
    };
    let cluster = cluster(TOPIC, 1);
    // The last is longer than a sequence of 32, the others fit one, or are cut as the reference cut them in one of 64.
    produce(&cluster.bootstrap_servers(), TOPIC, [32, 31, 200].map(|length| (0, record(length))));
    let read = |sequence| {
        let broker = Broker::new(cluster.bootstrap_servers(), vec![]).unwrap();
        let decoder = Decoder::new(TopicKind::Scored, tokenizer(), 10).refusing_unequal_contexts(sequence);
        drain(&mut open_with(broker, Extent::UntilEnd { epochs: 1 }, decoder, Arc::default()).unwrap())
    };
    assert_eq!(read(64).unwrap(), ["32", "31", "200"]);
    let error = read(32).unwrap_err();
    let shown = error.to_string();
    assert!(shown.contains("offset 2") && shown.contains("give sequences of 64"), "{shown}");
    assert_eq!(exit_code(&error.into()), 64);
}

#[test]
fn the_first_context_is_that_of_the_first_partition_that_has_a_document() {
    let within = |window: u32| {
        let mut record = scored(tokenized("d", "s", &[1, 2, 3], tokenizer()), 1.0, model());
        record.context.window = window;
        record.encode().to_vec()
    };
    let cluster = cluster(TOPIC, 4);
    let servers = cluster.bootstrap_servers();
    let decoder = Decoder::new(TopicKind::Scored, tokenizer(), 10);
    let stop = Arc::new(AtomicBool::new(false));
    let first = |extent| {
        let broker = Broker::new(servers.clone(), vec![]).unwrap();
        first_context(&broker, TOPIC, extent, &decoder, &stop)
            .map(|context| context.map(|context| context.window))
    };
    let bounded = Extent::UntilEnd { epochs: 1 };
    assert_eq!(first(bounded).unwrap(), None, "there is none");
    // A tombstone is no document, and an empty partition holds up no answer.
    produce_with_tombstones(&servers, TOPIC, None, [(1, None)]);
    assert_eq!(first(bounded).unwrap(), None);
    let late = std::thread::spawn({
        let (servers, record) = (servers.clone(), within(64));
        move || {
            std::thread::sleep(Duration::from_millis(500));
            produce(&servers, TOPIC, [(3, record)]);
        }
    });
    assert_eq!(first(Extent::Follow).unwrap(), Some(64), "it waits where the topic is followed");
    late.join().unwrap();
    produce(&servers, TOPIC, [(2, within(128))]);
    for extent in [bounded, Extent::Follow] {
        assert_eq!(first(extent).unwrap(), Some(128), "of partition 2, whichever answers first");
    }
    produce(&servers, TOPIC, [(1, vec![1, 2, 3])]);
    let error = first(bounded).unwrap_err().to_string();
    assert!(error.contains("partition 1, offset 1"), "{error}");
}

#[test]
fn a_request_to_stop_ends_the_wait_for_the_first_context() {
    let cluster = cluster(TOPIC, 2);
    let broker = Broker::new(cluster.bootstrap_servers(), vec![]).unwrap();
    let decoder = Decoder::new(TopicKind::Scored, tokenizer(), 10);
    let stop = Arc::new(AtomicBool::new(false));
    let later = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            std::thread::sleep(Duration::from_millis(300));
            stop.store(true, Ordering::Relaxed);
        }
    });
    assert_eq!(first_context(&broker, TOPIC, Extent::Follow, &decoder, &stop).unwrap(), None);
    later.join().unwrap();
}

#[test]
fn a_stream_can_be_left_at_any_moment_also_with_an_error_ahead() {
    // More documents than any queue holds: the reader meets the bad record with all of them before it, or waits for room.
    for good in [30, 1124, 3000] {
        let cluster = cluster(TOPIC, 3);
        let bad = (0, vec![1, 2, 3]);
        let payloads = (0..good).map(|n| (n % 3, document(&n.to_string()))).chain([bad]);
        produce(&cluster.bootstrap_servers(), TOPIC, payloads);
        for taken in [0, 1, 7, 10] {
            let mut stream = open(&cluster, Extent::UntilEnd { epochs: 2 }, &Arc::default()).unwrap();
            for lane in 0..3 {
                (0..taken).for_each(|_| assert!(next(&mut stream, lane).unwrap().is_some()));
            }
            std::thread::sleep(Duration::from_millis(100));
            let (done, left) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                drop(stream);
                let _ = done.send(());
            });
            left.recv_timeout(Duration::from_secs(30)).expect("a stream that is left ends");
        }
    }
}

#[test]
fn an_error_ahead_is_met_in_its_place() {
    let cluster = cluster(TOPIC, 2);
    let payloads = (0..2000).map(|n| (n % 2, document(&n.to_string()))).chain([(1, vec![1, 2, 3])]);
    produce(&cluster.bootstrap_servers(), TOPIC, payloads);
    let mut stream = open(&cluster, Extent::UntilEnd { epochs: 1 }, &Arc::default()).unwrap();
    for lane in [1, 0] {
        (0..1000).for_each(|_| assert!(next(&mut stream, lane).unwrap().is_some()));
    }
    assert_eq!(stream.next_document(0).unwrap(), Next::Ended);
    let error = next(&mut stream, 1).unwrap_err().to_string();
    assert!(error.contains("partition 1, offset 1000"), "{error}");
    assert_eq!(stream.position(1).next_offset, 1000, "what was refused has not been read");
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
    let error = open_with(broker, Extent::Follow, decoder, Arc::default()).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(15));
    let shown = error.to_string();
    assert!(shown.contains("127.0.0.1:1") && shown.contains("Connection refused"), "{shown}");
    assert_eq!(exit_code(&error.into()), 69);
}

#[test]
fn a_topic_of_the_other_kind_is_said_to_be_one() {
    let plain = tokenized("d", "s", &[1, 2, 3], tokenizer()).encode().to_vec();
    for (said, payload, read, expected) in [
        (TOKENIZED_DOCUMENT, plain.clone(), TopicKind::Scored, Err("this is a topic of tokenized documents")),
        (SCORED_DOCUMENT, document("d"), TopicKind::Documents, Err("this is a topic of scored documents")),
        (TOKENIZED_DOCUMENT, plain, TopicKind::Documents, Ok(())),
        (SCORED_DOCUMENT, document("d"), TopicKind::Scored, Ok(())),
    ] {
        let cluster = cluster(TOPIC, 1);
        produce_as(&cluster.bootstrap_servers(), TOPIC, Some(said), [(0, payload)]);
        let broker = Broker::new(cluster.bootstrap_servers(), vec![]).unwrap();
        let decoder = Decoder::new(read, tokenizer(), 10);
        let extent = Extent::UntilEnd { epochs: 1 };
        let mut stream = open_with(broker, extent, decoder, Arc::default()).unwrap();
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
