//! What it does to a selection to make it in one forward pass: instead of the best tokens of all micro-batches of a step, those above
//! a threshold that earlier steps have left, or the best of each micro-batch.

use std::path::Path;

use anyhow::{Context as _, ensure};
use clap::Args;
use serde_json::{Value, json};
use sluice_feed::batch::Batch;
use sluice_feed::document::Document;
use sluice_feed::pack::{BatchShape, Packer};
use sluice_feed::select::{
    Choice, KeepRatio, KeepSchedule, Needs, Objective, Rule, Scope, Score, Selection, Signals, Thresholds,
    Turn,
};
use sluice_text::output::say;
use sluice_text::{Fields, Format, TEXT_BYTES_MAX, TOKENS_MAX, TextReader};
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig, Variant};
use sluice_trainer::text::TextTokenizer;
use sluice_trainer::training::learner::{Learner as _, Measured};

const LEARNING_RATE: f64 = 1e-3;
/// Steps over which the learning rate rises.
const WARMUP_STEPS: usize = 20;

/// The runs that are compared.
#[derive(Args, Clone, Copy, Debug)]
pub struct Setup {
    /// Steps of each run, and twice as many of the reference's, on one micro-batch each.
    #[arg(long, default_value_t = 150)]
    pub steps: usize,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 4)]
    pub micro_batches: usize,
    /// Sequences of a micro-batch.
    #[arg(long, default_value_t = 4)]
    pub rows: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 256)]
    pub len: usize,
    /// Share of the tokens that is kept.
    #[arg(long, default_value_t = 0.6)]
    pub keep: f64,
    /// Decides initial weights and the order of documents.
    #[arg(skip)]
    pub seed: u64,
}

/// Text to train on, and to measure on.
pub struct Texts {
    tokenizer: TextTokenizer,
    curated: Vec<Vec<u32>>,
    mixed: Vec<Vec<u32>>,
    held_out: Vec<Vec<u32>>,
}

impl Texts {
    /// Reads JSON Lines with a field "text".
    pub fn read(tokenizer: &Path, [curated, mixed, held_out]: [&Path; 3]) -> anyhow::Result<Self> {
        let tokenizer = TextTokenizer::read(tokenizer)?;
        let documents = |path: &Path| documents(path, &tokenizer);
        let (curated, mixed, held_out) = (documents(curated)?, documents(mixed)?, documents(held_out)?);
        Ok(Self { tokenizer, curated, mixed, held_out })
    }
}

fn documents(path: &Path, tokenizer: &TextTokenizer) -> anyhow::Result<Vec<Vec<u32>>> {
    let reader =
        TextReader { format: Format::Jsonl, fields: Fields::default(), text_bytes_max: TEXT_BYTES_MAX };
    let opened = reader.open(path, |raw| raw).with_context(|| format!("cannot read {}", path.display()))?;
    opened.map(|document| Ok(tokenizer.encode(&document?.text, TOKENS_MAX)?)).collect()
}

/// Whole micro-batches of documents in an order of their own.
fn packed(documents: &[Vec<u32>], setup: &Setup) -> anyhow::Result<Vec<Batch>> {
    let mut order: Vec<&Vec<u32>> = documents.iter().collect();
    fastrand::Rng::with_seed(setup.seed).shuffle(&mut order);
    let mut packer = Packer::new(BatchShape { rows: setup.rows, len: setup.len });
    for (number, tokens) in order.into_iter().enumerate() {
        packer.push(&Document::plain(number.to_string(), String::new(), tokens.clone()));
    }
    packer.close();
    let batches: Vec<Batch> = std::iter::from_fn(|| packer.next_batch()).map(|packed| packed.batch).collect();
    ensure!(
        batches.len() >= setup.micro_batches,
        "too little text for {} micro-batches",
        setup.micro_batches
    );
    Ok(batches)
}

/// Trains a run for each scope and compares what they keep and reach.
pub fn compare(texts: &Texts, setup: &Setup) -> anyhow::Result<Value> {
    let config = ModelConfig {
        vocab_size: texts.tokenizer.vocabulary() as usize,
        hidden_size: 128,
        intermediate_size: 384,
        layers: 4,
        heads: 4,
        kv_heads: 4,
        max_position_embeddings: setup.len,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        variant: Variant::default(),
    };
    let learner = |seed| BurnLearner::new(config.clone(), AdamWConfig::default(), seed);
    let held_out = packed(&texts.held_out, setup)?;
    let mut reference = learner(setup.seed + 1000)?;
    let curated = packed(&texts.curated, setup)?;
    for step in 0..2 * setup.steps {
        reference.step(&curated[step % curated.len()], rate(step), &mut |losses| {
            (0..).zip(losses).filter(|(_, loss)| !loss.is_nan()).map(|(position, _)| position).collect()
        });
    }
    say(format_args!("reference: {:.4} on the held-out text", mean_loss(&reference, &held_out)));
    let mut batches = packed(&texts.mixed, setup)?;
    for batch in &mut batches {
        // Under the very contexts that the students see.
        batch.reference = reference.losses(batch);
    }
    let mut runs = serde_json::Map::new();
    for (name, scope) in SCOPES {
        let mut student = learner(setup.seed)?;
        let seen = train(&mut student, &batches, setup, scope)?;
        let loss = mean_loss(&student, &held_out);
        say(format_args!("{name}: {loss:.4} on the held-out text; {seen}"));
        runs.insert(name.to_owned(), json!({ "held_out_loss": loss, "against_batch": seen }));
    }
    Ok(json!({ "reference_loss": mean_loss(&reference, &held_out), "runs": runs }))
}

