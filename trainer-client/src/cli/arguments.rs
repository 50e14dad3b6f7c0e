//! Flags that several commands share.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::{Args, ValueEnum};
use sluice_feed::cut::UnequalContexts;
use sluice_feed::pack::{FirstToken, Packing};
use sluice_feed::stream::Broker;

use crate::failure::{Classify, Failure};
use crate::model::checkpoint::{OPTIMIZER_FILE, read_weights};
use crate::model::config::CONFIG_FILE;
use crate::model::device::DeviceError;
use crate::model::optimizer::AdamWConfig;
use crate::model::{BurnLearner, DeviceName, ModelConfig, Precision};
use crate::text::TextTokenizer;
use crate::training::evaluate::EvalFile;
use crate::training::schedule::{Schedule, Shape};
use crate::training::setup::Output;
use crate::watch::http;
use crate::watch::telemetry::Telemetry;

/// Where the broker is.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Kafka")]
pub(super) struct BrokerArguments {
    /// Addresses of Kafka brokers, host:port[,host:port]
    #[arg(long, env = "SLUICE_TRAIN_BOOTSTRAP_SERVERS", default_value = "localhost:9092")]
    pub bootstrap_servers: String,
    /// A further librdkafka setting; repeatable, in the environment one a line
    #[arg(
        long = "property",
        env = "SLUICE_TRAIN_PROPERTY",
        value_name = "KEY=VALUE",
        value_delimiter = '\n',
        hide_env_values = true
    )]
    properties: Vec<String>,
}

impl BrokerArguments {
    pub fn broker(&self) -> anyhow::Result<Broker> {
        // Not a parser of clap's, which repeats what it refuses, and that may hold a secret.
        let properties = self.properties.iter().map(|text| match text.split_once('=') {
            Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
            _ => {
                Err(Failure::Usage("a --property is not KEY=VALUE, such as security.protocol=SSL".to_owned()))
            }
        });
        Ok(Broker::new(self.bootstrap_servers.clone(), properties.collect::<Result<_, _>>()?)?)
    }

    /// Names of the further settings; values may be secrets.
    pub fn property_names(&self) -> impl Iterator<Item = &str> {
        self.properties.iter().filter_map(|text| text.split_once('=')).map(|(key, _)| key.trim())
    }
}

/// The model to start from.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub(super) struct ModelArguments {
    /// Start from the weights in this folder (config.json and model.safetensors, Hugging Face names)
    #[arg(long, env = "SLUICE_TRAIN_INIT", value_name = "FOLDER")]
    pub init: Option<PathBuf>,
    /// Width of the residual stream
    #[arg(long, env = "SLUICE_TRAIN_HIDDEN_SIZE", default_value_t = 256, conflicts_with = "init")]
    pub hidden_size: usize,
    /// Decoder layers
    #[arg(long, env = "SLUICE_TRAIN_LAYERS", default_value_t = 4, conflicts_with = "init")]
    pub layers: usize,
    /// Query heads
    #[arg(long, env = "SLUICE_TRAIN_HEADS", default_value_t = 4, conflicts_with = "init")]
    pub heads: usize,
    /// Key and value heads [default: as many as query heads]
    #[arg(long, env = "SLUICE_TRAIN_KV_HEADS", conflicts_with = "init")]
    pub kv_heads: Option<usize>,
    /// Width of the gated MLP [default: 8/3 of the hidden size, rounded up to a multiple of 64]
    #[arg(long, env = "SLUICE_TRAIN_INTERMEDIATE_SIZE", conflicts_with = "init")]
    pub intermediate_size: Option<usize>,
    #[command(flatten)]
    pub compute: ComputeArguments,
    /// Use the token embedding as the LM head too
    #[arg(long, env = "SLUICE_TRAIN_TIE_WORD_EMBEDDINGS", conflicts_with = "init")]
    pub tie_word_embeddings: bool,
}

