//! Flags that say how a model learns.

use clap::{Args, ValueEnum};
use sluice_feed::cut::UnequalContexts;
use sluice_feed::pack::{FirstToken, Packing};
use sluice_feed::plan::{CELLS_MAX, MICRO_BATCHES_MAX};

use super::arguments::{between, positive, share};
use crate::failure::Failure;
use crate::model::optimizer::AdamWConfig;
use crate::training::schedule::{FLOOR, Schedule, Shape};

/// Of fresh weights.
const FRESH_LEARNING_RATE: f64 = 1e-3;
/// Of weights that have learnt already: what Rho-1 continues `TinyLlama` with (arXiv 2404.07965, section 3.1). The rate of fresh
/// weights would undo what they know.
const TRAINED_LEARNING_RATE: f64 = 8e-5;

/// What happens to the first token of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FirstTokenName {
    /// It is read and not predicted
    Skip,
    /// It is predicted from the document before it in its sequence, if there is one; a score that needs a reference
    /// cannot choose it
    Predict,
}

impl From<FirstTokenName> for FirstToken {
    fn from(name: FirstTokenName) -> Self {
        match name {
            FirstTokenName::Skip => Self::Skip,
            FirstTokenName::Predict => Self::Predict,
        }
    }
}

/// What happens to tokens that cannot be read under the contexts of their reference losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum UnequalContextsName {
    /// The first document with such tokens ends the run
    Refuse,
    /// They cannot be chosen by a score that looks at the reference
    Mask,
    /// They are ranked like all others
    Allow,
}

impl From<UnequalContextsName> for UnequalContexts {
    fn from(name: UnequalContextsName) -> Self {
        match name {
            UnequalContextsName::Refuse => Self::Refuse,
            UnequalContextsName::Mask => Self::Mask,
            UnequalContextsName::Allow => Self::Allow,
        }
    }
}

/// How large a micro-batch is.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct BatchArguments {
    /// Sequences in a micro-batch
    #[arg(long, env = "SLUICE_TRAIN_BATCH_SIZE", default_value_t = 16, value_parser = between::<1, CELLS_MAX>)]
    pub batch_size: usize,
    /// Tokens in a sequence [default: as many as the window that the first record was scored in; 256 without a reference]
    #[arg(long, env = "SLUICE_TRAIN_SEQUENCE_LENGTH", value_parser = between::<2, CELLS_MAX>)]
    pub sequence_length: Option<usize>,
}

