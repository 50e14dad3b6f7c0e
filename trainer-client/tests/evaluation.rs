//! Held-out text: what it is read with, when it is measured, and what becomes of the best model.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::document::Document;
use sluice_feed::feed::Feed;
use sluice_feed::pack::{BatchShape, Packing};
use sluice_feed::plan::Plan as FeedPlan;
use sluice_feed::select::{Needs, Objective};
use sluice_feed::stream::{Extent, Shard, ShuffledDocuments};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_trainer::model::BurnLearner;
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::run::checkpoints::{Best, checkpoints, read_state};
use sluice_trainer::run::folder::RunFolder;
use sluice_trainer::run::metrics::{EvalMetric, Metric, StepMetric};
use sluice_trainer::run::record::RunRecord;
use sluice_trainer::run::recorded::RecordedRun;
use sluice_trainer::text::{Bounds, TextTokenizer};
use sluice_trainer::training::evaluate::{EvalFile, EvalSet, policy_of, read_sets};
use sluice_trainer::training::learner::{Learner, Measured, StepOutcome};
use sluice_trainer::training::schedule::{Schedule, Shape};
use sluice_trainer::training::{Ending, Outcome, Plan, Training};
use sluice_trainer::watch::progress::Progress;
use sluice_trainer::watch::telemetry::Telemetry;
use support::bigram::Bigram;
use support::write_tokenizer;

const SHAPE: BatchShape = BatchShape { rows: 4, len: 32 };
const STEPS: u64 = 25;

/// A table that shows what it is asked to measure outside of training, and may do something else instead.
struct Spy {
    table: Bigram,
    measured: RefCell<Vec<Batch>>,
    /// Set at this measurement, counted from 1.
    stop_at: Option<(usize, Arc<AtomicBool>)>,
    /// Losses of the measurements, where they are not the table's.
    losses: Vec<f32>,
    /// The training step whose losses break down, counted from 1.
    breaks_at: Option<u64>,
    steps: Cell<u64>,
}

impl Spy {
    fn new() -> Self {
        Self {
            table: Bigram::new(256),
            measured: RefCell::default(),
            stop_at: None,
            losses: vec![],
            breaks_at: None,
            steps: Cell::new(0),
        }
    }
}

impl Learner for Spy {
    fn measure(&self, batch: &Batch, needs: Needs) -> Measured {
        self.measured.borrow_mut().push(batch.clone());
        let count = self.measured.borrow().len();
        if let Some((at, stop)) = &self.stop_at {
            stop.fetch_or(count == *at, Ordering::Relaxed);
        }
        let mut measured = self.table.measure(batch, needs);
        if let Some(&loss) = self.losses.get(count - 1) {
            measured.losses.iter_mut().filter(|of| !of.is_nan()).for_each(|of| *of = loss);
        }
        measured
    }

    fn accumulate(&mut self, batch: &Batch, needs: Needs, select: &mut dyn FnMut(&Measured) -> Vec<u32>) {
        self.steps.set(self.steps.get() + 1);
        if self.breaks_at == Some(self.steps.get()) {
            let mut measured = self.table.measure(batch, needs);
            // One of many, as where a single row has run over.
            *measured.losses.iter_mut().find(|loss| !loss.is_nan()).unwrap() = f32::NAN;
            assert!(select(&measured).is_empty(), "nothing is learnt from what has broken down");
            return;
        }
        self.table.accumulate(batch, needs, select);
    }

