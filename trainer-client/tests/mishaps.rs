//! Runs that go wrong half way, and what they leave behind.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use sluice_feed::batch::Batch;
use sluice_feed::document::Document;
use sluice_feed::pack::BatchShape;
use sluice_feed::select::{Needs, Objective};
use sluice_feed::stream::{DocumentStream, Next, Origin, Position, StreamError};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_trainer::failure::exit_code;
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig, Variant};
use sluice_trainer::run::checkpoints::{DataState, Reached, latest_checkpoint, read_state};
use sluice_trainer::run::folder::RunFolder;
use sluice_trainer::run::picture::PictureDocuments;
use sluice_trainer::run::record::RunRecord;
use sluice_trainer::run::recorded::RecordedRun;
use sluice_trainer::text::TextTokenizer;
use sluice_trainer::training::learner::{Learner, Measured, StepOutcome};
use sluice_trainer::training::schedule::{Schedule, Shape};
use sluice_trainer::training::{Plan, Training};
use sluice_trainer::watch::progress::Progress;
use sluice_trainer::watch::telemetry::Telemetry;
use support::bigram::Bigram;
use support::{feed_over, write_tokenizer};

const SHAPE: BatchShape = BatchShape { rows: 1, len: 8 };

/// Documents that fill a row, and so a batch, each, and then a record of another reference model.
struct Failing {
    documents: u64,
    handed_out: u64,
}

impl Failing {
    fn after(documents: u64) -> Self {
        Self { documents, handed_out: 0 }
    }
}

impl DocumentStream for Failing {
    fn lanes(&self) -> usize {
        1
    }

    fn next_document(&mut self, _lane: usize) -> Result<Next, StreamError> {
        if self.handed_out == self.documents {
            return Err(StreamError::ForeignReference {
                origin: Origin { topic: "scored".into(), partition: 0, offset: 9 },
                found: Fingerprint::of_bytes(b"b"),
                expected: Fingerprint::of_bytes(b"a"),
            });
        }
        self.handed_out += 1;
        Ok(Next::Document(Document::plain("d".into(), "s".into(), vec![1, 2, 3, 4, 5, 6, 7, 8])))
    }

    fn position(&self, _lane: usize) -> Position {
        Position { epoch: 1, documents: self.handed_out, ..Position::default() }
    }

    fn reference_model(&self) -> Option<Fingerprint> {
        None
    }
}

/// A table whose gradient is not finite at its third step.
struct Diverging {
    table: Bigram,
    steps: u64,
}

impl Learner for Diverging {
    fn measure(&self, batch: &Batch, needs: Needs) -> Measured {
        self.table.measure(batch, needs)
    }

    fn accumulate(&mut self, batch: &Batch, needs: Needs, select: &mut dyn FnMut(&Measured) -> Vec<u32>) {
        self.table.accumulate(batch, needs, select);
    }

    fn update(&mut self, learning_rate: f64) -> StepOutcome {
        self.steps += 1;
        if self.steps < 3 {
            return self.table.update(learning_rate);
        }
        StepOutcome { kept_loss: 1.0, kept: 7, gradient_norm: f32::INFINITY }
    }

    fn save(&self, folder: &Path) -> anyhow::Result<()> {
        self.table.save(folder)
    }

    fn digest(&self) -> anyhow::Result<Fingerprint> {
        self.table.digest()
    }

    fn load(&mut self, folder: &Path) -> anyhow::Result<()> {
        self.table.load(folder)
    }
}

/// Trains for at most ten steps, a checkpoint every `checkpoint_every`, and gives the error that ended it.
fn fail(folder: &Path, learner: &mut dyn Learner, stream: Failing, checkpoint_every: u64) -> anyhow::Error {
    let tokenizer = TextTokenizer::read(&write_tokenizer(folder)).unwrap();
    let mut run = RunFolder::create(&folder.join("run")).unwrap();
    let schedule =
        Schedule { shape: Shape::Cosine, peak: 1.0, warmup_steps: 1, decay_steps: 0, floor: 0.1, steps: 10 };
    let record = RunRecord {
        command: "run".into(),
        objective: Objective::Clm,
        seed: 1,
        batch_size: SHAPE.rows,
        accumulate: 1,
        sequence_length: SHAPE.len,
        schedule,
        tokenizer: tokenizer.fingerprint(),
        reference_model: None,
        initial_weights: learner.digest().unwrap(),
        settings: BTreeMap::new(),
        versions: BTreeMap::new(),
    };
    let training = Training {
        learner,
        feed: feed_over(stream, SHAPE, 0, tokenizer.fingerprint()),
        plan: Plan {
            objective: Objective::Clm,
            schedule,
            seed: 1,
            eval_every: 10,
            checkpoint_every,
            best_by: None,
        },
        evals: &[],
        tokenizer: &tokenizer,
        folder: &mut run,
        stop: &AtomicBool::new(false),
        progress: Progress::silent(),
        telemetry: Telemetry::default(),
    };
    training.run(record).unwrap_err()
}

/// Steps done and documents read.
fn state_of(checkpoint: &Path) -> (u64, u64) {
    let (reached, data) = read_state(checkpoint).unwrap();
    (reached.step, data.feed.held[&0].position.documents)
}

