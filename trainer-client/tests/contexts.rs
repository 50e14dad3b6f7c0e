//! Whether tokens are ranked by what both models make of them, and not by where their pieces begin: the share that is kept,
//! by the distance from the first token that a piece predicts, of a real model on documents in which context matters much.
//!
//! Every document goes round a cycle of its own. What comes next is a guess until the cycle has been read once, and certain
//! from then on. The reference is the same model, its losses measured window by window as the daemon measures them, less a
//! little noise. So where contexts are equal, excess loss is that noise, and the ranking knows nothing of places.

mod support;

use std::collections::HashMap;
use std::sync::LazyLock;

use sluice_feed::batch::{Batch, NO_TARGET, PackedBatch};
use sluice_feed::cut::{Piece, UnequalContexts};
use sluice_feed::document::Document;
use sluice_feed::pack::{BatchShape, Packer, Packing};
use sluice_feed::random::SplitMix64;
use sluice_feed::select::{KeepRatio, Objective, Score, Signals, Thresholds, Turn};
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_schemas::windows::{WindowSpan, windows};
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig, Variant};
use sluice_trainer::training::learner::Learner;
use support::model::every_target;

const SYMBOLS: usize = 24;
/// Tokens of a document's cycle: fewer than a window reads again, more than a piece of a row of [`SHORT`] does.
const CYCLE: usize = 8;
const BOS: u32 = SYMBOLS as u32;
const SHAPE: BatchShape = BatchShape { rows: 8, len: 64 };
const SHORT: BatchShape = BatchShape { rows: 32, len: 16 };
const KEEP: f64 = 0.3;
/// Nats.
const NOISE_MAX: f32 = 0.05;
/// Nats. Far less than the noise, and far more than sums of float32 differ by for the company that a row is computed in.
const EQUAL_WITHIN: f32 = 1e-4;

fn document(number: usize, generator: &mut SplitMix64) -> Document {
    let mut symbols: Vec<u32> = (0..SYMBOLS as u32).collect();
    for place in 0..CYCLE {
        symbols.swap(place, place + generator.below(SYMBOLS - place));
    }
    let length = 2 * CYCLE + generator.below(250);
    let tokens = symbols[..CYCLE].iter().copied().cycle().take(length).collect();
    Document::plain(format!("d{number}"), String::new(), tokens)
}

fn documents(count: usize, seed: u64) -> Vec<Document> {
    let mut generator = SplitMix64::keyed(seed, 0);
    (0..count).map(|number| document(number, &mut generator)).collect()
}

static TRAINED: LazyLock<BurnLearner> = LazyLock::new(trained);

/// A model that has learnt to look for the cycle.
fn trained() -> BurnLearner {
    const STEPS: u32 = 300;
    let config = ModelConfig {
        vocab_size: SYMBOLS + 1,
        hidden_size: 32,
        intermediate_size: 64,
        layers: 2,
        heads: 2,
        kv_heads: 2,
        max_position_embeddings: SHAPE.len,
        rope_theta: 100.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        variant: Variant::default(),
    };
    let mut learner = BurnLearner::new(config, AdamWConfig::default(), 3).expect("a valid configuration");
    let mut packer = Packer::new(SHAPE);
    let mut generator = SplitMix64::keyed(11, 0);
    let mut outcome = learner.update(0.0);
    for step in 1..=STEPS {
        while !packer.fills(1) {
            packer.push(&document(0, &mut generator));
        }
        let packed = packer.next_batch().expect("a whole batch");
        let learning_rate = 3e-3 * f64::from(step).min(30.0) / 30.0;
        outcome = learner.step(&packed.batch, learning_rate, &mut every_target);
    }
    // A guess among the cycle's symbols alone would be ln 8.
    assert!(outcome.kept_loss < 2.0, "the model has not learnt to look for the cycle: {outcome:?}");
    learner
}

