//! A whole run with a learner small enough to follow by hand: the books, the files, and repeatability.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sluice_feed::document::Document;
use sluice_feed::feed::{Alone, Step};
use sluice_feed::pack::BatchShape;
use sluice_feed::select::{KeepRatio, Objective, Score};
use sluice_feed::stream::{DocumentStream, Next, ShuffledDocuments};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_trainer::run::checkpoints::{checkpoints, latest_checkpoint, read_state};
use sluice_trainer::run::folder::RunFolder;
use sluice_trainer::run::metrics::{EvalMetric, Metric, StepMetric};
use sluice_trainer::run::record::RunRecord;
use sluice_trainer::run::recorded::RecordedRun;
use sluice_trainer::text::{Bounds, TextTokenizer};
use sluice_trainer::training::evaluate::{EvalFile, read_sets};
use sluice_trainer::training::learner::Learner;
use sluice_trainer::training::schedule::{Schedule, Shape};
use sluice_trainer::training::{Ending, Outcome, Plan, Training};
use sluice_trainer::watch::progress::Progress;
use sluice_trainer::watch::telemetry::Telemetry;
use support::bigram::Bigram;
use support::{feed_over, mixture, write_tokenizer};

const SHAPE: BatchShape = BatchShape { rows: 4, len: 32 };

fn slm() -> Objective {
    Objective::slm(Score::Excess, KeepRatio::try_from(0.6).unwrap())
}

fn documents() -> Vec<Document> {
    let fingerprint = Fingerprint::of_bytes(b"");
    let plain = mixture(60, fingerprint, fingerprint).into_iter().map(|scored| {
        let (tokens, losses) = (scored.document.tokens.to_vec(), scored.reference_losses.to_vec());
        Document::scored(scored.document.id, scored.document.source, tokens, losses).unwrap()
    });
    plain.collect()
}

/// Trains in `folder`, which also gets a tokenizer and an evaluation set.
fn train(folder: &Path, objective: Objective, steps: u64, stop: &Arc<AtomicBool>) -> (Outcome, RecordedRun) {
    let tokenizer = TextTokenizer::read(&write_tokenizer(folder)).unwrap();
    let held_out = folder.join("held-out.jsonl");
    std::fs::write(&held_out, "{\"text\": \"abcabc\"}\n\n{\"text\": \"é!\", \"id\": 1}\n").unwrap();
    let evals = read_sets(
        &[EvalFile { name: "letters".into(), path: held_out }],
        &tokenizer,
        Bounds::default(),
        SHAPE.rows,
    )
    .unwrap();
    let stream = ShuffledDocuments::new(documents(), 2, 3, Arc::clone(stop));
    let mut learner = Bigram::new(256);
    let out = folder.join("run");
    let mut run = RunFolder::create(&out).unwrap();
    let schedule =
        Schedule { shape: Shape::Cosine, peak: 20.0, warmup_steps: 2, decay_steps: 0, floor: 0.1, steps };
    let record = RunRecord {
        command: "run".into(),
        objective: objective.clone(),
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
        learner: &mut learner,
        feed: feed_over(stream, SHAPE, 5, tokenizer.fingerprint()),
        plan: Plan { objective, schedule, seed: 1, eval_every: 10, checkpoint_every: 8, best_by: None },
        evals: &evals,
        tokenizer: &tokenizer,
        folder: &mut run,
        stop,
        progress: Progress::silent(),
        telemetry: Telemetry::default(),
    };
    let outcome = training.run(record).unwrap();
    (outcome, RecordedRun::read(&out).unwrap())
}

fn split(run: &RecordedRun) -> (Vec<StepMetric>, Vec<EvalMetric>) {
    let mut lines = (vec![], vec![]);
    for metric in run.metrics.clone() {
        match metric {
            // Wall time is the one thing that may differ between two runs.
            Metric::Step(step) => {
                lines.0.push(StepMetric { seconds: 0.0, data_wait_seconds: 0.0, cpu_seconds: 0.0, ..step });
            }
            Metric::Eval(eval) => lines.1.push(eval),
            Metric::Scores(_) => {}
        }
    }
    lines
}

#[test]
fn the_books_of_a_selective_run_add_up() {
    let folder = tempfile::tempdir().unwrap();
    let (outcome, run) = train(folder.path(), slm(), 25, &Arc::default());
    let (steps, evals) = split(&run);
    assert_eq!((outcome.steps, outcome.ending, steps.len()), (25, Ending::Finished, 25));
    assert_eq!(evals.iter().map(|eval| eval.step).collect::<Vec<_>>(), [0, 10, 20, 25]);
    assert!(evals.iter().all(|eval| eval.set == "letters" && eval.predictions == 5 + 2));
    assert!((evals[0].loss - 256f64.ln()).abs() < 1e-4, "an untrained table is uniform");
    let (mut seen, mut kept) = (0, 0);
    for step in &steps {
        assert_eq!(step.kept, (0.6 * step.scored as f64 + 0.5).floor() as u64);
        seen += step.scored;
        kept += step.kept;
        assert_eq!((step.tokens, step.tokens_kept), (seen, kept));
        let mean = (step.kept as f64 * step.loss_selected.unwrap()
            + (step.scored - step.kept) as f64 * step.loss_unselected.unwrap())
            / step.scored as f64;
        assert!((mean - step.loss_all).abs() < 1e-6);
        assert!((step.loss_selected.unwrap() - f64::from(step.loss.unwrap())).abs() < 1e-4);
        assert_eq!(step.sources.values().map(|count| count.kept).sum::<u64>(), step.kept);
        assert_eq!(step.sources.values().map(|count| count.scored).sum::<u64>(), step.scored);
    }
    let share = |source: &str| {
        let counts: Vec<_> = steps[..4].iter().filter_map(|step| step.sources.get(source)).collect();
        let kept: u64 = counts.iter().map(|count| count.kept).sum();
        kept as f64 / counts.iter().map(|count| count.scored).sum::<u64>() as f64
    };
    let (pattern, noise) = (share("pattern"), share("noise"));
    assert!(pattern > noise + 0.3, "what only the reference knows is kept first: {pattern} and {noise}");
    assert!(steps[24].loss_all < steps[0].loss_all, "it learns");
}