/// How to learn.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Training")]
pub(super) struct OptimizationArguments {
    #[command(flatten)]
    pub batch: BatchArguments,
    /// Micro-batches whose gradients make one optimizer step; they come from the topic's partitions in turn
    #[arg(long, env = "SLUICE_TRAIN_ACCUMULATE", default_value_t = 1, value_parser = between::<1, MICRO_BATCHES_MAX>)]
    pub accumulate: usize,
    /// What happens to tokens that a sequence cannot hold the reference's context of, where its windows are longer
    #[arg(long, env = "SLUICE_TRAIN_UNEQUAL_CONTEXTS", value_enum, default_value_t = UnequalContextsName::Mask)]
    unequal_contexts: UnequalContextsName,
    /// Let tokens attend to the documents before theirs in a sequence, which a reference model has not seen; needs
    /// --unequal-contexts allow
    #[arg(long, env = "SLUICE_TRAIN_ATTEND_ACROSS_DOCUMENTS")]
    attend_across_documents: bool,
    /// What happens to the first token of a document; predict needs --attend-across-documents
    #[arg(long, env = "SLUICE_TRAIN_FIRST_TOKEN", value_enum, default_value_t = FirstTokenName::Skip)]
    first_token: FirstTokenName,
    /// The highest learning rate [default: 1e-3 for fresh weights, 8e-5 with --init or --branch-from]
    #[arg(long, env = "SLUICE_TRAIN_LEARNING_RATE", value_parser = positive)]
    pub learning_rate: Option<f64>,
    /// Steps over which the learning rate rises to its peak
    #[arg(long, env = "SLUICE_TRAIN_WARMUP_STEPS", default_value_t = 20)]
    pub warmup_steps: u64,
    /// What the learning rate does after that; all but constant fall to the floor
    #[arg(long, env = "SLUICE_TRAIN_SCHEDULE", value_enum, default_value_t = Shape::Cosine)]
    pub schedule: Shape,
    /// Share of the highest learning rate that a falling one ends at
    #[arg(long, env = "SLUICE_TRAIN_LEARNING_RATE_FLOOR", value_name = "SHARE", default_value_t = FLOOR, value_parser = share)]
    pub learning_rate_floor: f64,
    /// Last steps, over which wsd lets the learning rate fall [default: a tenth of the steps]
    #[arg(long, env = "SLUICE_TRAIN_DECAY_STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    pub decay_steps: Option<u64>,
    /// Weight decay of matrices, decoupled from the gradient
    #[arg(long, env = "SLUICE_TRAIN_WEIGHT_DECAY", default_value_t = AdamWConfig::default().weight_decay)]
    pub weight_decay: f64,
    /// Longest gradient (global L2 norm); a longer one is scaled down to it
    #[arg(long, env = "SLUICE_TRAIN_GRADIENT_NORM_MAX", default_value_t = AdamWConfig::default().max_gradient_norm,
          value_parser = positive)]
    pub gradient_norm_max: f64,
    /// Decay of AdamW's mean of the gradient, a step
    #[arg(long, env = "SLUICE_TRAIN_ADAM_BETA1", default_value_t = AdamWConfig::default().beta1)]
    pub adam_beta1: f64,
    /// Decay of AdamW's mean of the squared gradient, a step
    #[arg(long, env = "SLUICE_TRAIN_ADAM_BETA2", default_value_t = AdamWConfig::default().beta2)]
    pub adam_beta2: f64,
    /// Added to the root of AdamW's mean of the squared gradient
    #[arg(long, env = "SLUICE_TRAIN_ADAM_EPSILON", default_value_t = AdamWConfig::default().eps, value_parser = positive)]
    pub adam_epsilon: f64,
    /// Decides initial weights, shuffles and random draws
    #[arg(long, env = "SLUICE_TRAIN_SEED", default_value_t = 1)]
    pub seed: u64,
}

impl OptimizationArguments {
    pub fn packing(&self) -> anyhow::Result<Packing> {
        let Self { attend_across_documents, first_token, unequal_contexts, .. } = *self;
        if first_token == FirstTokenName::Predict && !attend_across_documents {
            let error =
                "--first-token predict has nothing to predict from: give --attend-across-documents too";
            return Err(Failure::Usage(error.to_owned()).into());
        }
        if attend_across_documents && unequal_contexts != UnequalContextsName::Allow {
            let error = "--attend-across-documents gives tokens context that the reference model has not seen: give \
                         --unequal-contexts allow too, if that is meant";
            return Err(Failure::Usage(error.to_owned()).into());
        }
        Ok(Packing {
            attend_across_documents,
            first_token: first_token.into(),
            unequal_contexts: unequal_contexts.into(),
        })
    }

    /// Learning rates of a run of `steps` steps, from fresh weights or from those of a model that `is_trained`.
    pub fn schedule(&self, steps: u64, is_trained: bool) -> anyhow::Result<Schedule> {
        let Self { schedule: shape, warmup_steps, learning_rate_floor: floor, .. } = *self;
        let usual = if is_trained { TRAINED_LEARNING_RATE } else { FRESH_LEARNING_RATE };
        let peak = self.learning_rate.unwrap_or(usual);
        if self.decay_steps.is_some() && shape != Shape::Wsd {
            let error = "--decay-steps is a part of --schedule wsd: leave it out, or give that schedule";
            return Err(Failure::Usage(error.to_owned()).into());
        }
        let decay_steps = match shape {
            Shape::Wsd => self.decay_steps.unwrap_or(steps.div_ceil(10)),
            Shape::Cosine | Shape::Linear | Shape::Constant => 0,
        };
        if shape == Shape::Wsd && warmup_steps.saturating_add(decay_steps) > steps {
            return Err(Failure::Usage(format!(
                "{warmup_steps} --warmup-steps and {decay_steps} --decay-steps are more than the {steps} steps of the run: \
                 give fewer"
            ))
            .into());
        }
        Ok(Schedule { shape, peak, warmup_steps, decay_steps, floor, steps })
    }

    pub fn optimizer(&self) -> AdamWConfig {
        AdamWConfig {
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            eps: self.adam_epsilon,
            weight_decay: self.weight_decay,
            max_gradient_norm: self.gradient_norm_max,
        }
    }
}
