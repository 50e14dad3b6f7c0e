//! The training step that is measured: one model, one batch and one selection for every engine.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::BufRead as _;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use serde_json::json;
use sluice_feed::batch::{Batch, NO_TARGET};
use sluice_feed::select::{KeepRatio, Needs, Objective, Score, Thresholds, Turn};
use sluice_text::output::print_line;
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{Backward, BurnLearner, DeviceName, ModelConfig, Precision};
use sluice_trainer::training::learner::{Learner as _, Measured};

use crate::process::{cpu_seconds, forget_peak, peak_bytes, resident_bytes};

/// Learning rate of every step.
pub const LEARNING_RATE: f64 = 1e-4;
const SEED: u64 = 1;

/// Where a step is measured, and how large it is.
#[derive(Args, Clone, Copy, Debug)]
pub struct Setup {
    /// cpu, or cuda:N in a build with --features cuda.
    #[arg(long, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Precision of the products of matrices, here and in `PyTorch` (autocast).
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub precision: Precision,
    /// Size of the model's body.
    #[arg(long, value_enum, default_value_t = Size::Small)]
    pub size: Size,
    /// Sequences in a batch.
    #[arg(long, default_value_t = 8)]
    pub rows: usize,
    /// Tokens in a sequence.
    #[arg(long, default_value_t = 256)]
    pub len: usize,
    /// Tokens in a document, of which a sequence holds as many as fit; the last one is cut [default: one document a sequence]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub document: Option<u64>,
}

/// A Llama-style body; its name says about how many parameters it comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Size {
    /// Hidden 64, 2 layers, to try a command.
    #[value(name = "tiny")]
    Tiny,
    /// Hidden 384, 6 layers: 17M parameters with a vocabulary of 8,192.
    #[value(name = "17m")]
    Small,
    /// Hidden 768, 12 layers: 135M parameters with a vocabulary of 32,768.
    #[value(name = "100m")]
    Medium,
    /// Hidden 2048, 18 layers: 1.1B parameters with it.
    #[value(name = "1b")]
    Large,
}

impl Setup {
    /// The model with a vocabulary.
    pub fn model(&self, vocabulary: usize) -> ModelConfig {
        let (hidden_size, intermediate_size, layers, heads) = match self.size {
            Size::Tiny => (64, 192, 2, 2),
            Size::Small => (384, 1024, 6, 6),
            Size::Medium => (768, 2048, 12, 12),
            Size::Large => (2048, 5632, 18, 32),
        };
        ModelConfig {
            vocab_size: vocabulary,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads: heads,
            max_position_embeddings: self.len,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            variant: sluice_trainer::model::config::Variant::default(),
        }
    }

    /// A fresh model with the settings that every engine uses.
    pub fn learner(&self, config: ModelConfig) -> anyhow::Result<BurnLearner> {
        let mut probe = Command::new(std::env::current_exe()?);
        let device = self.device.open(probe.arg("probe-device"))?;
        let mut learner = BurnLearner::new_on(device, config, AdamWConfig::default(), SEED)?;
        learner.compute_in(self.precision);
        Ok(learner)
    }

    /// Random tokens in documents; what the reference says of them is random too.
    pub fn batch(&self, vocabulary: usize) -> Batch {
        let Self { rows, len, .. } = *self;
        let mut random = fastrand::Rng::with_seed(5);
        // Together, so that a batch of fewer rows is the beginning of this one.
        let drawn = |_| (random.u32(0..vocabulary as u32), 5.0 + 5.0 * random.f32());
        let (tokens, drawn): (Vec<u32>, Vec<f32>) = (0..rows * len).map(drawn).unzip();
        let document = self.document.map_or(len, |document| len.min(document as usize));
        let ends =
            |index: usize| (index + 1).is_multiple_of(len) || (index % len + 1).is_multiple_of(document);
        let targets = (0..rows * len).map(|i| if ends(i) { NO_TARGET } else { tokens[i + 1] }).collect();
        let reference = (0..rows * len).map(|i| if ends(i) { f32::NAN } else { drawn[i] }).collect();
        let within = |index: usize| (index % len % document) as u32;
        let positions = (0..rows * len).map(within).collect();
        let segments = (0..rows * len).map(|index| (index % len / document) as u32 + 1).collect();
        Batch {
            rows,
            len,
            segments,
            positions,
            targets,
            reference,
            tokens,
            reference_entropy: vec![],
            attribute: vec![],
        }
    }

