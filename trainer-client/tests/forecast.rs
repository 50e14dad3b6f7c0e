//! What a sample holds: whose turn it is, which tokens are compared, and what is left of it when somebody stops it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use sluice_feed::document::Document;
use sluice_feed::pack::BatchShape;
use sluice_feed::stream::{DocumentStream, Next, Position, StreamError};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_trainer::failure::{EXIT_DATA, exit_code};
use sluice_trainer::forecast::sample::{Base, Ending, Sample};
use sluice_trainer::training::learner::Learner as _;
use support::bigram::Bigram;

const VOCABULARY: usize = 8;
const WINDOW: u32 = 16;
static NEVER: AtomicBool = AtomicBool::new(false);

/// Lanes in memory.
struct Lanes(Vec<VecDeque<Document>>);

impl DocumentStream for Lanes {
    fn lanes(&self) -> usize {
        self.0.len()
    }

    fn next_document(&mut self, lane: usize) -> Result<Next, StreamError> {
        Ok(self.0[lane].pop_front().map_or(Next::Ended, Next::Document))
    }

    fn position(&self, _lane: usize) -> Position {
        Position::default()
    }

    fn reference_model(&self) -> Option<Fingerprint> {
        Some(Fingerprint::of_bytes(b"reference"))
    }
}

/// A document of this source whose token at `index` has the reference loss `index / 10`.
fn document(source: &str, tokens: usize) -> Document {
    let ids = (0..tokens).map(|index| (index % VOCABULARY) as u32).collect();
    let losses = (0..tokens).map(|index| if index == 0 { f32::NAN } else { index as f32 / 10.0 }).collect();
    // All of one id: nothing may depend on it.
    Document::scored("same".to_owned(), source.to_owned(), ids, losses).unwrap().with_context(ContextPolicy {
        window: WINDOW,
        stride: WINDOW / 2,
        bos: Bos::None,
    })
}

fn lanes(lengths: &[&[(&str, usize)]]) -> Box<dyn DocumentStream> {
    let lane = |documents: &&[(&str, usize)]| {
        documents.iter().map(|&(source, tokens)| document(source, tokens)).collect()
    };
    Box::new(Lanes(lengths.iter().map(lane).collect()))
}

fn shape(len: usize) -> BatchShape {
    BatchShape { rows: 2, len }
}

fn sources(sample: &Sample) -> Vec<&str> {
    let names = sample.names.names();
    sample.documents.iter().map(|document| names[usize::from(document.source)].as_str()).collect()
}

#[test]
fn partitions_give_a_document_each_in_turn_until_there_are_as_many_as_asked_for() {
    let stream =
        || lanes(&[&[("a0", 3), ("a1", 3), ("a2", 3), ("a3", 3)], &[("b0", 3)], &[("c0", 3), ("c1", 3)]]);
    let read =
        |documents_max| Sample::read(stream(), documents_max, &[], None, &NEVER, &mut |_, _| {}).unwrap();
    let five = read(5);
    assert_eq!((sources(&five), five.ending), (vec!["a0", "b0", "c0", "a1", "c1"], Ending::Full));
    let all = read(100);
    assert_eq!(sources(&all), ["a0", "b0", "c0", "a1", "c1", "a2", "a3"]);
    assert_eq!(all.ending, Ending::StreamEnded);
    assert_eq!(all.reference_model, Some(Fingerprint::of_bytes(b"reference")));
}

#[test]
fn every_token_is_compared_once_under_the_references_context() {
    let learner = Bigram::new(VOCABULARY);
    // Shorter than a window, a window, and several.
    let stream = || lanes(&[&[("short", 5), ("one", 1)], &[("long", 50), ("window", 16)]]);
    let read = |len| {
        let base = Base { learner: &learner, shape: shape(len) };
        Sample::read(stream(), 10, &[], Some(base), &NEVER, &mut |_, _| {}).unwrap()
    };
    for sample in [read(WINDOW as usize), read(24)] {
        assert_eq!(sources(&sample), ["short", "long", "one", "window"]);
        for (found, tokens) in sample.documents.iter().zip([5_u64, 50, 1, 16]) {
            let predicted = tokens - 1;
            assert_eq!((found.tokens, found.compared), (predicted, predicted));
            let reference = (1..tokens).map(|index| index as f64 / 10.0).sum::<f64>();
            assert!((found.reference - reference).abs() < 1e-5, "{found:?}");
            let base = predicted as f64 * (VOCABULARY as f64).ln();
            assert!((found.base - base).abs() < 1e-4, "{found:?}");
        }
        assert_eq!(sample.compared.base.len(), 4 + 49 + 15);
        assert_eq!(sample.compared.sources.len(), sample.compared.reference.len());
    }
    // Rows of half a window: of a longer document only what the first row holds has the context of its reference losses.
    let short = read(8);
    let compared: Vec<(u64, u64)> =
        short.documents.iter().map(|document| (document.tokens, document.compared)).collect();
    assert_eq!(compared, [(4, 4), (49, 7), (0, 0), (15, 7)]);

    // Without a base model the reference's losses are all there is.
    let alone = Sample::read(stream(), 10, &[], None, &NEVER, &mut |_, _| {}).unwrap();
    let tokens: Vec<u64> = alone.documents.iter().map(|document| document.tokens).collect();
    assert_eq!((tokens, alone.compared.base.len()), (vec![4, 49, 0, 15], 0));
}

#[test]
fn what_was_looked_at_before_a_stop_is_kept() {
    let learner = Bigram::new(VOCABULARY);
    let many: Vec<(&str, usize)> = vec![("a", 16); 40];
    let stop = AtomicBool::new(false);
    let base = Base { learner: &learner, shape: shape(16) };
    let sample = Sample::read(lanes(&[&many]), 1000, &[], Some(base), &stop, &mut |_, tokens| {
        stop.store(tokens >= 90, Ordering::Relaxed);
    })
    .unwrap();
    // Rows of a document each, two to a micro-batch.
    assert_eq!(sample.ending, Ending::Stopped);
    assert_eq!(sample.compared.base.len(), 90);
    let looked_at = sample.documents.iter().filter(|document| document.compared == 15).count();
    assert_eq!((looked_at, sample.documents.iter().map(|document| document.compared).sum()), (6, 90));
}

#[test]
fn targets_are_told_apart_however_many_sources_there_are() {
    let names: Vec<String> = (0..300).map(|number| format!("source {number}")).collect();
    let documents: Vec<(&str, usize)> = names.iter().map(|name| (name.as_str(), 2)).collect();
    let read = |targets: &[String]| {
        let sample = Sample::read(lanes(&[&documents]), 1000, targets, None, &NEVER, &mut |_, _| {}).unwrap();
        let found = sources(&sample);
        (found[298..].to_vec().join(", "), sample.names.names().len())
    };
    assert_eq!(read(&[]), ("(other sources), (other sources)".to_owned(), 257));
    assert_eq!(read(&names[299..]), ("(other sources), source 299".to_owned(), 257));
}

#[test]
fn a_model_whose_losses_are_not_finite_is_wrong_data() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> =
        [f32::NAN; VOCABULARY * VOCABULARY].iter().flat_map(|logit| logit.to_le_bytes()).collect();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let mut learner = Bigram::new(VOCABULARY);
    learner.load(folder.path()).unwrap();
    let base = Base { learner: &learner, shape: shape(16) };
    let error = Sample::read(lanes(&[&[("a", 5)]]), 10, &[], Some(base), &NEVER, &mut |_, _| {}).unwrap_err();
    assert_eq!(exit_code(&error), EXIT_DATA);
    assert!(error.to_string().contains("not finite"), "{error}");
}
