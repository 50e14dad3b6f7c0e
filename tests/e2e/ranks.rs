//! The order of micro-batches on a real Kafka: the same for any number of ranks, and after any kill.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer};
use sluice_feed::feed::{Alone, Feed, Step};
use sluice_feed::observer::Observer;
use sluice_feed::pack::{BatchShape, Packing};
use sluice_feed::plan::Plan;
use sluice_feed::stream::{
    Broker, Decoder, DocumentStream as _, Extent, KafkaStream, Next, Shard, Start, TopicKind,
};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Losses, Precision, ScoredDocument, TokenIds, TokenizedDocument,
};
use sluice_schemas::windows::windows;
use sluice_tests::ranks::{Kill, Line, Settings, last_whole_checkpoint, run, run_apart};
use sluice_tests::{Kafka, produce};
use tempfile::TempDir;

const TOPIC: &str = "scored";
const EPOCHS: usize = 2;
const ROWS: usize = 2;
const ROW: usize = 64;
const VOCABULARY: u32 = 1000;
const CALL: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_mins(1);
/// Far more than a rank needs to see that the hub is gone, and far less than it waits for one that is there.
const END_MAX: Duration = Duration::from_secs(20);
const SIGKILL: i32 = 9;

/// Documents of each partition; each is a lane.
const DOCUMENTS: [usize; 8] = [150, 0, 30, 90, 12, 60, 3, 45];
/// Transactions that they are written in, each followed by one that is aborted.
const TRANSACTIONS: usize = 5;

/// A reference model whose windows are shorter than a row.
const SHORT: (&str, ContextPolicy) = ("short", ContextPolicy { window: 48, stride: 24, bos: Bos::None });
/// One whose windows are longer than a row.
const LONG: (&str, ContextPolicy) = ("long", ContextPolicy { window: 96, stride: 48, bos: Bos::Document(7) });

fn tokenizer() -> Fingerprint {
    Fingerprint::of_bytes(b"tokenizer")
}

/// A broker with the topic that all tests of this file read.
struct Fixture {
    kafka: Kafka,
    _data: TempDir,
    /// Pieces of each document.
    pieces: BTreeMap<String, usize>,
}

impl Fixture {
    /// The one that another test has started, if it still runs.
    fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Fixture>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let fixture = Arc::new(Self::start());
            *shared = Arc::downgrade(&fixture);
            fixture
        })
    }

    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let kafka = Kafka::start(&data.path().join("kafka"));
        kafka.create_topic(TOPIC, DOCUMENTS.len() as i32);
        let pieces = write_topic(&kafka.bootstrap_servers);
        Self { kafka, _data: data, pieces }
    }

    fn settings(&self, state: &Path) -> Settings {
        let models = [SHORT, LONG].map(|(model, _)| Fingerprint::of_bytes(model.as_bytes()).to_string());
        let flags = [
            ("--topic", TOPIC.to_owned()),
            ("--rows", ROWS.to_string()),
            ("--len", ROW.to_string()),
            ("--micro-batches", "8".to_owned()),
            ("--shuffle-buffer", "40".to_owned()),
            ("--seed", "1".to_owned()),
            ("--epochs", EPOCHS.to_string()),
            ("--checkpoint-every", "3".to_owned()),
            ("--tokenizer-fingerprint", tokenizer().to_string()),
            ("--vocabulary", VOCABULARY.to_string()),
            ("--allow-reference-models", models.join(",")),
        ];
        Settings {
            bootstrap_servers: self.kafka.bootstrap_servers.clone(),
            state: state.to_owned(),
            flags: flags.into(),
        }
    }

    /// How often each document's pieces are read in all passes.
    fn reads(&self) -> BTreeMap<String, usize> {
        self.pieces.iter().map(|(id, pieces)| (id.clone(), pieces * EPOCHS)).collect()
    }
}