/// A window as the one row of a batch: what the daemon gives the reference.
fn alone(document: &Document, window: &WindowSpan) -> Batch {
    let tokens: Vec<u32> =
        window.bos.into_iter().chain(document.tokens()[window.span.clone()].iter().copied()).collect();
    let len = tokens.len();
    let targets = tokens[1..].iter().copied().chain([NO_TARGET]).collect();
    let segments = vec![1; len];
    Batch {
        rows: 1,
        len,
        positions: (0..len as u32).collect(),
        tokens,
        segments,
        targets,
        ..Batch::default()
    }
}

/// The documents with the losses of the reference, and the noise that is in them, token by token.
fn scored(
    learner: &BurnLearner,
    documents: &[Document],
    policy: ContextPolicy,
) -> (Vec<Document>, HashMap<String, Vec<f32>>) {
    let mut generator = SplitMix64::keyed(21, 0);
    let mut noises = HashMap::new();
    let mut scored = Vec::new();
    for document in documents {
        let mut reference = vec![f32::NAN; document.tokens().len()];
        let mut noise = reference.clone();
        for window in windows(document.tokens(), policy) {
            let losses = learner.losses(&alone(document, &window));
            let bos = usize::from(window.bos.is_some());
            for token in window.scored() {
                noise[token] = NOISE_MAX * (generator.below(2_000_001) as f32 / 1e6 - 1.0);
                // A prediction stands one place before its token.
                reference[token] = losses[bos + token - window.span.start - 1] - noise[token];
            }
        }
        noises.insert(document.id().to_owned(), noise);
        let (id, tokens) = (document.id().to_owned(), document.tokens().to_vec());
        let document = Document::scored(id, String::new(), tokens, reference).expect("a loss a token");
        scored.push(document.with_context(policy));
    }
    (scored, noises)
}

/// Rows as they were made before: filled in the order of the stream, documents cut wherever a row ends, and gone on with
/// after a repeat of one token.
fn in_stream_order(documents: &[Document], len: usize) -> Vec<Vec<Piece>> {
    let (mut rows, mut open, mut room) = (Vec::new(), Vec::new(), len);
    for document in documents {
        let (mut start, length) = (0, document.tokens().len());
        while length - start >= 2 {
            if room < 2 {
                rows.push(std::mem::take(&mut open));
                room = len;
            }
            let end = length.min(start + room);
            open.push(Piece { document: document.slice(start..end), start, first_predicted: 1, bos: None });
            room -= end - start;
            start = if end == length { end } else { end - 1 };
        }
    }
    rows.push(open);
    rows
}

fn batches(mut packer: Packer) -> Vec<PackedBatch> {
    packer.close();
    std::iter::from_fn(|| packer.next_batch()).collect()
}

fn by_best_fit(
    documents: &[Document],
    shape: BatchShape,
    unequal_contexts: UnequalContexts,
) -> Vec<PackedBatch> {
    let mut packer = Packer::new(shape).packing(Packing { unequal_contexts, ..Packing::default() });
    for document in documents {
        packer.push(document);
    }
    batches(packer)
}

/// One token that is predicted.
struct Prediction {
    /// Whether its piece begins where its document does.
    from_start: bool,
    /// From the first token that is predicted in its piece.
    distance: usize,
    /// NaN where it cannot be chosen.
    excess: f32,
    noise: f32,
    is_kept: bool,
}