    /// The same as flags.
    pub fn flags(&self) -> Vec<String> {
        let name = |value: Option<clap::builder::PossibleValue>| {
            value.map_or_else(String::new, |value| value.get_name().to_owned())
        };
        let pairs = [
            ("--device", self.device.to_string()),
            ("--precision", name(self.precision.to_possible_value())),
            ("--size", name(self.size.to_possible_value())),
            ("--rows", self.rows.to_string()),
            ("--len", self.len.to_string()),
        ];
        let document = self.document.map(|document| ("--document", document.to_string()));
        pairs.into_iter().chain(document).flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }
}

/// A model of hardly anything but its head, to measure the memory of the loss.
pub fn head_alone(setup: &Setup, vocabulary: usize) -> ModelConfig {
    let narrow = ModelConfig { hidden_size: 64, intermediate_size: 64, layers: 1, ..setup.model(vocabulary) };
    ModelConfig { heads: 1, kv_heads: 1, ..narrow }
}

/// One way to take a step: `plain`, or `slm`, `kept` and `chosen` with the percentage that is kept behind a hyphen, 60 without.
/// With `once:` before it, each row is a micro-batch that is chosen from by itself; with `twice:`, one that competes with the
/// others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Variant {
    passes: Passes,
    /// Share of the tokens that is learnt from; 1 for a plain step.
    keep: f64,
    backward: Backward,
    /// Whether the tokens are chosen before the forward pass, as they are where the model has no say.
    chooses_beforehand: bool,
}

/// Forward passes of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Passes {
    /// One, of all rows at once.
    Whole,
    /// One, row by row.
    Once,
    /// Two, row by row.
    Twice,
}

impl std::str::FromStr for Variant {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (passes, text) = match text.split_once(':') {
            None => (Passes::Whole, text),
            Some(("once", text)) => (Passes::Once, text),
            Some(("twice", text)) => (Passes::Twice, text),
            Some((unknown, _)) => bail!("no such number of passes: {unknown}"),
        };
        let (name, percent) = text.split_once('-').unwrap_or((text, "60"));
        let (backward, chooses_beforehand) = match name {
            "plain" => {
                return Ok(Self { passes, keep: 1.0, backward: Backward::Exact, chooses_beforehand: false });
            }
            "slm" => (Backward::Exact, false),
            "kept" => (Backward::Kept, false),
            "chosen" => (Backward::Kept, true),
            unknown => bail!("no such step: {unknown}"),
        };
        Ok(Self { passes, keep: percent.parse::<f64>()? / 100.0, backward, chooses_beforehand })
    }
}

/// Takes steps as the lines of standard input say, and prints what each of them cost: `VOCABULARY VARIANT` for the model,
/// `VOCABULARY memory` for the memory of the loss, and `VOCABULARY tape VARIANT` for that of the model between its passes.
pub fn worker(setup: &Setup) -> anyhow::Result<()> {
    let mut learners = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (vocabulary, variant) = line.split_once(' ').context("a line is VOCABULARY VARIANT")?;
        let vocabulary: usize = vocabulary.parse()?;
        let told = if variant == "memory" {
            loss_memory(setup, vocabulary)?
        } else if let Some(variant) = variant.strip_prefix("tape ") {
            tape_memory(setup, vocabulary, variant.parse()?)?
        } else {
            let variant = variant.parse()?;
            let learner = match learners.entry(line.clone()) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(free) => free.insert(setup.learner(setup.model(vocabulary))?),
            };
            step(learner, &setup.batch(vocabulary), variant)?
        };
        print_line(&format!("{told}"))?;
    }
    Ok(())
}