/// Fills the topic and gives the number of pieces that each document comes to, of those that come to any.
fn write_topic(bootstrap_servers: &str) -> BTreeMap<String, usize> {
    let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", bootstrap_servers)
        .set("transactional.id", "writer")
        .create()
        .unwrap();
    let send = |partition: usize, id: &str, payload: Option<&Bytes>| {
        let mut record = BaseRecord::<str, [u8]>::to(TOPIC).key(id).partition(partition as i32);
        if let Some(payload) = payload {
            record = record.payload(payload);
        }
        producer.send(record).map_err(|(error, _)| error).unwrap();
    };
    let mut random = fastrand::Rng::with_seed(8);
    let mut pieces = BTreeMap::new();
    producer.init_transactions(CALL).unwrap();
    for transaction in 0..TRANSACTIONS {
        producer.begin_transaction().unwrap();
        for (partition, documents) in DOCUMENTS.into_iter().enumerate() {
            for number in (0..documents).filter(|number| number * TRANSACTIONS / documents == transaction) {
                let document = document(&mut random, partition, format!("{partition}/{number}"));
                let count = pieces_of(&document);
                if count > 0 {
                    pieces.insert(document.document.id.clone(), count);
                }
                send(partition, &document.document.id, Some(&document.encode()));
            }
            if documents > 0 && partition % 3 == transaction % 3 {
                send(partition, "a tombstone", None);
            }
        }
        producer.commit_transaction(CALL).unwrap();

        producer.begin_transaction().unwrap();
        for partition in
            (0..DOCUMENTS.len()).filter(|&partition| DOCUMENTS[partition] > 0 && partition % 2 == 0)
        {
            for number in 0..3 {
                let id = format!("aborted/{partition}/{transaction}/{number}");
                let document = document(&mut random, partition, id);
                send(partition, &document.document.id, Some(&document.encode()));
            }
        }
        // So that they are in the topic, and not dropped here.
        producer.flush(CALL).unwrap();
        producer.abort_transaction(CALL).unwrap();
    }
    pieces
}

/// A document of any length, often longer than a row or a window. Some partitions hold documents of one model alone.
fn document(random: &mut fastrand::Rng, partition: usize, id: String) -> ScoredDocument {
    let (model, context) = match partition {
        5 => SHORT,
        6 => LONG,
        _ => random.choice([SHORT, LONG]).unwrap(),
    };
    let length = match random.u8(0..10) {
        0 => random.usize(1..4),
        1..=6 => random.usize(2..50),
        7 | 8 => random.usize(50..110),
        _ => random.usize(110..260),
    };
    scored(random, id, length, model, context)
}

fn scored(
    random: &mut fastrand::Rng,
    id: String,
    length: usize,
    model: &str,
    context: ContextPolicy,
) -> ScoredDocument {
    let tokens: Vec<u32> = (0..length).map(|_| random.u32(0..VOCABULARY)).collect();
    let mut values = || {
        let mut values: Vec<f32> = (0..length).map(|_| random.f32() * 12.0).collect();
        values[0] = if context.bos == Bos::None { f32::NAN } else { values[0] };
        Losses::new(&values, LossFormat::F16).unwrap()
    };
    let (reference_losses, entropies) = (values(), values());
    ScoredDocument {
        document: TokenizedDocument {
            id,
            tokens: TokenIds::new(&tokens),
            tokenizer: tokenizer(),
            source: String::new(),
            attributes: BTreeMap::new(),
        },
        reference_losses,
        reference_entropies: random.bool().then_some(entropies),
        reference_model: Fingerprint::of_bytes(model.as_bytes()),
        context,
        precision: Precision::F32,
    }
}

/// The windows of the reference where they fit a row, and windows of a row's length where they do not.
fn pieces_of(document: &ScoredDocument) -> usize {
    let tokens = document.document.tokens.to_vec();
    let ContextPolicy { window, stride, bos } = document.context;
    let row = ROW as u32;
    let places = tokens.len() + usize::from(bos != Bos::None);
    let context = if window > row && places > ROW {
        ContextPolicy { window: row, stride: stride * row / window, bos }
    } else {
        document.context
    };
    windows(&tokens, context).len()
}

/// Micro-batches by step and number.
type Steps = BTreeMap<(u64, u64), Line>;

/// Adds what ranks have printed; a micro-batch that is there already is one too many.
fn add<'a>(steps: &mut Steps, lines: impl Iterator<Item = &'a Line>) {
    for line in lines {
        let Some(number) = line.number else { continue };
        let earlier = steps.insert((line.step, number), line.clone());
        assert_eq!(earlier, None, "given out twice: {line:?}");
    }
}

