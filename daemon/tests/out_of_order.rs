//! Batches that come back in any order, late, halved or failed never mix up documents (seeded).
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use sluice_daemon::assemble::{Assembler, RecordPolicy};
use sluice_daemon::batch::Batch;
use sluice_daemon::config::{Config, Sizes};
use sluice_daemon::dispatch::Dispatcher;
use sluice_daemon::job::Job;
use sluice_daemon::ledger::Ledger;
use sluice_daemon::metrics::Metrics;
use sluice_daemon::outcome::{MODEL_FAILED, Outcome};
use sluice_daemon::score::model_thread::Run;
use sluice_daemon::score::{ModelIdentity, Scores};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Precision, ScoredDocument, TokenIds, TokenizedDocument,
};

const VOCABULARY: u32 = 5000;
const BOS: u32 = 4999;

/// A loss that only the token, the one before it, and its place in the window can give.
fn loss(context: i64, token: i64, position: usize) -> f32 {
    (context * 31 + token * 17 + position as i64) as f32 / 1024.0
}

fn model(batch: &Batch) -> Scores {
    let losses = batch
        .target_rows
        .iter()
        .zip(&batch.targets)
        .map(|(&row, &token)| loss(batch.tokens[row as usize], token, row as usize % batch.padded_len));
    let losses: Vec<f32> = losses.collect();
    Scores { entropies: losses.iter().map(|loss| loss * 2.0).collect(), losses }
}

/// Losses of a document without the dispatcher, its batches or its assembly.
fn expected(tokens: &[u32], policy: ContextPolicy) -> Vec<f32> {
    let shared: Arc<[u32]> = tokens.into();
    let mut losses = vec![f32::NAN; tokens.len()];
    for window in sluice_daemon::batch::windows(0, &shared, policy) {
        let ids: Vec<u32> = window.ids().collect();
        let shift = usize::from(window.bos.is_some());
        for index in window.scored() {
            let place = index - window.span.start + shift;
            losses[index] = loss(i64::from(ids[place - 1]), i64::from(ids[place]), place - 1);
        }
    }
    losses
}

fn identity() -> ModelIdentity {
    ModelIdentity {
        fingerprint: Fingerprint::of_bytes(b"model"),
        tokenizer: Fingerprint::of_bytes(b"tokenizer"),
        vocabulary: VOCABULARY,
        precision: Precision::F32,
    }
}

fn job(ledger: &Ledger<Outcome>, id: usize, tokens: &[u32]) -> Job {
    let document = TokenizedDocument {
        id: id.to_string(),
        tokens: TokenIds::new(tokens),
        tokenizer: Fingerprint::of_bytes(b"tokenizer"),
        source: String::new(),
        attributes: BTreeMap::new(),
    };
    let ticket = ledger.open((id % 3) as i32, (id / 3) as i64, tokens.len()).unwrap();
    Job { ticket, key: None, payload: document.encode(), document }
}

fn run(batch: Batch, scored: anyhow::Result<Scores>) -> Run {
    Run { batch, scored, ran: Duration::ZERO, starved: Duration::ZERO }
}

fn record_policy(context: ContextPolicy, entropies: bool) -> RecordPolicy {
    RecordPolicy { model: identity(), context, loss_format: LossFormat::F32, entropies, class: None }
}

/// Feeds random documents and gives batches back in random order; one in ten fails first, as on a device without
/// memory. How many were split.
fn stress(seed: u64, bos: Bos) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let window = random.u32(4..100);
    let policy = ContextPolicy { window, stride: random.u32(1..window - 1), bos };
    let sizes = Sizes {
        tokens_max: random.usize(window as usize..4 * window as usize),
        length_steps: random.usize(1..20),
        few_shapes: random.bool(),
        ..Config::default().sizes()
    };
    let record = record_policy(policy, true);
    let ledger = Ledger::default();
    ledger.assign([0, 1, 2]);
    let metrics = Metrics::new().unwrap();
    let ladder = sizes.ladder(policy);
    let mut dispatcher = Dispatcher::new(record, ladder, &ledger, sizes, &metrics);

    let documents: Vec<Vec<u32>> = (0..300)
        .map(|_| {
            let len = random.usize(1..4 * window as usize);
            (0..len).map(|_| random.u32(0..VOCABULARY)).collect()
        })
        .collect();
    let mut unread = documents.iter().enumerate();
    let mut running: Vec<Batch> = Vec::new();
    let mut poisoned: HashSet<String> = HashSet::new();
    loop {
        let mut idle = true;
        for (id, tokens) in unread.by_ref().take(random.usize(0..20)) {
            dispatcher.accept(job(&ledger, id, tokens));
            idle = false;
        }
        for _ in 0..random.usize(1..4) {
            running.extend(dispatcher.next_batch());
        }
        while !running.is_empty() && (random.bool() || running.len() > 6) {
            let batch = running.swap_remove(random.usize(0..running.len()));
            let fails = batch.rows() > 1 && random.u8(0..10) == 0;
            // Rarely, a document alone: it becomes a dead letter, and what else comes for it is ignored.
            let alone = batch.rows() == 1 && random.u8(0..60) == 0;
            let scored = if fails || alone {
                Err(anyhow::anyhow!("CUDA failure 2: out of memory"))
            } else {
                Ok(model(&batch))
            };
            if alone {
                let id = batch.windows[0].document.to_string();
                poisoned.insert(id);
            }
            if dispatcher.finish(run(batch, scored)).is_err() {
                // Three failures in a row mean a broken model; this one only has bad luck.
                return stress(seed + 1000, bos);
            }
            idle = false;
        }
        if idle && running.is_empty() && unread.len() == 0 {
            match dispatcher.next_batch() {
                Some(batch) => running.push(batch),
                None => break,
            }
        }
    }

    let mut seen = 0;
    for _ in 0..documents.len() {
        let group = ledger.take(usize::MAX, Duration::ZERO, Duration::ZERO);
        for taken in &group {
            seen += 1;
            let scored = match &taken.outcome {
                Outcome::Scored(scored) => scored,
                Outcome::DeadLetter(letter) => {
                    assert_eq!(letter.reason, MODEL_FAILED, "{}", letter.detail);
                    let id = TokenizedDocument::decode(letter.payload.clone()).unwrap().id;
                    assert!(poisoned.remove(&id), "{id}, which nothing failed on, was given up");
                    continue;
                }
            };
            let record = ScoredDocument::decode(scored.payload.clone()).unwrap();
            let id: usize = record.document.id.parse().unwrap();
            assert_eq!(taken.ticket.offset, (id / 3) as i64, "an outcome under another document's ticket");
            assert!(!poisoned.contains(&record.document.id), "a document given up came back");
            assert_eq!(record.document.tokens.to_vec(), documents[id]);
            let wanted = expected(&documents[id], policy);
            for (position, (ours, wanted)) in record.reference_losses.iter().zip(&wanted).enumerate() {
                assert!(ours.to_bits() == wanted.to_bits(), "seed {seed}, document {id}, token {position}");
            }
            let entropies = record.reference_entropies.unwrap().to_vec();
            assert!(
                entropies
                    .iter()
                    .zip(&wanted)
                    .skip(1)
                    .all(|(entropy, loss)| entropy.to_bits() == (loss * 2.0).to_bits())
            );
        }
        ledger.release(&group);
    }
    assert_eq!(seen, documents.len(), "every document comes out once");
    assert_eq!(poisoned, HashSet::new(), "documents that were given up have no dead letter");
    assert!(ledger.is_drained());
    assert_eq!(metrics.batches_split.get(), metrics.splits_for_memory.get());
    metrics.batches_split.get()
}