const SCOPES: [(&str, Scope); 3] = [
    ("batch", Scope::Batch),
    ("running-quantile", Scope::RunningQuantile),
    ("micro-batch", Scope::MicroBatch),
];

fn rate(step: usize) -> f64 {
    LEARNING_RATE * ((step + 1) as f64 / WARMUP_STEPS as f64).min(1.0)
}

/// A run of one scope, and what each of the others would have kept at the same steps beside what the whole batch's best are.
fn train(student: &mut BurnLearner, batches: &[Batch], setup: &Setup, scope: Scope) -> anyhow::Result<Value> {
    let keep = KeepRatio::try_from(setup.keep)?;
    let objective = |scope| {
        let rule = Rule::Keep(KeepSchedule::constant(keep));
        Objective::Slm(Selection { score: Score::Excess, rule, scope, warmup_steps: 0 })
    };
    let mut thresholds = Thresholds::default();
    let mut agreements: Vec<(&str, Agreement)> =
        SCOPES.iter().map(|(name, _)| (*name, Agreement::default())).collect();
    for step in 0..setup.steps {
        let first = step * setup.micro_batches;
        let micro_batches: Vec<&Batch> =
            (first..first + setup.micro_batches).map(|index| &batches[index % batches.len()]).collect();
        let measured: Vec<Measured> =
            micro_batches.iter().map(|batch| student.measure(batch, Needs::default())).collect();
        let signals: Vec<Signals<'_>> =
            measured.iter().zip(&micro_batches).map(|(measured, batch)| measured.signals(batch)).collect();
        let turn =
            Turn { seed: setup.seed, step: step as u64 + 1, steps: setup.steps as u64, micro_batch: 0 };
        let choices =
            SCOPES.map(|(_, scope)| objective(scope).select(&signals, setup.len, turn, &thresholds));
        // The first steps teach the thresholds.
        if step >= WARMUP_STEPS {
            for ((_, agreement), choice) in agreements.iter_mut().zip(&choices) {
                agreement.add(choice, &choices[0]);
            }
        }
        let lowest: Vec<_> = choices[1].iter().map(|choice| choice.lowest).collect();
        let own = SCOPES.iter().position(|(_, other)| *other == scope).context("an unknown scope")?;
        for (batch, choice) in micro_batches.iter().zip(&choices[own]) {
            student.accumulate_chosen(batch, &choice.kept, None, &mut |_| {});
        }
        student.update(rate(step));
        thresholds.end_step(&lowest);
    }
    Ok(agreements.into_iter().map(|(name, agreement)| (name.to_owned(), agreement.summary())).collect())
}

/// How a choice compares with that of the whole batch, step by step.
#[derive(Default)]
struct Agreement {
    /// Tokens kept, of those to choose from.
    kept: Vec<f64>,
    /// Tokens that one of the two keeps and the other does not, of those that the whole batch's choice keeps.
    other: Vec<f64>,
}

impl Agreement {
    fn add(&mut self, choices: &[Choice], best: &[Choice]) {
        let kept = |choices: &[Choice]| choices.iter().map(|choice| choice.kept.len()).sum::<usize>() as f64;
        let scores = choices.iter().flat_map(|choice| &choice.scores);
        let scored = scores.filter(|score| !score.is_nan()).count() as f64;
        let both: usize = choices
            .iter()
            .zip(best)
            .map(|(own, best)| own.kept.iter().filter(|at| best.kept.binary_search(at).is_ok()).count())
            .sum();
        self.kept.push(kept(choices) / scored);
        self.other.push((kept(choices) + kept(best) - 2.0 * both as f64) / kept(best));
    }

    fn summary(mut self) -> Value {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let (kept, other) = (mean(&self.kept), mean(&self.other));
        self.kept.sort_by(f64::total_cmp);
        json!({
            "kept_mean": kept,
            "kept_min": self.kept.first(),
            "kept_max": self.kept.last(),
            "chosen_otherwise": other,
        })
    }
}

/// Mean loss in nats of every target.
fn mean_loss(learner: &BurnLearner, batches: &[Batch]) -> f64 {
    let losses = batches.iter().flat_map(|batch| learner.losses(batch)).filter(|loss| !loss.is_nan());
    let (sum, count) = losses.fold((0.0, 0u32), |(sum, count), loss| (sum + f64::from(loss), count + 1));
    sum / f64::from(count)
}