impl ModelArguments {
    /// A model for this tokenizer and sequence length, with a fresh optimizer.
    pub fn learner(
        &self,
        tokenizer: &TextTokenizer,
        sequence_length: usize,
        optimizer: AdamWConfig,
        seed: u64,
    ) -> anyhow::Result<BurnLearner> {
        let device = self.compute.device()?;
        let Some(folder) = &self.init else {
            let config = self.config(tokenizer, sequence_length);
            return BurnLearner::new_on(device, config, optimizer, seed)
                .map(|learner| self.compute.set(learner))
                .or_usage();
        };
        if !folder.join(CONFIG_FILE).is_file() {
            let error =
                anyhow::anyhow!("{} holds no {CONFIG_FILE}; give a checkpoint to --init", folder.display());
            return Err(error).or_usage();
        }
        optimizer.validate().or_usage()?;
        let config = ModelConfig::read(folder).or_data()?;
        if config.vocab_size < tokenizer.vocabulary() as usize {
            return Err(anyhow::anyhow!(
                "the model in {} has {} token rows, but the tokenizer has ids up to {}; give the tokenizer it was \
                 trained with",
                folder.display(),
                config.vocab_size,
                tokenizer.vocabulary() - 1
            ))
            .or_usage();
        }
        if config.max_position_embeddings < sequence_length {
            return Err(anyhow::anyhow!(
                "the model in {} reads at most {} tokens; give --sequence-length {1} or less",
                folder.display(),
                config.max_position_embeddings
            ))
            .or_usage();
        }
        let weights = read_weights(folder, &config).or_data()?;
        BurnLearner::from_weights(config, optimizer, weights, device)
            .map(|learner| self.compute.set(learner))
            .or_data()
    }

    /// Refuses sizes of which no model can be made. The length of a sequence may not be known yet.
    pub fn check(&self, tokenizer: &TextTokenizer, sequence_length: Option<usize>) -> anyhow::Result<()> {
        match &self.init {
            Some(_) => Ok(()),
            None => self.config(tokenizer, sequence_length.unwrap_or(2)).validate().or_usage(),
        }
    }

    /// The longest sequence that the model to start from reads; `None` where it is made to measure.
    pub fn longest_sequence(&self) -> anyhow::Result<Option<usize>> {
        match &self.init {
            Some(folder) if folder.join(CONFIG_FILE).is_file() => {
                Ok(Some(ModelConfig::read(folder).or_data()?.max_position_embeddings))
            }
            _ => Ok(None),
        }
    }

    /// The model of a checkpoint, with its optimizer, if it is the one that these flags describe.
    pub fn resumed(
        &self,
        checkpoint: &Path,
        tokenizer: &TextTokenizer,
        sequence_length: usize,
        optimizer: AdamWConfig,
    ) -> anyhow::Result<BurnLearner> {
        optimizer.validate().or_usage()?;
        if !checkpoint.join(OPTIMIZER_FILE).is_file() {
            // With a fresh optimizer it would be another run.
            let error = anyhow::anyhow!(
                "{0} has no {OPTIMIZER_FILE}; remove {0}, and --resume goes on from the one before, or begin another run with \
                 --init {0}",
                checkpoint.display()
            );
            return Err(error).or_data();
        }
        let learner = BurnLearner::open_on(self.compute.device()?, checkpoint, optimizer).or_data()?;
        let learner = self.compute.set(learner);
        // With --init the flags say nothing of the shape.
        if self.init.is_none() && *learner.config() != self.config(tokenizer, sequence_length) {
            let error = anyhow::anyhow!(
                "the model in {} has another shape than the flags say; give those that the run began with",
                checkpoint.display()
            );
            return Err(error).or_usage();
        }
        Ok(learner)
    }