#[test]
fn batches_that_finish_out_of_order_mix_up_nothing() {
    let policies = [Bos::None, Bos::Document(BOS), Bos::Window(BOS)];
    let split: u64 = (0..40).map(|seed| stress(seed, policies[seed as usize % 3])).sum();
    assert!(split > 100, "{split} batches failed and were split, which is too few to tell");
}

#[test]
fn a_document_is_handed_over_with_the_last_of_its_windows_whatever_is_tried_again() {
    let ledger = Ledger::default();
    ledger.assign([0]);
    let context = ContextPolicy { window: 4, stride: 2, bos: Bos::None };
    let record = record_policy(context, false);
    let mut assembler = Assembler::new(record);
    let job = job(&ledger, 0, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let ticket = job.ticket;
    let (windows, _) = assembler.add(job);
    let document = windows[0].document;
    assert_eq!(windows.len(), 3);
    assert_eq!(assembler.hand_over(document), None);
    // Its batch has failed, and each half comes in a batch of its own.
    assembler.take_back(document);
    let handed_over: Vec<_> = (0..3).map(|_| assembler.hand_over(document)).collect();
    assert_eq!(handed_over, [None, None, Some(ticket)]);
}

fn dispatcher<'a>(ledger: &'a Ledger<Outcome>, metrics: &'a Metrics) -> Dispatcher<'a> {
    ledger.assign([0, 1, 2]);
    let context = ContextPolicy { window: 64, stride: 32, bos: Bos::None };
    let record = record_policy(context, false);
    let sizes = Config::default().sizes();
    let mut dispatcher = Dispatcher::new(record, sizes.ladder(context), ledger, sizes, metrics);
    for id in 0..DOCUMENTS {
        dispatcher.accept(job(ledger, id, &[1, 2, 3, 4]));
    }
    dispatcher
}

const DOCUMENTS: usize = 6;

/// A sticky error of the device, such as those of CUDA after which every call fails.
#[test]
fn a_device_that_fails_for_good_gives_up_no_document() {
    let (ledger, metrics) = (Ledger::default(), Metrics::new().unwrap());
    let mut dispatcher = dispatcher(&ledger, &metrics);
    let failed = (0..100).find_map(|_| {
        let batch = dispatcher.next_batch().unwrap();
        dispatcher.finish(run(batch, Err(anyhow::anyhow!("CUDA failure 719")))).err()
    });
    let error = format!("{:#}", failed.unwrap());
    assert!(error.contains("no document is at fault") && error.contains("719"), "{error}");
    assert!(ledger.take(usize::MAX, Duration::ZERO, Duration::ZERO).is_empty(), "nothing may be committed");
}

#[test]
fn a_document_is_given_up_once_the_device_is_known_to_be_well() {
    const BAD: u64 = 2;
    let (ledger, metrics) = (Ledger::default(), Metrics::new().unwrap());
    let mut dispatcher = dispatcher(&ledger, &metrics);
    while let Some(batch) = dispatcher.next_batch() {
        let is_bad = batch.windows.iter().any(|window| window.document == BAD);
        let scored = if is_bad { Err(anyhow::anyhow!("a bad document")) } else { Ok(model(&batch)) };
        dispatcher.finish(run(batch, scored)).unwrap();
    }
    let group = ledger.take(usize::MAX, Duration::ZERO, Duration::ZERO);
    let reasons: Vec<_> = group
        .iter()
        .filter_map(|taken| match &taken.outcome {
            Outcome::Scored(_) => None,
            Outcome::DeadLetter(letter) => Some((letter.reason, letter.detail.as_str())),
        })
        .collect();
    assert_eq!((group.len(), reasons), (DOCUMENTS, vec![("model_failed", "a bad document")]));
}
