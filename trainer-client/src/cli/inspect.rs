//! `sluice-train export`, `evaluate` and `report`: what becomes of finished runs.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use sluice_feed::plan::CELLS_MAX;
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_text::output::{Reader, print_line, say};

use super::arguments::{BoundsArguments, at_least, between};
use crate::export::{INLINE_BYTES_MAX, SHARD_BYTES_MAX, export_onnx, publish};
use crate::failure::{Classify, Failure};
use crate::model::config::CONFIG_FILE;
use crate::model::optimizer::AdamWConfig;
use crate::model::{BurnLearner, ModelConfig};
use crate::report;
use crate::run::checkpoints::{Best, CHECKPOINTS, latest_checkpoint};
use crate::run::folder::recorded;
use crate::run::recorded::RecordedRun;
use crate::run::tensors::Stored;
use crate::text::{TOKENIZER_FILE, TextTokenizer};
use crate::training::evaluate::{EvalFile, policy_of, read_sets};

/// For whom a checkpoint is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ExportFormat {
    /// A graph for ONNX Runtime, which `sluiced serve` loads
    Onnx,
    /// A folder for transformers, as Hugging Face's hub has them
    Safetensors,
}

/// Arguments of `sluice-train export`.
#[derive(Args, Clone, Debug)]
pub(super) struct ExportArguments {
    /// Run folder, or one of its checkpoints
    #[arg(long, env = "SLUICE_TRAIN_RUN", value_name = "FOLDER")]
    run: PathBuf,
    /// Of a run folder, the last checkpoint or the best [default: the best of a reference, else the last]
    #[arg(long, env = "SLUICE_TRAIN_WHICH", value_enum)]
    which: Option<Which>,
    /// Folder for the model and its tokenizer
    #[arg(long, env = "SLUICE_TRAIN_OUT", value_name = "FOLDER")]
    out: PathBuf,
    /// What to write
    #[arg(long, env = "SLUICE_TRAIN_FORMAT", value_enum, default_value_t = ExportFormat::Onnx)]
    format: ExportFormat,
    /// What weights are stored as, and a graph computes in; 16 bits round to the nearest
    #[arg(long, env = "SLUICE_TRAIN_DTYPE", value_enum, default_value_t = Stored::F32)]
    dtype: Stored,
    /// Put the weights of a graph into a file of their own, model.onnx.data [default: where they are more than 2 GiB]
    #[arg(long, env = "SLUICE_TRAIN_EXTERNAL_DATA")]
    external_data: bool,
    /// Largest weights file of the safetensors format; what is larger is written as several, with an index
    #[arg(long, env = "SLUICE_TRAIN_SHARD_BYTES_MAX", value_name = "BYTES", default_value_t = SHARD_BYTES_MAX, value_parser = at_least::<1>)]
    shard_bytes_max: usize,
}

/// Arguments of `sluice-train evaluate`.
#[derive(Args, Clone, Debug)]
pub(super) struct EvaluateArguments {
    /// Checkpoint, or a run folder for its last one
    #[arg(long, env = "SLUICE_TRAIN_CHECKPOINT", value_name = "FOLDER")]
    checkpoint: PathBuf,
    /// The model's tokenizer.json [default: the one in the checkpoint]
    #[arg(long, env = "SLUICE_TRAIN_TOKENIZER", value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Held-out text, JSON Lines with a "text" field; repeatable, in the environment one a line
    #[arg(
        long = "eval",
        env = "SLUICE_TRAIN_EVAL",
        value_name = "NAME=FILE",
        value_delimiter = '\n',
        required = true
    )]
    evals: Vec<EvalFile>,
    #[command(flatten)]
    bounds: BoundsArguments,
    /// Sequences in a batch
    #[arg(long, env = "SLUICE_TRAIN_BATCH_SIZE", default_value_t = 16, value_parser = between::<1, CELLS_MAX>)]
    batch_size: usize,
    /// Tokens that the model sees at once, the daemon's context.window [default: the longest that the model reads, at most
    /// 2048]
    #[arg(long, env = "SLUICE_TRAIN_SEQUENCE_LENGTH", value_parser = between::<2, CELLS_MAX>)]
    sequence_length: Option<usize>,
    /// Tokens between the starts of two windows of a longer document, the daemon's context.stride [default: half of the
    /// window]
    #[arg(long, env = "SLUICE_TRAIN_STRIDE", value_parser = at_least::<1>)]
    stride: Option<usize>,
    /// Where the BOS that config.json names stands, the daemon's score.bos
    #[arg(long, env = "SLUICE_TRAIN_BOS", value_enum, default_value_t = BosName::None)]
    bos: BosName,
    /// Of a run folder, the last checkpoint or the best [default: the best of a reference, else the last]
    #[arg(long, env = "SLUICE_TRAIN_WHICH", value_enum)]
    which: Option<Which>,
}