pub(crate) fn step(
    learner: &mut BurnLearner,
    batch: &Batch,
    variant: Variant,
) -> anyhow::Result<serde_json::Value> {
    let Variant { passes, keep, backward, chooses_beforehand } = variant;
    let score = if chooses_beforehand { Score::Random } else { Score::Excess };
    let objective =
        if keep < 1.0 { Objective::slm(score, KeepRatio::try_from(keep)?) } else { Objective::Clm };
    let turn = Turn { seed: SEED, step: 1, steps: 1, micro_batch: 0 };
    let mut selecting = 0.0;
    let mut select = |measured: &[Measured], batches: &[Batch]| -> Vec<Vec<u32>> {
        let started = Instant::now();
        let signals: Vec<_> =
            measured.iter().zip(batches).map(|(measured, batch)| measured.signals(batch)).collect();
        let choices = objective.select(&signals, batch.len, turn, &Thresholds::default());
        selecting += started.elapsed().as_secs_f64();
        choices.into_iter().map(|choice| choice.kept).collect()
    };
    let batches = if passes == Passes::Whole { vec![batch.clone()] } else { rows_of(batch) };
    learner.flow_through(backward);
    let (started, cpu) = (Instant::now(), cpu_seconds(std::process::id())?);
    if chooses_beforehand {
        // The loss is looked at for nothing but where there is one.
        let losses = |batch: &Batch| Measured { losses: batch.reference.clone(), ..Measured::default() };
        let kept = select(&batches.iter().map(losses).collect::<Vec<_>>(), &batches);
        for (batch, kept) in batches.iter().zip(kept) {
            learner.accumulate_chosen(batch, &kept, Some(Needs::default()), &mut |_| {});
        }
    } else if passes == Passes::Twice {
        let measured: Vec<_> = batches.iter().map(|batch| learner.measure(batch, Needs::default())).collect();
        for (batch, kept) in batches.iter().zip(select(&measured, &batches)) {
            learner.accumulate_chosen(batch, &kept, None, &mut |_| {});
        }
    } else {
        for batch in &batches {
            learner.accumulate(batch, Needs::default(), &mut |measured| {
                let (measured, batch) = (std::slice::from_ref(measured), std::slice::from_ref(batch));
                select(measured, batch).pop().unwrap_or_default()
            });
        }
    }
    let outcome = learner.update(LEARNING_RATE);
    learner.synchronize()?;
    Ok(json!({
        "seconds": started.elapsed().as_secs_f64(),
        "cpu_seconds": cpu_seconds(std::process::id())? - cpu,
        "selecting_seconds": selecting,
        "loss": outcome.kept_loss,
        "kept": outcome.kept,
    }))
}

/// Each row of a batch as a batch of its own.
fn rows_of(batch: &Batch) -> Vec<Batch> {
    let row = |row: usize| {
        let span = row * batch.len..(row + 1) * batch.len;
        Batch {
            rows: 1,
            len: batch.len,
            tokens: batch.tokens[span.clone()].to_vec(),
            segments: batch.segments[span.clone()].to_vec(),
            positions: batch.positions[span.clone()].to_vec(),
            targets: batch.targets[span.clone()].to_vec(),
            reference: batch.reference[span].to_vec(),
            reference_entropy: vec![],
            attribute: vec![],
        }
    };
    (0..batch.rows).map(row).collect()
}

/// Most memory of a step of a model that is hardly more than its head, beyond what a small step left.
fn loss_memory(setup: &Setup, vocabulary: usize) -> anyhow::Result<serde_json::Value> {
    memory(setup, head_alone(setup, vocabulary), "slm".parse()?)
}

/// Most memory of a step, beyond what a small step left, which holds gradients and the optimizer's state.
fn tape_memory(setup: &Setup, vocabulary: usize, variant: Variant) -> anyhow::Result<serde_json::Value> {
    memory(setup, setup.model(vocabulary), variant)
}

fn memory(setup: &Setup, model: ModelConfig, variant: Variant) -> anyhow::Result<serde_json::Value> {
    let me = std::process::id();
    let vocabulary = model.vocab_size;
    let mut learner = setup.learner(model)?;
    let whole = setup.batch(vocabulary);
    let first = Setup { rows: 1, ..*setup }.batch(vocabulary);
    step(&mut learner, &first, variant)?;
    forget_peak()?;
    let before = resident_bytes(me)?;
    let told = step(&mut learner, &whole, variant)?;
    Ok(json!({"bytes": peak_bytes(me)?.saturating_sub(before), "loss": told["loss"]}))
}