    fn update(&mut self, learning_rate: f64) -> StepOutcome {
        self.table.update(learning_rate)
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

fn set_of(folder: &Path, name: &str, lines: &str) -> EvalSet {
    set_between(folder, name, lines, (None, None))
}

/// The same with what every text stands between.
fn set_between(
    folder: &Path,
    name: &str,
    lines: &str,
    (begin, end): (Option<&str>, Option<&str>),
) -> EvalSet {
    let tokenizer = TextTokenizer::read(&write_tokenizer(folder)).unwrap();
    let path = folder.join(format!("{name}.jsonl"));
    std::fs::write(&path, lines).unwrap();
    let bounds = Bounds::named(&tokenizer, begin, end).unwrap();
    read_sets(&[EvalFile { name: name.into(), path }], &tokenizer, bounds, SHAPE.rows).unwrap().remove(0)
}

/// A run, or what comes of going on with it.
fn train(folder: &Path, learner: &mut Spy, resumes: bool, best_by: Option<&str>) -> anyhow::Result<Outcome> {
    let tokenizer = TextTokenizer::read(&write_tokenizer(folder)).unwrap();
    let evals = ["one", "two"].map(|name| set_of(folder, name, "{\"text\": \"abcabc\"}\n"));
    let documents = (0..200).map(|n: u32| {
        Document::plain(
            n.to_string(),
            String::new(),
            (0..20 + n % 10).map(|at| (n + at * at) % 200).collect(),
        )
    });
    let stop = learner.stop_at.as_ref().map_or_else(Arc::default, |(_, stop)| Arc::clone(stop));
    let stream = ShuffledDocuments::new(documents.collect(), 2, 3, Arc::clone(&stop));
    let out = folder.join("run");
    let (mut run, checkpoint) =
        if resumes { RunFolder::resume(&out)? } else { (RunFolder::create(&out)?, None) };
    run.keep_checkpoints(1);
    let begun = checkpoint.map(|checkpoint| {
        learner.load(&checkpoint).unwrap();
        read_state(&checkpoint).unwrap()
    });
    let snapshot = begun.as_ref().map(|(_, data)| &data.feed);
    let read =
        snapshot.map_or(0, |snapshot| snapshot.held.values().map(|lane| lane.position.documents).sum());
    let plan = FeedPlan {
        topic: "memory".into(),
        extent: Extent::UntilEnd { epochs: 2 },
        shape: SHAPE,
        packing: Packing::default(),
        micro_batches: 1,
        shuffle_buffer: 0,
        seed: 1,
    };
    let fingerprint = tokenizer.fingerprint();
    let feed = Feed::over(Box::new(stream.after(read)), plan, Shard::WHOLE, snapshot, fingerprint)?;
    let schedule = Schedule {
        shape: Shape::Cosine,
        peak: 5.0,
        warmup_steps: 2,
        decay_steps: 0,
        floor: 0.1,
        steps: STEPS,
    };
    let record = RunRecord {
        command: "run".into(),
        objective: Objective::Clm,
        seed: 1,
        batch_size: SHAPE.rows,
        accumulate: 1,
        sequence_length: SHAPE.len,
        schedule,
        tokenizer: fingerprint,
        reference_model: None,
        initial_weights: learner.digest()?,
        settings: BTreeMap::new(),
        versions: BTreeMap::new(),
    };
    let best_by = best_by.map(str::to_owned);
    let training = Training {
        learner,
        feed,
        plan: Plan {
            objective: Objective::Clm,
            schedule,
            seed: 1,
            eval_every: 10,
            checkpoint_every: 7,
            best_by,
        },
        evals: &evals,
        tokenizer: &tokenizer,
        folder: &mut run,
        stop: &stop,
        progress: Progress::silent(),
        telemetry: Telemetry::default(),
    };
    match begun {
        None => training.run(record),
        Some((reached, data)) => training.resume(reached, data.sources, data.picture),
    }
}

/// What a run has written down, less its times.
fn metrics(folder: &Path) -> Vec<Metric> {
    let timeless = |metric| match metric {
        Metric::Step(step) => {
            Metric::Step(StepMetric { seconds: 0.0, data_wait_seconds: 0.0, cpu_seconds: 0.0, ..step })
        }
        other => other,
    };
    RecordedRun::read(&folder.join("run")).unwrap().metrics.into_iter().map(timeless).collect()
}

#[test]
fn an_evaluation_that_a_stop_has_cut_short_is_made_up_for() {
    let whole = tempfile::tempdir().unwrap();
    train(whole.path(), &mut Spy::new(), false, None).unwrap();
    let wanted = metrics(whole.path());
    // Two sets before the first step and after steps 10, 20 and 25: a stop within the first or the second of each pair.
    for at in 3..=8 {
        let folder = tempfile::tempdir().unwrap();
        let stop_at = Some((at, Arc::default()));
        let outcome = train(folder.path(), &mut Spy { stop_at, ..Spy::new() }, false, None).unwrap();
        // By the time of the last one all is done.
        let ending = if at == 8 { Ending::Finished } else { Ending::Stopped };
        assert_eq!((outcome.ending, outcome.steps % 5), (ending, 0), "stopped at {at}");
        if at % 2 == 1 {
            assert_ne!(metrics(folder.path()), wanted, "stopped at {at}");
        }
        train(folder.path(), &mut Spy::new(), true, None).unwrap();
        assert_eq!(metrics(folder.path()), wanted, "stopped at {at}");
    }
}

#[test]
fn the_best_model_is_kept_beside_the_last() {
    let folder = tempfile::tempdir().unwrap();
    // By the second set: 5 before the first step, then 3 after step 10, 4 after 20, 3 after 25.
    let losses = vec![9.0, 5.0, 9.0, 3.0, 1.0, 4.0, 9.0, 3.0];
    train(folder.path(), &mut Spy { losses, ..Spy::new() }, false, Some("two")).unwrap();
    let run = folder.path().join("run");
    let best = Best::read(&run).unwrap().unwrap();
    assert_eq!(best, Best { step: 10, set: "two".into(), loss: 3.0 }, "of two that are as good the earlier");
    let names: Vec<_> = checkpoints(&run).unwrap();
    assert_eq!(names, [best.folder(&run), run.join("checkpoints/step-0000025")]);
    assert_eq!(read_state(&best.folder(&run)).unwrap().0.step, 10);

    // A run that is gone on with still knows it; a better one takes its place.
    let folder = tempfile::tempdir().unwrap();
    let stop_at = Some((5, Arc::default()));
    let losses = vec![9.0, 5.0, 9.0, 3.0, 1.0];
    train(folder.path(), &mut Spy { stop_at, losses, ..Spy::new() }, false, Some("two")).unwrap();
    let run = folder.path().join("run");
    assert_eq!(Best::read(&run).unwrap().unwrap().step, 10);
    train(folder.path(), &mut Spy { losses: vec![4.0, 9.0, 2.0], ..Spy::new() }, true, Some("two")).unwrap();
    assert_eq!(Best::read(&run).unwrap().unwrap(), Best { step: 25, set: "two".into(), loss: 2.0 });
    assert_eq!(checkpoints(&run).unwrap(), [run.join("checkpoints/step-0000025")]);
}

#[test]
fn a_step_whose_losses_break_down_is_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let error = train(folder.path(), &mut Spy { breaks_at: Some(9), ..Spy::new() }, false, None).unwrap_err();
    let said = format!("{error:#}");
    assert!(
        said.contains("step 9 was not taken: the model gives 1 of the ") && said.contains("not finite"),
        "{said}"
    );
    assert!(said.contains("step-0000008"), "{said}");
}

#[test]
fn what_stands_before_an_answer_is_read_and_not_predicted() {
    let folder = tempfile::tempdir().unwrap();
    // A token for each byte. The second document is longer than a window, the third has an answer that is.
    let (long, longer) = ("x".repeat(40), "y".repeat(40));
    let lines = format!(
        "{{\"context\": \"2+2=\", \"text\": \"44\"}}\n{{\"context\": \"{long}\", \"text\": \"yz\"}}\n\
         {{\"context\": \"ab\", \"text\": \"{longer}\"}}\n{{\"text\": \"plain\"}}\n"
    );
    let set = set_of(folder.path(), "answers", &lines);
    assert_eq!((set.documents(), set.predictions()), (4, 2 + 2 + 40 + 4));
    let spy = Spy::new();
    let policy = policy_of(32);
    let losses = set.token_losses(&spy, policy, &AtomicBool::new(false)).unwrap().unwrap();
    assert_eq!(losses.len(), 48);
    assert!(losses.iter().all(|loss| (loss - 256f32.ln()).abs() < 1e-5), "{losses:?}");

    let batches = spy.measured.borrow();
    let rows: Vec<(&[u32], &[u32])> = batches
        .iter()
        .flat_map(|batch| batch.tokens.chunks_exact(batch.len).zip(batch.targets.chunks_exact(batch.len)))
        .collect();
    let tokens_of = |text: &str| {
        TextTokenizer::read(&folder.path().join("tokenizer.json")).unwrap().encode(text, 1000).unwrap()
    };
    let predicted = |row: &(&[u32], &[u32])| {
        row.1.iter().copied().filter(|&target| target != NO_TARGET).collect::<Vec<_>>()
    };
    assert_eq!(
        rows.len(),
        5,
        "a row of its own for each that fits, two for the long answer, one for the plain"
    );
    assert_eq!((&rows[0].0[..6], predicted(&rows[0])), (&*tokens_of("2+2=44"), tokens_of("44")));
    // The left end is lost, and no more of it than must be.
    let right_end = format!("{}yz", &long[10..]);
    assert_eq!((&rows[1].0[..32], predicted(&rows[1])), (&*tokens_of(&right_end), tokens_of("yz")));
    assert_eq!([&rows[2], &rows[3]].map(predicted).concat(), tokens_of(&longer), "each token once");
    assert_eq!(predicted(&rows[4]), tokens_of("lain"));
    assert!(batches[1].len < 32, "a batch is as long as its longest row");

    // Below ln 2 = 0.693 a token has more than half of the probability: so have all of the first answer's, and the plain text.
    let mut sure = vec![0.1; 48];
    (sure[2], sure[4]) = (0.7, 0.8);
    let summary = set.summary(policy, &sure);
    assert_eq!((summary.sure, summary.predictions), (Some(0.5), 48));
    assert!((summary.loss - (0.1 * 46.0 + 1.5) / 48.0).abs() < 1e-6);
}

#[test]
fn texts_stand_between_the_tokens_that_the_topics_documents_stand_between() {
    let folder = tempfile::tempdir().unwrap();
    let config = sluice_trainer::model::ModelConfig { vocab_size: 256, ..support::model::tiny(false) };
    let learner = BurnLearner::new(config, AdamWConfig::default(), 7).unwrap();
    let losses =
        |set: EvalSet| set.token_losses(&learner, policy_of(12), &AtomicBool::new(false)).unwrap().unwrap();
    let plain = "{\"text\": \"abc\"}\n{\"context\": \"ab\", \"text\": \"cd\"}\n";
    let written_out = "{\"text\": \"<abc>\"}\n{\"context\": \"<ab\", \"text\": \"cd>\"}\n";
    let between = losses(set_between(folder.path(), "between", plain, (Some("<"), Some(">"))));
    assert_eq!(between.len(), 4 + 3);
    assert_eq!(between, losses(set_of(folder.path(), "written out", written_out)));

    let tokenizer = TextTokenizer::read(&folder.path().join("tokenizer.json")).unwrap();
    let error = Bounds::named(&tokenizer, Some("<bos>"), None).unwrap_err().to_string();
    assert_eq!(
        error,
        "the tokenizer knows no token \"<bos>\": give --begin-with one as its tokenizer.json spells it"
    );
}

#[test]
fn a_loss_depends_on_no_neighbour_and_on_no_packing() {
    let folder = tempfile::tempdir().unwrap();
    let config = sluice_trainer::model::ModelConfig { vocab_size: 256, ..support::model::tiny(false) };
    let learner = BurnLearner::new(config, AdamWConfig::default(), 7).unwrap();
    let texts = ["first", "the second of them, which is longer than a window", "33", "and a fourth"];
    let line = |text: &&str| format!("{{\"text\": \"{text}\"}}\n");
    let together = set_of(folder.path(), "all", &texts.iter().map(line).collect::<String>());
    let never = AtomicBool::new(false);
    for bos in [Bos::None, Bos::Document(65), Bos::Window(65)] {
        let policy = ContextPolicy { bos, ..policy_of(12) };
        let all = together.token_losses(&learner, policy, &never).unwrap().unwrap();
        let mut alone = Vec::new();
        for text in &texts {
            let set = set_of(folder.path(), "one", &line(text));
            alone.extend(set.token_losses(&learner, policy, &never).unwrap().unwrap());
        }
        assert_eq!(all.len(), alone.len(), "{bos:?}: in the order of the file");
        assert!(all.iter().zip(&alone).all(|(one, other)| (one - other).abs() < 1e-5), "{bos:?}");
    }
}

#[test]
fn losses_that_are_not_finite_fail_an_evaluation_and_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let set = set_of(folder.path(), "broken", "{\"text\": \"abc\"}\n{\"text\": \"de\"}\n");
    let spy = Spy { losses: vec![f32::INFINITY], ..Spy::new() };
    let error = set.token_losses(&spy, policy_of(32), &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(error.contains("gives 3 of the 3 predicted tokens of evaluation set broken"), "{error}");
}

#[test]
fn evaluations_are_written_down_with_what_they_predicted() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), &mut Spy::new(), false, None).unwrap();
    let evals: Vec<EvalMetric> = metrics(folder.path())
        .into_iter()
        .filter_map(|metric| if let Metric::Eval(eval) = metric { Some(eval) } else { None })
        .collect();
    let at: Vec<_> = evals.iter().map(|eval| (eval.step, eval.set.as_str(), eval.predictions)).collect();
    let pair = |step| [(step, "one", 5), (step, "two", 5)];
    assert_eq!(at, [0, 10, 20, 25].map(pair).concat());
}