/// What stands before the first token of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BosName {
    /// Nothing
    None,
    /// A BOS before each document
    Document,
    /// A BOS before each window
    Window,
}

/// Which checkpoint of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Which {
    /// The last one
    Last,
    /// The one with the lowest loss on held-out text (--keep-best)
    Best,
}

impl EvaluateArguments {
    /// What a token is read with, by a model of windows of `window` tokens.
    fn policy(&self, window: usize, bos_token: Option<u32>) -> anyhow::Result<ContextPolicy> {
        let bos = match (self.bos, bos_token) {
            (BosName::None, _) => Bos::None,
            (BosName::Document, Some(token)) => Bos::Document(token),
            (BosName::Window, Some(token)) => Bos::Window(token),
            (_, None) => {
                let error = "--bos needs a bos_token_id in config.json, which names none: leave it out";
                return Err(Failure::Usage(error.to_owned()).into());
            }
        };
        let policy = ContextPolicy { bos, ..policy_of(window) };
        let stride = self.stride.map_or(policy.stride, |stride| stride as u32);
        let longest = policy.window.saturating_sub(1 + u32::from(bos != Bos::None));
        if !(1..=longest).contains(&stride) {
            let error = format!(
                "windows of {window} tokens that begin every {stride} would leave a token without one before it: give a \
                 --stride from 1 to {longest}"
            );
            return Err(Failure::Usage(error).into());
        }
        Ok(ContextPolicy { stride, ..policy })
    }
}

/// Arguments of `sluice-train report`.
#[derive(Args, Clone, Debug)]
pub(super) struct ReportArguments {
    /// The HTML file to write
    #[arg(long, env = "SLUICE_TRAIN_OUT", value_name = "FILE")]
    out: PathBuf,
    /// Title of the page
    #[arg(long, env = "SLUICE_TRAIN_TITLE", default_value = "Sluice: runs compared")]
    title: String,
    /// Folder of the reference model (its config.json), to count its forward pass where compute is compared
    #[arg(long, env = "SLUICE_TRAIN_SCORED_BY", value_name = "FOLDER")]
    scored_by: Option<PathBuf>,
    /// Run folders to compare
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
}

/// Exports a run's last checkpoint, or a published one.
pub(super) fn export(arguments: &ExportArguments) -> anyhow::Result<()> {
    let checkpoint = checkpoint_in(&arguments.run, arguments.which).or_usage()?;
    for source in [&checkpoint, &arguments.run] {
        if is_same_folder(source, &arguments.out) {
            let error = anyhow::anyhow!(
                "--out {} is the folder that is exported; give another one",
                arguments.out.display()
            );
            return Err(error).or_usage();
        }
    }
    // A model without a tokenizer that can be read is of no use to those who load it.
    TextTokenizer::read(&checkpoint.join(TOKENIZER_FILE)).or_data()?;
    match arguments.format {
        ExportFormat::Onnx => {
            let inline_bytes_max = if arguments.external_data { 0 } else { INLINE_BYTES_MAX };
            export_onnx(&checkpoint, &arguments.out, arguments.dtype, inline_bytes_max)?;
        }
        ExportFormat::Safetensors => {
            publish(&checkpoint, &arguments.out, arguments.dtype, arguments.shard_bytes_max)?;
        }
    }
    say(format_args!("exported {} to {}", checkpoint.display(), arguments.out.display()));
    Ok(())
}