    fn config(&self, tokenizer: &TextTokenizer, sequence_length: usize) -> ModelConfig {
        ModelConfig {
            vocab_size: tokenizer.vocabulary() as usize,
            hidden_size: self.hidden_size,
            intermediate_size: self
                .intermediate_size
                .unwrap_or(self.hidden_size.saturating_mul(8).div_ceil(3).next_multiple_of(64)),
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads.unwrap_or(self.heads),
            max_position_embeddings: sequence_length,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: self.tie_word_embeddings,
        }
    }
}

/// Where and how to compute.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Computation")]
pub(super) struct ComputeArguments {
    /// cpu, cuda or cuda:N; the latter need a build with --features cuda
    #[arg(long, env = "SLUICE_TRAIN_DEVICE", default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// What products of matrices are computed in; weights, sums and softmaxes are f32 in any case
    #[arg(long, env = "SLUICE_TRAIN_PRECISION", value_enum, default_value_t = Precision::F32)]
    pub precision: Precision,
    /// Keep the layers' inputs alone for the backward pass and run each layer forward once more: less memory, more time,
    /// the same bits
    #[arg(long, env = "SLUICE_TRAIN_RECOMPUTE_ACTIVATIONS")]
    recompute_activations: bool,
}

impl ComputeArguments {
    /// The device, once it has answered.
    fn device(&self) -> anyhow::Result<Device> {
        let mut probe = std::process::Command::new(std::env::current_exe().or_unavailable()?);
        match self.device.open(probe.arg("probe-device")) {
            Err(error @ DeviceError::NotBuilt) => Err(error).or_usage(),
            device => device.or_unavailable(),
        }
    }

    /// The same learner, which computes as these flags say.
    fn set(&self, mut learner: BurnLearner) -> BurnLearner {
        learner.compute_in(self.precision);
        learner.recompute_activations(self.recompute_activations);
        learner
    }
}

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

/// How to learn.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Training")]
pub(super) struct OptimizationArguments {
    /// Sequences in a micro-batch
    #[arg(long, env = "SLUICE_TRAIN_BATCH_SIZE", default_value_t = 16, value_parser = at_least::<1>)]
    pub batch_size: usize,
    /// Micro-batches whose gradients make one optimizer step; they come from the topic's partitions in turn
    #[arg(long, env = "SLUICE_TRAIN_ACCUMULATE", default_value_t = 1, value_parser = at_least::<1>)]
    pub accumulate: usize,
    /// Tokens in a sequence [default: as many as the window that the first record was scored in; 256 without a reference]
    #[arg(long, env = "SLUICE_TRAIN_SEQUENCE_LENGTH", value_parser = at_least::<2>)]
    pub sequence_length: Option<usize>,
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
    /// The highest learning rate
    #[arg(long, env = "SLUICE_TRAIN_LEARNING_RATE", default_value_t = 1e-3, value_parser = positive)]
    pub learning_rate: f64,
    /// Steps over which the learning rate rises to its peak
    #[arg(long, env = "SLUICE_TRAIN_WARMUP_STEPS", default_value_t = 20)]
    pub warmup_steps: u64,
    /// What the learning rate does after that; cosine and wsd fall to a tenth of the peak
    #[arg(long, env = "SLUICE_TRAIN_SCHEDULE", value_enum, default_value_t = Shape::Cosine)]
    pub schedule: Shape,
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

    /// Learning rates of a run of `steps` steps.
    pub fn schedule(&self, steps: u64) -> anyhow::Result<Schedule> {
        let Self { schedule: shape, learning_rate: peak, warmup_steps, .. } = *self;
        if self.decay_steps.is_some() && shape != Shape::Wsd {
            let error = "--decay-steps is a part of --schedule wsd: leave it out, or give that schedule";
            return Err(Failure::Usage(error.to_owned()).into());
        }
        let decay_steps = match shape {
            Shape::Wsd => self.decay_steps.unwrap_or(steps.div_ceil(10)),
            Shape::Cosine | Shape::Constant => 0,
        };
        if shape == Shape::Wsd && warmup_steps.saturating_add(decay_steps) > steps {
            return Err(Failure::Usage(format!(
                "{warmup_steps} --warmup-steps and {decay_steps} --decay-steps are more than the {steps} steps of the run: \
                 give fewer"
            ))
            .into());
        }
        Ok(Schedule { shape, peak, warmup_steps, decay_steps, steps })
    }

