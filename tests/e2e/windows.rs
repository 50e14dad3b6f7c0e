//! Splitting into windows and batches never changes a loss, and never loses or repeats a token (seeded).
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use sluice_daemon::batch::{Batch, Ladder, LookAhead, windows};
use sluice_daemon::score::model::Model;
use sluice_daemon::score::runtime::{Device, SessionOptions};
use sluice_daemon::score::{Score as _, Scorer};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_tests::{golden, onnxruntime};

const BOS: u32 = 0;

fn scorer() -> (Scorer, u32) {
    let model = Model::load(&golden("tiny-llama"), Device::Cpu, false).unwrap();
    let options =
        SessionOptions { library: onnxruntime(), device: Device::Cpu, threads: 1, device_memory_bytes: 0 };
    (Scorer::new(&model, &options, false).unwrap(), model.identity.vocabulary)
}

/// Each token's loss from its own window, run alone and without padding.
fn one_by_one(scorer: &mut Scorer, documents: &[Arc<[u32]>], policy: ContextPolicy) -> Vec<Vec<f32>> {
    let alone = |tokens: &Arc<[u32]>| {
        let mut losses = vec![f32::NAN; tokens.len()];
        for window in windows(0, tokens, policy) {
            let (scored, len) = (window.scored(), window.len());
            let batch = Batch::new(vec![window], Ladder::new(len, 1));
            assert_eq!(batch.padded_len, len);
            losses[scored].copy_from_slice(&scorer.score(&batch).unwrap().losses);
        }
        losses
    };
    documents.iter().map(alone).collect()
}

fn check(seed: u64, scorer: &mut Scorer, vocabulary: u32) -> f32 {
    let mut random = fastrand::Rng::with_seed(seed);
    let window = random.u32(4..=64);
    let policy = ContextPolicy {
        window,
        stride: random.u32(1..window - 1),
        bos: [Bos::None, Bos::Document(BOS), Bos::Window(BOS)][seed as usize % 3],
    };
    // Up to three windows long, and whole windows more often than chance would have it.
    let documents: Vec<Arc<[u32]>> = (0..random.usize(1..12))
        .map(|_| {
            let whole = random.usize(0..=3) * window as usize;
            let len = if random.u8(0..4) == 0 { whole } else { random.usize(0..=3 * window as usize) };
            (0..len).map(|_| random.u32(0..vocabulary)).collect()
        })
        .collect();
    let mut waiting =
        LookAhead::new(random.usize(window as usize..600), Ladder::new(window as usize, random.usize(1..32)));
    let cut = (0..).zip(&documents).flat_map(|(id, tokens)| windows(id, tokens, policy));
    cut.for_each(|window| waiting.push(window));

    let mut losses: Vec<Vec<f32>> = documents.iter().map(|tokens| vec![f32::NAN; tokens.len()]).collect();
    let mut batches: Vec<Batch> = std::iter::from_fn(|| waiting.next_batch()).collect();
    // They come back in any order.
    random.shuffle(&mut batches);
    for batch in batches {
        let mut scored = scorer.score(&batch).unwrap().losses.into_iter();
        for window in &batch.windows {
            for loss in &mut losses[window.document as usize][window.scored()] {
                assert!(loss.is_nan(), "a token is scored once");
                *loss = scored.next().unwrap();
            }
        }
        assert_eq!(scored.next(), None);
    }
    let mut worst = 0.0_f32;
    for ((losses, alone), tokens) in losses.iter().zip(one_by_one(scorer, &documents, policy)).zip(&documents)
    {
        for (position, (loss, alone)) in losses.iter().zip(&alone).enumerate() {
            let unpredicted = position == 0 && (policy.bos == Bos::None || tokens[0] == BOS);
            assert_eq!(loss.is_nan(), unpredicted, "seed {seed}, position {position}");
            worst = worst.max(if unpredicted { 0.0 } else { (loss - alone).abs() });
        }
    }
    worst
}

#[test]
fn windows_and_batches_change_no_loss_and_lose_no_token() {
    let (mut scorer, vocabulary) = scorer();
    let worst = (0..150).map(|seed| check(seed, &mut scorer, vocabulary)).fold(0.0, f32::max);
    eprintln!("worst difference {worst:.1e} nats");
    assert!(worst < 1e-5, "{worst}");
}
