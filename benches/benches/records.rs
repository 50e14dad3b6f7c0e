//! What the daemon does to a document beside running the model.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use sluice_daemon::assemble::{Assembler, RecordPolicy};
use sluice_daemon::batch::{Batch, Ladder, plan, windows};
use sluice_daemon::job::Job;
use sluice_daemon::ledger::Ledger;
use sluice_daemon::outcome::Outcome;
use sluice_daemon::score::{ModelIdentity, Scores};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Losses, Precision, ScoredDocument, TokenIds, TokenizedDocument,
};

const TOKENS: usize = 1000;
const POLICY: ContextPolicy = ContextPolicy { window: 2048, stride: 1024, bos: Bos::None };

fn document() -> TokenizedDocument {
    let ids: Vec<u32> = (0..TOKENS as u32).map(|index| index * 7919 % 32_000).collect();
    TokenizedDocument {
        id: "a document".to_owned(),
        tokens: TokenIds::new(&ids),
        tokenizer: Fingerprint::of_bytes(b"tokenizer"),
        source: "bench".to_owned(),
        attributes: BTreeMap::new(),
    }
}

fn decode(criterion: &mut Criterion) {
    let payload = document().encode();
    let mut group = criterion.benchmark_group("records");
    group.throughput(Throughput::Elements(TOKENS as u64));
    group.bench_function("decode and check a document", |bencher| {
        bencher.iter(|| {
            let document = TokenizedDocument::decode(black_box(payload.clone())).unwrap();
            document.tokens.check_vocabulary(32_000).unwrap();
            document
        });
    });
    let losses: Vec<f32> = (0..TOKENS).map(|i| if i == 0 { f32::NAN } else { i as f32 * 0.01 }).collect();
    group.bench_function("encode a scored document", |bencher| {
        bencher.iter(|| {
            ScoredDocument {
                document: document(),
                reference_losses: Losses::new(black_box(&losses), LossFormat::F32).unwrap(),
                reference_entropies: None,
                reference_model: Fingerprint::of_bytes(b"model"),
                context: POLICY,
                precision: Precision::F32,
            }
            .encode()
        });
    });
    group.finish();
}

/// Lengths as of a lognormal distribution with a median of 500, from its quantiles in a scrambled order.
fn lengths(count: usize) -> Vec<usize> {
    (0..count)
        .map(|index| {
            let uniform = ((index * 7919 % count) as f64 + 0.5) / count as f64;
            // The logistic distribution stands in for the normal: its quantiles have a closed form.
            let deviate = (uniform / (1.0 - uniform)).ln() * 0.55;
            (500.0 * deviate.exp()) as usize + 2
        })
        .collect()
}

fn batches(criterion: &mut Criterion) {
    let documents: Vec<Arc<[u32]>> = lengths(64).iter().map(|&len| vec![1; len].into()).collect();
    let tokens: usize = documents.iter().map(|document| document.len()).sum();
    let mut group = criterion.benchmark_group("batches");
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function("cut a look-ahead of 64 documents", |bencher| {
        bencher.iter(|| {
            let all = (0..).zip(&documents).flat_map(|(id, tokens)| windows(id, tokens, POLICY)).collect();
            plan(black_box(all), 8192, Ladder::new(2048, 16))
        });
    });
    group.finish();
}

/// One batch's losses to records: what the dispatcher does for the model's thread.
fn assemble(criterion: &mut Criterion) {
    let ledger = Ledger::<Outcome>::default();
    ledger.assign([0]);
    let policy = RecordPolicy {
        model: ModelIdentity {
            fingerprint: Fingerprint::of_bytes(b"model"),
            tokenizer: Fingerprint::of_bytes(b"tokenizer"),
            vocabulary: 32_000,
            precision: Precision::F32,
        },
        context: POLICY,
        loss_format: LossFormat::F32,
        entropies: false,
        class: None,
    };
    let mut offset = 0;
    let mut batch = || {
        let mut assembler = Assembler::new(policy.clone());
        let mut windows = Vec::new();
        for _ in 0..8 {
            let ticket = ledger.open(0, offset, TOKENS).unwrap();
            offset += 1;
            let document = document();
            let job = Job { ticket, key: None, payload: Bytes::new(), document };
            windows.extend(assembler.add(job).0);
        }
        let batch = Batch::new(windows, Ladder::new(2048, 16));
        let scores = Scores { losses: vec![1.0; batch.targets.len()], entropies: Vec::new() };
        (assembler, batch, scores)
    };
    let mut group = criterion.benchmark_group("assemble");
    group.throughput(Throughput::Elements(8 * TOKENS as u64));
    group.bench_function("losses of 8 documents to records", |bencher| {
        bencher.iter_batched(
            &mut batch,
            |(mut assembler, batch, scores)| assembler.scored(&batch, &scores),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, decode, batches, assemble);
criterion_main!(benches);
