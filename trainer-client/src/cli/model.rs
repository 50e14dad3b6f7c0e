//! Flags that say what model is trained, and on what it computes.

use std::path::{Path, PathBuf};

use clap::Args;
use sluice_schemas::fingerprint::Fingerprint;

use super::arguments::OutputArguments;
use crate::failure::Classify;
use crate::model::carried::Carried;
use crate::model::checkpoint::{OPTIMIZER_FILE, read_weights};
use crate::model::config::CONFIG_FILE;
use crate::model::device::DeviceError;
use crate::model::optimizer::AdamWConfig;
use crate::model::{BurnLearner, Device, DeviceName, ModelConfig, Precision, Variant};
use crate::text::{TOKENIZER_FILE, TextTokenizer};

/// The model to start from.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub(super) struct ModelArguments {
    /// Start from the weights in this folder, as Hugging Face's hub has them: config.json (llama, mistral, qwen2, qwen3 or
    /// granite) and model.safetensors, or several files with an index, in 16 or 32 bits
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
        let device = self.compute.device.open()?;
        let learner = if let Some(folder) = &self.init {
            initial(folder, device, tokenizer, sequence_length, optimizer)?
        } else {
            let config = self.config(tokenizer, sequence_length);
            BurnLearner::new_on(device, config, optimizer, seed).or_usage()?
        };
        Ok(self.compute.set(learner))
    }

    /// Whether a run begins with weights that have learnt already.
    pub fn is_trained(&self, output: &OutputArguments) -> bool {
        self.init.is_some() || output.branch_from.is_some()
    }

    /// Refuses a device that is not to be had, and sizes of which no model can be made. The length of a sequence may not be
    /// known yet.
    pub fn check(&self, tokenizer: &TextTokenizer, sequence_length: Option<usize>) -> anyhow::Result<()> {
        self.compute.device.open()?;
        match &self.init {
            Some(_) => Ok(()),
            None => self.config(tokenizer, sequence_length.unwrap_or(2)).validate().or_usage(),
        }
    }

    /// The longest sequence that the model to start from reads; `None` where it is made to measure.
    pub fn longest_sequence(&self) -> anyhow::Result<Option<usize>> {
        self.init.as_deref().map_or(Ok(None), longest_sequence)
    }

    /// The model of a checkpoint, with its optimizer, if it is the one that these flags describe.
    pub fn resumed(
        &self,
        checkpoint: &Path,
        tokenizer: &TextTokenizer,
        sequence_length: usize,
        optimizer: AdamWConfig,
        is_branch: bool,
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
        let learner = BurnLearner::open_on(self.compute.device.open()?, checkpoint, optimizer).or_data()?;
        let learner = self.compute.set(learner);
        // With --init or --branch-from the flags say nothing of the shape.
        if self.init.is_none() && !is_branch && *learner.config() != self.config(tokenizer, sequence_length) {
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
            variant: Variant::default(),
        }
    }
}

/// The model in a folder, for this tokenizer and sequence length, with a fresh optimizer.
pub(super) fn initial(
    folder: &Path,
    device: Device,
    tokenizer: &TextTokenizer,
    sequence_length: usize,
    optimizer: AdamWConfig,
) -> anyhow::Result<BurnLearner> {
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
    let mut learner = BurnLearner::from_weights(config, optimizer, weights, device).or_data()?;
    learner.carry(carried(folder, tokenizer).or_data()?);
    Ok(learner)
}

/// The longest sequence that the model in a folder reads; `None` where there is none.
pub(super) fn longest_sequence(folder: &Path) -> anyhow::Result<Option<usize>> {
    if !folder.join(CONFIG_FILE).is_file() {
        return Ok(None);
    }
    Ok(Some(ModelConfig::read(folder).or_data()?.max_position_embeddings))
}

/// What goes along with the weights of `folder`; what belongs to its tokenizer only where that is the one given.
fn carried(folder: &Path, tokenizer: &TextTokenizer) -> anyhow::Result<Carried> {
    let carried = Carried::read(folder)?;
    let own = std::fs::read(folder.join(TOKENIZER_FILE)).ok();
    let is_same = own.is_some_and(|own| Fingerprint::of_bytes(&own) == tokenizer.fingerprint());
    Ok(if is_same { carried } else { carried.without_tokenizer() })
}

/// Where to compute, and in which precision.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Computation")]
pub(super) struct DeviceArguments {
    /// cpu, cuda or cuda:N; the latter need a build with --features cuda
    #[arg(long, env = "SLUICE_TRAIN_DEVICE", default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// What products of matrices are computed in; weights, sums and softmaxes are f32 in any case
    #[arg(long, env = "SLUICE_TRAIN_PRECISION", value_enum, default_value_t = Precision::F32)]
    pub precision: Precision,
}

impl DeviceArguments {
    /// The device, once it has answered.
    pub fn open(&self) -> anyhow::Result<Device> {
        let mut probe = std::process::Command::new(std::env::current_exe().or_unavailable()?);
        match self.device.open(probe.arg("probe-device")) {
            Err(error @ DeviceError::NotBuilt) => Err(error).or_usage(),
            device => device.or_unavailable(),
        }
    }
}

/// Where and how to compute a step.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Computation")]
pub(super) struct ComputeArguments {
    #[command(flatten)]
    pub device: DeviceArguments,
    /// Keep the layers' inputs alone for the backward pass and run each layer forward once more: less memory, more time,
    /// the same bits
    #[arg(long, env = "SLUICE_TRAIN_RECOMPUTE_ACTIVATIONS")]
    recompute_activations: bool,
}

impl ComputeArguments {
    /// The same learner, which computes as these flags say.
    fn set(&self, mut learner: BurnLearner) -> BurnLearner {
        learner.compute_in(self.device.precision);
        learner.recompute_activations(self.recompute_activations);
        learner
    }
}