/// What is kept of all batches together.
fn predictions(
    learner: &BurnLearner,
    batches: &[PackedBatch],
    noises: &HashMap<String, Vec<f32>>,
) -> Vec<Prediction> {
    let mut excess = Vec::new();
    for PackedBatch { batch, .. } in batches {
        let losses = learner.losses(batch);
        let signals = Signals { loss: &losses, reference_loss: &batch.reference, ..Signals::default() };
        excess.extend(Score::Excess.values(&signals));
    }
    let mut is_kept = vec![false; excess.len()];
    // Ranked by a loss that is the excess already.
    let ranking = Objective::slm(Score::Loss, KeepRatio::try_from(KEEP).expect("a share"));
    let signals = Signals { loss: &excess, ..Signals::default() };
    let turn = Turn { seed: 1, step: 1, steps: 1, micro_batch: 0 };
    let chosen = ranking.select(&[signals], excess.len(), turn, &Thresholds::default());
    for place in chosen.into_iter().flat_map(|choice| choice.kept) {
        is_kept[place as usize] = true;
    }
    let mut predictions = Vec::new();
    let mut batch_start = 0;
    for packed in batches {
        for (number, row) in packed.rows.iter().enumerate() {
            let mut piece_start = number * packed.batch.len;
            for piece in row {
                for index in piece.first_predicted..piece.document.tokens().len() {
                    let place = piece_start + usize::from(piece.bos.is_some()) + index - 1;
                    assert_eq!(packed.batch.targets[place], piece.document.tokens()[index]);
                    predictions.push(Prediction {
                        from_start: piece.start == 0,
                        distance: index - piece.first_predicted,
                        excess: excess[batch_start + place],
                        noise: noises[piece.document.id()][piece.start + index],
                        is_kept: is_kept[batch_start + place],
                    });
                }
                piece_start += piece.len();
            }
        }
        batch_start += packed.batch.targets.len();
    }
    predictions
}

/// What is kept at some distances.
#[derive(Clone, Copy, Default)]
struct Bucket {
    predicted: usize,
    kept: usize,
    excess_sum: f64,
}

impl Bucket {
    fn share(self) -> f64 {
        self.kept as f64 / self.predicted as f64
    }
}

const BUCKETS: [(&str, usize); 5] = [("0", 0), ("1-2", 1), ("3-6", 3), ("7-14", 7), ("15+", 15)];

/// The buckets of pieces that begin where their documents do, or in their middle.
fn buckets(predictions: &[Prediction], from_start: bool) -> [Bucket; BUCKETS.len()] {
    let mut buckets = [Bucket::default(); BUCKETS.len()];
    for prediction in predictions.iter().filter(|prediction| prediction.from_start == from_start) {
        let bucket = BUCKETS.iter().rposition(|&(_, first)| first <= prediction.distance).expect("from 0");
        buckets[bucket].predicted += 1;
        buckets[bucket].kept += usize::from(prediction.is_kept);
        buckets[bucket].excess_sum += f64::from(prediction.excess);
    }
    buckets
}

/// Prints what `--nocapture` shows.
fn print(title: &str, predictions: &[Prediction]) {
    eprintln!(
        "\n{title}\n  distance  |  in mid-document: tokens   kept  excess  |  from the start: tokens   kept  excess"
    );
    let (middle, start) = (buckets(predictions, false), buckets(predictions, true));
    for ((name, _), (middle, start)) in BUCKETS.iter().zip(middle.iter().zip(&start)) {
        let [middle, start] = [middle, start].map(|bucket| {
            let mean = bucket.excess_sum / bucket.predicted as f64;
            format!("{:6}  {:5.3}  {mean:+6.3}", bucket.predicted, bucket.share())
        });
        eprintln!("  {name:8}  |                   {middle}  |                  {start}");
    }
}

/// Windows as long as a row of [`SHAPE`].
fn policy(bos: Bos) -> ContextPolicy {
    ContextPolicy { window: SHAPE.len as u32, stride: SHAPE.len as u32 * 3 / 4, bos }
}

/// The largest difference between the excess loss of a token that can be chosen and the noise in its reference loss: what
/// is left of its contexts.
fn largest_difference<'a>(predictions: impl IntoIterator<Item = &'a Prediction>) -> f32 {
    let eligible = predictions.into_iter().filter(|prediction| !prediction.excess.is_nan());
    eligible.map(|prediction| (prediction.excess - prediction.noise).abs()).fold(0.0, f32::max)
}

