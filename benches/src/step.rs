//! The training step that is measured: one model, one batch and one selection for every engine.

use std::io::{BufRead as _, Write as _};
use std::time::Instant;

use anyhow::{Context as _, bail};
use serde_json::json;
use sluice_trainer::batch::{Batch, NO_TARGET};
use sluice_trainer::learner::Learner as _;
use sluice_trainer::model::{BurnLearner, ModelConfig};
use sluice_trainer::optimizer::AdamWConfig;
use sluice_trainer::select::{KeepRatio, Needs, Objective, Score, Thresholds, Turn};

use crate::process::{cpu_seconds, forget_peak, peak_bytes, resident_bytes};

/// Sequences in a batch.
pub const ROWS: usize = 8;
/// Tokens in a sequence.
pub const LEN: usize = 256;
/// Learning rate of every step.
pub const LEARNING_RATE: f64 = 1e-4;
const SEED: u64 = 1;

/// A Llama-style model of 17M parameters at a vocabulary of 8,192: hidden 384, 6 layers.
pub fn model(vocabulary: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: vocabulary,
        hidden_size: 384,
        intermediate_size: 1024,
        layers: 6,
        heads: 6,
        kv_heads: 6,
        max_position_embeddings: LEN,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
    }
}

/// A model of hardly anything but its head, to measure the memory of the loss.
pub fn head_alone(vocabulary: usize) -> ModelConfig {
    let narrow = ModelConfig { hidden_size: 64, intermediate_size: 64, layers: 1, ..model(vocabulary) };
    ModelConfig { heads: 1, kv_heads: 1, ..narrow }
}

/// A fresh model with the settings that every engine uses.
pub fn learner(config: ModelConfig) -> anyhow::Result<BurnLearner> {
    BurnLearner::new(config, AdamWConfig::default(), SEED)
}

/// Random tokens, a document a row; what the reference says of them is random too.
pub fn batch(vocabulary: usize) -> Batch {
    let rows = ROWS;
    let mut random = fastrand::Rng::with_seed(5);
    let tokens: Vec<u32> = (0..rows * LEN).map(|_| random.u32(0..vocabulary as u32)).collect();
    let target = |index: usize| if (index + 1).is_multiple_of(LEN) { NO_TARGET } else { tokens[index + 1] };
    let targets: Vec<u32> = (0..tokens.len()).map(target).collect();
    let reference = targets
        .iter()
        .map(|&target| if target == NO_TARGET { f32::NAN } else { 5.0 + 5.0 * random.f32() })
        .collect();
    let positions = (0..rows).flat_map(|_| 0..LEN as u32).collect();
    let segments = vec![1; tokens.len()];
    Batch { rows, len: LEN, segments, positions, targets, reference, tokens, reference_entropy: vec![] }
}

/// Takes steps as the lines of standard input say, and prints what each of them cost: `VOCABULARY plain` or
/// `VOCABULARY slm` for the model, `VOCABULARY memory` for the memory of the loss.
#[allow(clippy::print_stdout)]
pub fn worker() -> anyhow::Result<()> {
    let mut learners = std::collections::HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (vocabulary, variant) = line.split_once(' ').context("a line is VOCABULARY VARIANT")?;
        let vocabulary: usize = vocabulary.parse()?;
        let told = match variant {
            "memory" => loss_memory(vocabulary)?,
            "plain" | "slm" => {
                let learner = match learners.entry(line.clone()) {
                    std::collections::hash_map::Entry::Occupied(there) => there.into_mut(),
                    std::collections::hash_map::Entry::Vacant(free) => {
                        free.insert(learner(model(vocabulary))?)
                    }
                };
                step(learner, &batch(vocabulary), variant == "slm")?
            }
            unknown => bail!("no such step: {unknown}"),
        };
        println!("{told}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn step(learner: &mut BurnLearner, batch: &Batch, selects: bool) -> anyhow::Result<serde_json::Value> {
    let objective =
        if selects { Objective::slm(Score::Excess, KeepRatio::try_from(0.6)?) } else { Objective::Clm };
    let turn = Turn { seed: SEED, step: 1, steps: 1, micro_batch: 0 };
    let mut selecting = 0.0;
    let (started, cpu) = (Instant::now(), cpu_seconds(std::process::id())?);
    learner.accumulate(batch, Needs::default(), &mut |measured| {
        let started = Instant::now();
        let mut choices = objective.select(&[measured.signals(batch)], LEN, turn, &mut Thresholds::default());
        selecting = started.elapsed().as_secs_f64();
        choices.pop().unwrap_or_default().kept
    });
    let outcome = learner.update(LEARNING_RATE);
    Ok(json!({
        "seconds": started.elapsed().as_secs_f64(),
        "cpu_seconds": cpu_seconds(std::process::id())? - cpu,
        "selecting_seconds": selecting,
        "loss": outcome.kept_loss,
        "kept": outcome.kept,
    }))
}

/// Most memory of a step of a model that is hardly more than its head, beyond what a small step left.
fn loss_memory(vocabulary: usize) -> anyhow::Result<serde_json::Value> {
    let me = std::process::id();
    let mut learner = learner(head_alone(vocabulary))?;
    let whole = batch(vocabulary);
    let mut first = Batch { rows: 1, ..whole.clone() };
    for list in [&mut first.tokens, &mut first.segments, &mut first.positions, &mut first.targets] {
        list.truncate(LEN);
    }
    first.reference.truncate(LEN);
    step(&mut learner, &first, true)?;
    forget_peak()?;
    let before = resident_bytes(me)?;
    let told = step(&mut learner, &whole, true)?;
    Ok(json!({"bytes": peak_bytes(me)?.saturating_sub(before), "loss": told["loss"]}))
}