    pub fn optimizer(&self) -> AdamWConfig {
        AdamWConfig {
            weight_decay: self.weight_decay,
            max_gradient_norm: self.gradient_norm_max,
            ..AdamWConfig::default()
        }
    }
}

/// What to write, and how often to look.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Output and evaluation")]
pub(super) struct OutputArguments {
    /// Folder of the run; must not hold one yet, unless it is resumed
    #[arg(long, env = "SLUICE_TRAIN_OUT", value_name = "FOLDER")]
    pub out: PathBuf,
    /// Held-out text to measure the loss on, JSON Lines with a "text" field; repeatable, in the environment one a line
    #[arg(long = "eval", env = "SLUICE_TRAIN_EVAL", value_name = "NAME=FILE", value_delimiter = '\n')]
    pub evals: Vec<EvalFile>,
    /// Steps between evaluations
    #[arg(long, env = "SLUICE_TRAIN_EVAL_EVERY", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..))]
    pub eval_every: u64,
    /// Go on from the last checkpoint in --out, or begin where there is none
    #[arg(long, env = "SLUICE_TRAIN_RESUME")]
    pub resume: bool,
    /// Checkpoints to keep: the last ones
    #[arg(long, env = "SLUICE_TRAIN_CHECKPOINTS_KEEP", default_value_t = 2, value_parser = at_least::<1>)]
    pub checkpoints_keep: usize,
    /// Write down which documents each step learnt from (documents.jsonl)
    #[arg(long, env = "SLUICE_TRAIN_LOG_DOCUMENTS")]
    pub log_documents: bool,
    /// Serve Prometheus metrics at http://HOST:PORT/metrics; port 0 takes a free one, and the log says which
    /// [default: not served]
    #[arg(long, env = "SLUICE_TRAIN_METRICS_LISTEN", value_name = "HOST:PORT")]
    pub metrics_listen: Option<String>,
    /// Write down the loss of every token of this evaluation set at each evaluation (token-losses/); repeatable, in the
    /// environment one a line
    #[arg(long, env = "SLUICE_TRAIN_TOKEN_LOSSES", value_name = "NAME", value_delimiter = '\n')]
    pub token_losses: Vec<String>,
    /// Steps between checkpoints; one follows the last step, or a signal, in any case
    #[arg(long, env = "SLUICE_TRAIN_CHECKPOINT_EVERY", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    pub checkpoint_every: u64,
}

impl OutputArguments {
    /// The same without clap.
    pub fn output(&self) -> Output {
        Output {
            folder: self.out.clone(),
            resume: self.resume,
            evals: self.evals.clone(),
            token_losses: self.token_losses.clone(),
            log_documents: self.log_documents,
            checkpoints_keep: self.checkpoints_keep,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
        }
    }

    /// The run's metrics, served where that was asked for.
    pub fn telemetry(&self) -> anyhow::Result<Telemetry> {
        let telemetry = Telemetry::default();
        if let Some(listen) = &self.metrics_listen {
            let is_address = listen
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
            if !is_address {
                let error = format!("--metrics-listen {listen:?} is not HOST:PORT, such as 127.0.0.1:9480");
                return Err(Failure::Usage(error).into());
            }
            let address = http::serve(listen, telemetry.clone())?;
            tracing::info!(%address, "serving /metrics");
        }
        Ok(telemetry)
    }
}

/// A whole number of at least `MIN`.
pub(super) fn at_least<const MIN: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= MIN => Ok(number),
        _ => Err(format!("must be a whole number of at least {MIN}")),
    }
}

/// A finite number above zero.
pub(super) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("must be a number above 0".to_owned()),
    }
}