/// Whether two paths lead to one folder; a folder that is not there yet is no other one.
fn is_same_folder(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// Prints the loss of a checkpoint on each set.
pub(super) fn evaluate(arguments: &EvaluateArguments) -> anyhow::Result<()> {
    let checkpoint = checkpoint_in(&arguments.checkpoint, arguments.which).or_usage()?;
    let learner = BurnLearner::open(&checkpoint, AdamWConfig::default()).or_data()?;
    let own = checkpoint.join(TOKENIZER_FILE);
    let tokenizer = match &arguments.tokenizer {
        Some(file) => TextTokenizer::read(file)?,
        None => TextTokenizer::read(&own).or_data()?,
    };
    if own.is_file() && TextTokenizer::read(&own).or_data()?.fingerprint() != tokenizer.fingerprint() {
        let error = anyhow::anyhow!(
            "--tokenizer is not the tokenizer of the checkpoint, {}; leave it out",
            own.display()
        );
        return Err(error).or_usage();
    }
    let config = learner.config();
    if config.vocab_size < tokenizer.vocabulary() as usize {
        let error = anyhow::anyhow!(
            "the model has {} token rows, but the tokenizer has ids up to {}; give the tokenizer it was trained with",
            config.vocab_size,
            tokenizer.vocabulary() - 1
        );
        return Err(error).or_usage();
    }
    let longest = config.max_position_embeddings;
    if longest < 2 {
        return Err(anyhow::anyhow!("the model reads a single token, so it predicts none")).or_data();
    }
    let len = arguments.sequence_length.unwrap_or_else(|| longest.min(2048));
    if len > longest {
        let error = anyhow::anyhow!(
            "the model reads at most {longest} tokens; give --sequence-length {longest} or less"
        );
        return Err(error).or_usage();
    }
    let policy = arguments.policy(len, learner.bos_token())?;
    let never = AtomicBool::new(false);
    let bounds = arguments.bounds.bounds(&tokenizer)?;
    for set in read_sets(&arguments.evals, &tokenizer, bounds, arguments.batch_size)? {
        if let Some(loss) = set.loss(&learner, policy, &never).or_data()? {
            let line = serde_json::to_string(&loss).context("cannot encode a loss")?;
            if print_line(&line)? == Reader::Gone {
                break;
            }
        }
    }
    Ok(())
}

/// Writes the report and prints its table.
pub(super) fn report(arguments: &ReportArguments) -> anyhow::Result<()> {
    let runs: Vec<RecordedRun> =
        arguments.runs.iter().map(|run| RecordedRun::read(run)).collect::<Result<_, _>>().or_data()?;
    let scored_by =
        arguments.scored_by.as_deref().map(ModelConfig::read).transpose().context("--scored-by").or_data()?;
    let page = report::page(&arguments.title, &runs, scored_by.as_ref());
    std::fs::write(&arguments.out, page)
        .with_context(|| format!("cannot write {}", arguments.out.display()))?;
    print_line(&report::text_table(&runs, scored_by.as_ref()))?;
    say(format_args!("the report is in {}", arguments.out.display()));
    Ok(())
}

/// The folder itself if it is a checkpoint, else one of the run in it.
fn checkpoint_in(folder: &Path, which: Option<Which>) -> anyhow::Result<PathBuf> {
    if folder.join(CONFIG_FILE).is_file() {
        return Ok(folder.to_owned());
    }
    if !folder.join(CHECKPOINTS).is_dir() {
        bail!(
            "{} is neither a checkpoint ({CONFIG_FILE}) nor a run folder ({CHECKPOINTS}/)",
            folder.display()
        );
    }
    let best = Best::read(folder)?;
    let which = which.unwrap_or_else(|| {
        let is_reference =
            recorded(folder).is_ok_and(|record| record.is_some_and(|record| record.command == "reference"));
        if is_reference && best.is_some() { Which::Best } else { Which::Last }
    });
    match (which, best) {
        (Which::Best, Some(best)) => {
            say(format_args!(
                "taking the best, of step {}: loss {:.4} on {}",
                best.step, best.loss, best.set
            ));
            Ok(best.folder(folder))
        }
        (Which::Best, None) => bail!(
            "{} keeps no best checkpoint; give --which last, or train with --keep-best NAME",
            folder.display()
        ),
        (Which::Last, _) => latest_checkpoint(folder)?.with_context(|| {
            format!("{} holds no finished checkpoint; let the run reach one", folder.display())
        }),
    }
}