fn steps_of<'a>(lines: impl Iterator<Item = &'a Line>) -> Steps {
    let mut steps = Steps::new();
    add(&mut steps, lines);
    steps
}

fn assert_same(found: &Steps, wanted: &Steps, what: &str) {
    let places = found.keys().chain(wanted.keys());
    if let Some(place) = places.filter(|place| found.get(place) != wanted.get(place)).min() {
        panic!("{what}: (step, number) {place:?} is\n{:?}, not\n{:?}", found.get(place), wanted.get(place));
    }
}

fn reads(steps: &Steps) -> BTreeMap<String, usize> {
    let mut reads = BTreeMap::new();
    for id in steps.values().flat_map(|line| &line.documents) {
        *reads.entry(id.clone()).or_default() += 1;
    }
    reads
}

/// Micro-batches of each step of a rank, those without tokens included.
fn sizes(lines: &[Line]) -> BTreeMap<u64, usize> {
    let mut sizes = BTreeMap::new();
    for line in lines {
        *sizes.entry(line.step).or_default() += 1;
    }
    sizes
}

#[test]
fn the_order_is_the_same_on_any_number_of_ranks() {
    let fixture = Fixture::shared();
    let state = tempfile::tempdir().unwrap();
    let settings = fixture.settings(state.path());
    let reference = run(&settings, 1, None, None).well();
    let wanted = steps_of(reference.lines());
    assert!(wanted.last_key_value().unwrap().0.0 > 30, "there are many steps");
    assert_eq!(reads(&wanted), fixture.reads(), "every piece of every pass, and nothing that was aborted");
    for world_size in [2, 4, 8] {
        let ended = run(&settings, world_size, None, None).well();
        assert_same(&steps_of(ended.lines()), &wanted, &format!("{world_size} ranks"));
        let first = sizes(&ended.ranks[0].lines);
        assert!(ended.ranks.iter().all(|end| sizes(&end.lines) == first), "no rank has one more in any step");
    }
}

#[test]
fn ranks_killed_at_any_step_go_on_as_another_number_of_ranks() {
    let fixture = Fixture::shared();
    let mut resumed = 0;
    for seed in 0..20 {
        resumed += usize::from(killed(&fixture, seed));
    }
    assert!(resumed >= 10, "most were killed after a checkpoint: {resumed}");
}

