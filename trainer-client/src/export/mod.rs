//! A checkpoint for others: as an ONNX model that the daemon scores with, or as transformers publishes models.

mod external;
mod graph;

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use prost::Message;

use crate::failure::Classify;
use crate::model::ModelConfig;
use crate::model::carried::Carried;
use crate::model::checkpoint::{read_weights, write_weights};
use crate::run::files::{write_through, write_whole};
use crate::run::tensors::{Pending, Stored};
use crate::text::TOKENIZER_FILE;
pub use external::DATA_FILE;
use external::External;
use graph::onnx_model;
pub use graph::{INPUT, OUTPUT};

/// File name of the exported graph, and of its weights where they fit beside it.
pub const MODEL_FILE: &str = "model.onnx";

/// Protobuf messages end at 2 GiB; the margin is for all that is not weights.
pub const INLINE_BYTES_MAX: usize = (1 << 31) - (1 << 20);
/// As in transformers.
pub const SHARD_BYTES_MAX: usize = 5_000_000_000;

/// Writes `model.onnx` and `config.json` into `out_folder` (made if missing) from the weights and the `config.json` of
/// `checkpoint_folder`, and copies its `tokenizer.json` and what else belongs to it. Weights of more than
/// `inline_bytes_max` go into `model.onnx.data`.
pub fn export_onnx(
    checkpoint_folder: &Path,
    out_folder: &Path,
    stored: Stored,
    inline_bytes_max: usize,
) -> Result<()> {
    let config = ModelConfig::read(checkpoint_folder).or_data()?;
    let carried = Carried::read(checkpoint_folder).or_data()?;
    let weights = read_weights(checkpoint_folder, &config).or_data()?;
    let table = config.max_position_embeddings * config.head_dim();
    let values = table + weights.iter().map(|weight| weight.values.len()).sum::<usize>();
    let may_fail = || format!("cannot export {}", checkpoint_folder.display());
    fs::create_dir_all(out_folder).with_context(|| format!("cannot make folder {}", out_folder.display()))?;
    // A graph that is there would have other weights beside it.
    remove_if_there(&out_folder.join(MODEL_FILE))?;
    let data = out_folder.join(DATA_FILE);
    let model = if values * stored.bytes() > inline_bytes_max {
        let mut model = None;
        write_through(&data, |file| {
            model = Some(onnx_model(&config, weights, stored, Some(External::new(file)))?);
            Ok(())
        })
        .with_context(may_fail)?;
        model.context("no graph was made")?
    } else {
        remove_if_there(&data)?;
        onnx_model(&config, weights, stored, None).with_context(may_fail)?
    };
    carried.write_for_graph(out_folder, &config, stored)?;
    copy_tokenizer(checkpoint_folder, out_folder)?;
    write_whole(&out_folder.join(MODEL_FILE), &model.encode_to_vec())
}

/// Writes a folder as transformers publishes models: weights that are `stored` so, in files of at most `shard_bytes_max`,
/// `config.json`, the tokenizer and what else came with the weights that the run began with.
pub fn publish(
    checkpoint_folder: &Path,
    out_folder: &Path,
    stored: Stored,
    shard_bytes_max: usize,
) -> Result<()> {
    let config = ModelConfig::read(checkpoint_folder).or_data()?;
    let carried = Carried::read(checkpoint_folder).or_data()?;
    let weights = read_weights(checkpoint_folder, &config).or_data()?;
    fs::create_dir_all(out_folder).with_context(|| format!("cannot make folder {}", out_folder.display()))?;
    write_weights(out_folder, weights.iter().map(Pending::of).collect(), stored, shard_bytes_max)?;
    carried.write(out_folder, &config, stored)?;
    copy_tokenizer(checkpoint_folder, out_folder)
}

fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    let tokenizer = from.join(TOKENIZER_FILE);
    match fs::read(&tokenizer) {
        Ok(bytes) => write_whole(&to.join(TOKENIZER_FILE), &bytes),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", tokenizer.display())),
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
