//! `sluice-train export`, `evaluate` and `report`: what becomes of finished runs.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, bail};
use clap::Args;
use sluice_feed::pack::BatchShape;
use sluice_text::output::{Reader, print_line, say};

use super::arguments::at_least;
use crate::export::export_onnx;
use crate::failure::Classify;
use crate::model::BurnLearner;
use crate::model::config::CONFIG_FILE;
use crate::model::optimizer::AdamWConfig;
use crate::report;
use crate::run::checkpoints::{CHECKPOINTS, latest_checkpoint};
use crate::run::recorded::RecordedRun;
use crate::text::{TOKENIZER_FILE, TextTokenizer};
use crate::training::evaluate::{EvalFile, read_sets};

/// Arguments of `sluice-train export`.
#[derive(Args, Clone, Debug)]
pub(super) struct ExportArguments {
    /// Run folder, or one of its checkpoints
    #[arg(long, env = "SLUICE_TRAIN_RUN", value_name = "FOLDER")]
    run: PathBuf,
    /// Folder for the ONNX model and its tokenizer
    #[arg(long, env = "SLUICE_TRAIN_OUT", value_name = "FOLDER")]
    out: PathBuf,
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
    /// Sequences in a batch
    #[arg(long, env = "SLUICE_TRAIN_BATCH_SIZE", default_value_t = 16, value_parser = at_least::<1>)]
    batch_size: usize,
    /// Tokens in a sequence [default: the longest that the model reads, at most 2048]
    #[arg(long, env = "SLUICE_TRAIN_SEQUENCE_LENGTH", value_parser = at_least::<2>)]
    sequence_length: Option<usize>,
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
    /// Run folders to compare
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
}

/// Exports a run's last checkpoint.
pub(super) fn export(arguments: &ExportArguments) -> anyhow::Result<()> {
    let checkpoint = checkpoint_in(&arguments.run).or_usage()?;
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
    export_onnx(&checkpoint, &arguments.out)?;
    say(format_args!("exported {} to {}", checkpoint.display(), arguments.out.display()));
    Ok(())
}

/// Whether two paths lead to one folder; a folder that is not there yet is no other one.
fn is_same_folder(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// Prints the loss of a checkpoint on each set.
pub(super) fn evaluate(arguments: &EvaluateArguments) -> anyhow::Result<()> {
    let checkpoint = checkpoint_in(&arguments.checkpoint).or_usage()?;
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
    let shape = BatchShape { rows: arguments.batch_size, len };
    let never = AtomicBool::new(false);
    for set in read_sets(&arguments.evals, &tokenizer, shape)? {
        if let Some(loss) = set.loss(&learner, &never).or_data()? {
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
    let page = report::page(&arguments.title, &runs);
    std::fs::write(&arguments.out, page)
        .with_context(|| format!("cannot write {}", arguments.out.display()))?;
    print_line(&report::text_table(&runs))?;
    say(format_args!("the report is in {}", arguments.out.display()));
    Ok(())
}

/// The folder itself if it is a checkpoint, else the last checkpoint of the run in it.
fn checkpoint_in(folder: &Path) -> anyhow::Result<PathBuf> {
    if folder.join(CONFIG_FILE).is_file() {
        return Ok(folder.to_owned());
    }
    if !folder.join(CHECKPOINTS).is_dir() {
        bail!(
            "{} is neither a checkpoint ({CONFIG_FILE}) nor a run folder ({CHECKPOINTS}/)",
            folder.display()
        );
    }
    latest_checkpoint(folder)?
        .with_context(|| format!("{} holds no finished checkpoint; let the run reach one", folder.display()))
}