/// Whether there was a checkpoint to go on from.
fn killed(fixture: &Fixture, seed: u64) -> bool {
    let mut random = fastrand::Rng::with_seed(seed);
    let [state, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let settings = fixture.settings(state.path()).with("--seed", &seed);
    let undisturbed = Settings { state: other.path().to_owned(), ..settings.clone() };
    let reference = run(&undisturbed.with("--checkpoint-every", &u64::MAX), 1, None, None).well();
    let wanted = steps_of(reference.lines());
    let (last_step, _) = *wanted.last_key_value().unwrap().0;

    let mut found = Steps::new();
    let mut from = None;
    for _ in 0..if seed.is_multiple_of(5) { 2 } else { 1 } {
        // Every step has a round at least, and so has the end: no rank comes to it.
        let left = (last_step - from.unwrap_or(0)) as usize;
        if left < 3 {
            break;
        }
        let is_one_first = seed % 2 == 1;
        let world_size = 1 << random.usize(usize::from(is_one_first)..=3);
        let kill = Kill {
            round: random.usize(1..left),
            answers: random.usize(1..=world_size),
            delay: Duration::from_micros(random.u64(0..5000)),
            rank: is_one_first.then(|| random.usize(0..world_size)),
        };
        let what = format!("seed {seed}, {world_size} ranks from {from:?}, {kill:?}");
        let ended = run(&settings, world_size, from, Some(kill));
        for (rank, end) in ended.ranks.iter().enumerate() {
            if kill.rank.is_none_or(|killed| killed == rank) {
                assert_eq!(end.status.signal(), Some(SIGKILL), "{what}, rank {rank}: {}", end.message);
            } else {
                assert_eq!(end.status.code(), Some(1), "{what}, rank {rank}: {}", end.message);
                assert!(end.message.contains("could not agree on a step"), "{what}: {}", end.message);
            }
        }
        assert!(ended.since_kill.unwrap() < END_MAX, "{what}: the others waited for {:?}", ended.since_kill);
        let printed = steps_of(ended.lines());
        assert!(
            printed.iter().all(|(place, line)| wanted[place] == *line),
            "{what}: what came before the kill"
        );
        let before = from;
        from = last_whole_checkpoint(state.path());
        assert!(from >= before, "{what}");
        let until = from.unwrap_or(0);
        add(&mut found, ended.lines().filter(|line| line.step <= until));
    }
    let world_size = 1 << random.usize(0..=3);
    let ended = run(&settings, world_size, from, None).well();
    add(&mut found, ended.lines());
    assert_same(&found, &wanted, &format!("seed {seed}, {world_size} ranks from {from:?}"));
    assert_eq!(reads(&found), fixture.reads(), "seed {seed}");
    from.is_some()
}

#[test]
fn what_cannot_be_dealt_to_ranks_or_gone_on_with_is_refused_by_name() {
    let fixture = Fixture::shared();
    let state = tempfile::tempdir().unwrap();
    let settings = fixture.settings(state.path());
    let ended = run(&settings.with("--steps", &3), 2, None, None).well();
    assert_eq!(ended.lines().map(|line| line.step).max(), Some(3));
    let few = settings.with("--micro-batches", &6);
    let (seed, len) = (settings.with("--seed", &9), settings.with("--len", &32));
    for (settings, rank, resume_from, words) in [
        (&settings, (0, 3), None, "use 1, 2, 4 or 8 ranks"),
        (&few, (3, 4), None, "6 micro-batches a step are not a multiple of 4 ranks"),
        (&settings, (2, 3), Some(3), "use 1, 2, 4 or 8 ranks"),
        (&seed, (0, 1), Some(3), "the seed differs"),
        (&len, (1, 2), Some(3), "the sequence length differs"),
    ] {
        let end = run_apart(settings, rank, resume_from);
        assert_eq!(end.status.code(), Some(64), "{}", end.message);
        assert!(end.message.contains(words), "{}", end.message);
        assert_eq!(end.lines, []);
    }
}

#[test]
fn reference_models_that_no_rank_sees_together_are_refused_all_the_same() {
    let fixture = Fixture::shared();
    let topic = "two-models";
    fixture.kafka.create_topic(topic, 2);
    let mut settings = ClientConfig::new();
    settings.set("bootstrap.servers", &fixture.kafka.bootstrap_servers);
    let producer: ThreadedProducer<DefaultProducerContext> = settings.create().unwrap();
    let mut random = fastrand::Rng::with_seed(3);
    for (partition, (model, context)) in (0..).zip([SHORT, LONG]) {
        let payload = scored(&mut random, "d".to_owned(), 30, model, context).encode();
        let record = BaseRecord::to(topic).key("d").partition(partition).payload(&payload[..]);
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(CALL).unwrap();

    let state = tempfile::tempdir().unwrap();
    let allowing = fixture.settings(state.path()).with("--topic", &topic);
    let mut settings = allowing.clone();
    settings.flags.remove("--allow-reference-models");
    for (world_size, words) in [(1, "this run began with"), (2, "records of different reference models")] {
        for end in run(&settings, world_size, None, None).ranks {
            assert_eq!((end.status.code(), &end.lines[..]), (Some(1), &[][..]), "{}", end.message);
            assert!(end.message.contains(words), "{}", end.message);
        }
        let ended = run(&allowing, world_size, None, None).well();
        assert_eq!(steps_of(ended.lines()).len(), 2, "a micro-batch of each lane");
    }
}

/// Counts, and holds the reader at a record until it may go on.
#[derive(Debug)]
struct Gate {
    fetched: AtomicI64,
    held_at: i64,
    is_open: AtomicBool,
    removed: AtomicU64,
}

impl Gate {
    fn at(held_at: i64) -> Arc<Self> {
        let (fetched, is_open, removed) = (AtomicI64::new(0), AtomicBool::new(false), AtomicU64::new(0));
        Arc::new(Self { fetched, held_at, is_open, removed })
    }

    fn removed(&self) -> u64 {
        self.removed.load(Ordering::SeqCst)
    }
}

impl Observer for Gate {
    fn fetched(&self, change: i64) {
        if change < 0 || self.fetched.fetch_add(change, Ordering::SeqCst) + change != self.held_at {
            return;
        }
        wait_for("the gate to open", || self.is_open.load(Ordering::SeqCst));
    }

    fn removed(&self, records: u64) {
        self.removed.fetch_add(records, Ordering::SeqCst);
    }
}

fn wait_for(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_retention_removes_between_two_passes_is_counted_and_gone_without() {
    const RECORDS: usize = 120;
    const REMOVED: usize = 30;
    const REMOVED_LATER: usize = 50;
    let fixture = Fixture::shared();
    let topic = "removed";
    fixture.kafka.create_topic(topic, 1);
    let mut random = fastrand::Rng::with_seed(2);
    let ids: Vec<String> = (0..RECORDS).map(|number| number.to_string()).collect();
    let (model, context) = LONG;
    let records: Vec<(&str, Option<Bytes>)> = ids
        .iter()
        .map(|id| (id.as_str(), Some(scored(&mut random, id.clone(), 40, model, context).encode())))
        .collect();
    produce(&fixture.kafka.bootstrap_servers, topic, &records);
    let wanted = |removed: usize| -> BTreeMap<String, usize> {
        ids.iter()
            .enumerate()
            .map(|(number, id)| (id.clone(), if number < removed { 1 } else { 2 }))
            .collect()
    };

    // The reader of the first run is held at the last record of its first pass: what it has read it keeps.
    let gate = Gate::at(RECORDS as i64);
    let broker =
        |observer| Broker::new(fixture.kafka.bootstrap_servers.clone(), vec![]).unwrap().observed(observer);
    let decoder = Decoder::new(TopicKind::Scored, tokenizer(), VOCABULARY);
    let extent = Extent::UntilEnd { epochs: 2 };
    let plan = Plan {
        topic: topic.to_owned(),
        extent,
        shape: BatchShape { rows: ROWS, len: ROW },
        packing: Packing::default(),
        micro_batches: 1,
        shuffle_buffer: 10,
        seed: 1,
    };
    let broker_of_feed = broker(Arc::clone(&gate) as Arc<dyn Observer>);
    let mut feed =
        Feed::open(broker_of_feed, plan, Shard::WHOLE, None, decoder.clone(), Arc::default()).unwrap();
    wait_for("the first pass", || gate.fetched.load(Ordering::SeqCst) >= RECORDS as i64);
    fixture.kafka.remove_records(topic, 0, REMOVED as i64);
    assert_eq!(gate.removed(), 0, "the next pass has not begun");
    gate.is_open.store(true, Ordering::SeqCst);
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    while let Step::Batches(batches) = feed.next_step(&mut Alone).unwrap() {
        for piece in batches.iter().flat_map(|packed| packed.rows.iter().flatten()) {
            *found.entry(piece.document.id().to_owned()).or_default() += 1;
        }
    }
    assert_eq!(found, wanted(REMOVED));
    assert_eq!(gate.removed(), REMOVED as u64);

    // One that was stopped between its passes, and goes on with the second one. It began where the topic does by now.
    let quiet = Gate::at(0);
    let open = |start| {
        let observer = Arc::clone(&quiet) as Arc<dyn Observer>;
        KafkaStream::open(broker(observer), topic, extent, start, decoder.clone(), Arc::default()).unwrap()
    };
    let mut stream = open(Start::whole());
    let next = |stream: &mut KafkaStream| match stream.next_document(0).unwrap() {
        Next::Document(document) => Some(document.id().to_owned()),
        Next::Ended => None,
        Next::Stopped => panic!("nobody asked"),
    };
    let first: Vec<String> = (REMOVED..RECORDS).map(|_| next(&mut stream).unwrap()).collect();
    assert_eq!(first, ids[REMOVED..]);
    let position = stream.position(0);
    drop(stream);
    assert_eq!((position.epoch, quiet.removed()), (1, 0));
    fixture.kafka.remove_records(topic, 0, REMOVED_LATER as i64);
    let mut stream = open(Start { places: BTreeMap::from([(0, position)]), ..Start::whole() });
    let second: Vec<String> = std::iter::from_fn(|| next(&mut stream)).collect();
    assert_eq!(second, ids[REMOVED_LATER..]);
    assert_eq!(quiet.removed(), (REMOVED_LATER - REMOVED) as u64);
}