#[test]
fn no_place_in_a_piece_is_kept_more_often_than_another() {
    let learner = &*TRAINED;
    let (documents, noises) = scored(learner, &documents(400, 5), policy(Bos::None));
    let packed = by_best_fit(&documents, SHAPE, UnequalContexts::Mask);
    let predictions = predictions(learner, &packed, &noises);
    print("By best fit, in the reference's windows:", &predictions);
    let difference = largest_difference(&predictions);
    eprintln!("excess loss is the noise within {difference:e} nats");
    assert!(difference < EQUAL_WITHIN, "{difference:e}");
    assert!(predictions.iter().all(|prediction| !prediction.excess.is_nan()), "every token can be chosen");
    for bucket in [false, true].into_iter().flat_map(|from_start| buckets(&predictions, from_start)) {
        // Of n tokens that are ranked by noise alone, KEEP are kept, with a standard deviation of at most that of n draws.
        // Four of them are missed by one bucket in 16,000.
        let deviation = (KEEP * (1.0 - KEEP) / bucket.predicted as f64).sqrt();
        assert!(bucket.predicted >= 400, "too few to tell");
        assert!((bucket.share() - KEEP).abs() < 4.0 * deviation, "{:.3} are kept", bucket.share());
    }
}

#[test]
fn a_bos_that_the_reference_saw_leaves_contexts_equal() {
    let learner = &*TRAINED;
    for bos in [Bos::Document(BOS), Bos::Window(BOS)] {
        let (documents, noises) = scored(learner, &documents(60, 6), policy(bos));
        let packed = by_best_fit(&documents, SHAPE, UnequalContexts::Mask);
        let predictions = predictions(learner, &packed, &noises);
        assert!(
            predictions.iter().all(|prediction| !prediction.excess.is_nan()),
            "every token can be chosen"
        );
        let difference = largest_difference(&predictions);
        assert!(difference < EQUAL_WITHIN, "{difference:e} with {bos:?}");
    }
}

/// What the other tests would say of the rule that was before.
#[test]
fn documents_cut_where_rows_end_are_kept_for_their_cuts() {
    let learner = &*TRAINED;
    let (documents, noises) = scored(learner, &documents(200, 5), policy(Bos::None));
    let packer = Packer::new(SHAPE).holding(in_stream_order(&documents, SHAPE.len), vec![]);
    let predictions = predictions(learner, &batches(packer), &noises);
    print("In the order of the stream, cut where rows end:", &predictions);
    let [first, ..] = buckets(&predictions, false);
    assert!(first.share() > 0.8, "{:.3} are kept", first.share());
    assert!(largest_difference(&predictions) > 1.0, "in nats");
}

#[test]
fn in_rows_shorter_than_the_window_tokens_of_unequal_contexts_are_masked_unless_they_are_allowed() {
    let learner = &*TRAINED;
    let (documents, noises) = scored(learner, &documents(200, 5), policy(Bos::None));
    let kept = |unequal| predictions(learner, &by_best_fit(&documents, SHORT, unequal), &noises);
    let (masked, allowed) = (kept(UnequalContexts::Mask), kept(UnequalContexts::Allow));
    print("Rows of a quarter of a window, masked:", &masked);
    print("Rows of a quarter of a window, allowed:", &allowed);
    assert_eq!(masked.len(), allowed.len());
    let is_masked = |one: &Prediction| one.excess.is_nan() && !one.is_kept;
    assert!(
        masked.iter().all(|one| one.from_start != is_masked(one)),
        "all but those from a window's beginning"
    );
    assert!(allowed.iter().all(|one| !one.excess.is_nan()));
    for predictions in [&masked, &allowed] {
        assert!(largest_difference(predictions.iter().filter(|one| one.from_start)) < EQUAL_WITHIN);
    }
    let [first, ..] = buckets(&allowed, false);
    assert!(first.share() > 2.0 * KEEP, "{:.3} are kept", first.share());
}