#[test]
fn a_stream_that_fails_leaves_a_checkpoint_of_the_last_step() {
    for checkpoint_every in [2, 3, 100] {
        let folder = tempfile::tempdir().unwrap();
        let stream = Failing::after(4);
        let error = fail(folder.path(), &mut Bigram::new(256), stream, checkpoint_every);
        let checkpoint = latest_checkpoint(&folder.path().join("run")).unwrap().unwrap();
        assert!(checkpoint.ends_with("step-0000004"));
        assert_eq!(state_of(&checkpoint), (4, 4));
        let shown = format!("{error:#}");
        assert!(
            shown.contains("after step 4") && shown.contains(&checkpoint.display().to_string()),
            "{shown}"
        );
        assert!(shown.contains("partition 0, offset 9"), "{shown}");
        assert_eq!(exit_code(&error), 65);
    }
}

#[test]
fn a_stream_that_fails_before_the_first_step_leaves_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let stream = Failing::after(0);
    let error = fail(folder.path(), &mut Bigram::new(256), stream, 2);
    assert_eq!(exit_code(&error), 65);
    assert_eq!(latest_checkpoint(&folder.path().join("run")).unwrap(), None);
    assert!(RunFolder::create(&folder.path().join("run")).is_ok(), "nothing is in the way of another try");
}

#[test]
fn a_step_that_is_not_finite_leaves_a_checkpoint_of_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let mut learner = Diverging { table: Bigram::new(256), steps: 0 };
    let stream = Failing::after(100);
    let error = fail(folder.path(), &mut learner, stream, 100);
    let checkpoint = latest_checkpoint(&folder.path().join("run")).unwrap().unwrap();
    assert_eq!(
        state_of(&checkpoint),
        (2, 3),
        "what the third step would have learnt from is in the checkpoint"
    );
    let shown = format!("{error:#}");
    assert!(shown.contains("step 3 is not finite") && shown.contains("after step 2"), "{shown}");
    assert!(shown.contains(&checkpoint.display().to_string()), "{shown}");
}

#[test]
fn weights_that_are_not_finite_are_never_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig {
        vocab_size: 256,
        hidden_size: 8,
        intermediate_size: 8,
        layers: 1,
        heads: 2,
        kv_heads: 2,
        max_position_embeddings: 8,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        variant: Variant::default(),
    };
    let mut learner = BurnLearner::new(config, AdamWConfig::default(), 1).unwrap();
    let mut packer = sluice_feed::pack::Packer::new(SHAPE);
    packer.push(&Document::plain("d".into(), "s".into(), vec![1, 2, 3, 4, 5, 6, 7, 8]));
    packer.close();
    let batch = packer.next_batch().unwrap().batch;
    // The gradient is finite, but no weight is after such a stride.
    let outcome = learner.step(&batch, 1e300, &mut |_| vec![0, 1, 2]);
    assert!(outcome.gradient_norm.is_finite());
    let error = format!("{:#}", learner.save(folder.path()).unwrap_err());
    assert!(error.contains("not finite"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn two_runs_never_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let first = RunFolder::create(&out).unwrap();
    let error = RunFolder::create(&out).unwrap_err().to_string();
    assert!(error.contains("another process") && error.contains(&out.display().to_string()), "{error}");
    drop(first);
    assert!(RunFolder::create(&out).is_ok(), "the lock goes with its owner");
}

#[test]
fn checkpoints_of_an_earlier_run_are_in_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    std::fs::create_dir_all(out.join("checkpoints/step-0000004")).unwrap();
    let error = RunFolder::create(&out).unwrap_err().to_string();
    assert!(error.contains("checkpoints of an earlier run"), "{error}");
    std::fs::remove_dir_all(out.join("checkpoints")).unwrap();

    let mut run = RunFolder::create(&out).unwrap();
    std::fs::create_dir_all(out.join("checkpoints/step-0000004")).unwrap();
    let tokenizer = TextTokenizer::read(&write_tokenizer(folder.path())).unwrap();
    let reached = Reached { step: 4, ..Reached::default() };
    let feed = feed_over(Failing::after(0), SHAPE, 0, tokenizer.fingerprint()).snapshot();
    let data = DataState { feed, sources: vec![], picture: PictureDocuments::default() };
    let error = run.checkpoint(&Bigram::new(2), &tokenizer, &reached, &data).unwrap_err().to_string();
    assert!(error.contains("step-0000004 is there already"), "{error}");
}

#[test]
fn metrics_cut_inside_a_character_lose_their_last_line_only() {
    let folder = tempfile::tempdir().unwrap();
    let stream = Failing::after(2);
    fail(folder.path(), &mut Bigram::new(256), stream, 100);
    let run = folder.path().join("run");
    let whole = RecordedRun::read(&run).unwrap().metrics;
    let path = run.join("metrics.jsonl");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend_from_slice("{\"type\":\"eval\",\"step\":2,\"tokens\":1,\"set\":\"é".as_bytes());
    bytes.pop();
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(RecordedRun::read(&run).unwrap().metrics, whole);
    // The same in the middle is damage.
    bytes.extend_from_slice(b"\n{}\n");
    std::fs::write(&path, &bytes).unwrap();
    assert!(RecordedRun::read(&run).is_err());
}