#[test]
fn a_run_repeats_itself_and_its_controls_see_the_same_tokens() {
    let repeat = || {
        let folder = tempfile::tempdir().unwrap();
        let (_, run) = train(folder.path(), slm(), 12, &Arc::default());
        (split(&run), run.picture)
    };
    assert_eq!(repeat(), repeat());
    let (slm_steps, _) = repeat().0;
    for objective in [Objective::Clm, Objective::slm(Score::Random, KeepRatio::try_from(0.6).unwrap())] {
        let folder = tempfile::tempdir().unwrap();
        let (steps, _) = split(&train(folder.path(), objective.clone(), 12, &Arc::default()).1);
        let tokens = |steps: &[StepMetric]| steps.iter().map(|step| step.tokens).collect::<Vec<_>>();
        assert_eq!(tokens(&steps), tokens(&slm_steps));
        let kept = |steps: &[StepMetric]| steps.iter().map(|step| step.kept).collect::<Vec<_>>();
        if objective == Objective::Clm {
            assert!(steps.iter().all(|step| step.kept == step.scored && step.loss_unselected.is_none()));
        } else {
            assert_eq!(kept(&steps), kept(&slm_steps));
        }
    }
}

#[test]
fn checkpoints_are_whole_and_the_last_two_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (outcome, run) = train(folder.path(), slm(), 25, &Arc::default());
    let out = folder.path().join("run");
    let names: Vec<String> = checkpoints(&out)
        .unwrap()
        .iter()
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    assert_eq!(names, ["step-0000024", "step-0000025"]);
    let last = latest_checkpoint(&out).unwrap().unwrap();
    let (reached, data) = read_state(&last).unwrap();
    assert_eq!(
        (reached.step, reached.tokens, reached.tokens_kept),
        (25, outcome.tokens, outcome.tokens_kept)
    );
    let position = data.feed.held[&0].position;
    assert!(position.documents > 0 && position.epoch >= 1);
    assert!(last.join("tokenizer.json").is_file() && last.join("model.safetensors").is_file());
    let picture = run.picture.unwrap();
    assert_eq!(picture.documents.len(), 4, "two of each source");
    for token in picture.documents.iter().flat_map(|document| &document.tokens) {
        let kept = token.excess.is_some_and(|excess| excess >= picture.threshold.unwrap());
        assert_eq!(token.kept, kept);
    }
    assert!(RunFolder::create(&out).is_err(), "a run never overwrites another");
}

#[test]
fn a_stream_that_ends_and_a_request_to_stop_both_leave_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (outcome, _) = train(folder.path(), slm(), 10_000, &Arc::default());
    assert_eq!(outcome.ending, Ending::StreamEnded);
    let all: u64 = documents().iter().map(|document| document.tokens().len() as u64 - 1).sum();
    assert_eq!(outcome.tokens, 2 * all, "two epochs, each prediction once");
    let stream = ShuffledDocuments::new(documents(), 2, 3, Arc::default());
    let mut feed = feed_over(stream, SHAPE, 5, Fingerprint::of_bytes(b""));
    let step = || matches!(feed.next_step(&mut Alone).unwrap(), Step::Batches(_)).then_some(());
    assert_eq!(outcome.steps, std::iter::from_fn(step).count() as u64);
    assert!(
        latest_checkpoint(&folder.path().join("run"))
            .unwrap()
            .unwrap()
            .ends_with(format!("step-{:07}", outcome.steps))
    );

    let stop = Arc::new(AtomicBool::new(true));
    let mut stream = ShuffledDocuments::new(documents(), 2, 3, Arc::clone(&stop));
    assert_eq!(stream.next_document(0).unwrap(), Next::Stopped);
    stop.store(false, Ordering::Relaxed);
    assert!(matches!(stream.next_document(0).unwrap(), Next::Document(_)));
}

#[test]
fn a_special_token_spelled_in_a_text_is_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_tokenizer(folder.path());
    let mut file: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    file["added_tokens"] = serde_json::json!([{ "id": 256, "content": "<|endoftext|>", "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false }]);
    std::fs::write(&path, file.to_string()).unwrap();
    let tokenizer = TextTokenizer::read(&path).unwrap();
    assert_eq!(tokenizer.vocabulary(), 257);
    let tokens = tokenizer.encode("a<|endoftext|>b", usize::MAX).unwrap();
    assert_eq!(tokens.len(), 15, "one token for each byte: {tokens:?}");
    assert!(!tokens.contains(&256));
}

#[test]
fn pieces_of_text_join_to_the_text() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = TextTokenizer::read(&write_tokenizer(folder.path())).unwrap();
    let text = "x² = 1\n→ naïve 🙂 <b>";
    let tokens = tokenizer.encode(text, usize::MAX).unwrap();
    assert_eq!(tokens.len(), text.len(), "one token for each byte");
    let pieces = tokenizer.pieces(&tokens);
    assert_eq!(pieces.len(), tokens.len());
    assert_eq!(pieces.concat(), text);
    assert_eq!(pieces[1..3], ["", "²"], "a character stands with its last byte");
}
