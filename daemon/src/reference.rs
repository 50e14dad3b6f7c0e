//! The reference model as the settings ask for it: read, opened on its device, its context policy decided.

use std::path::PathBuf;

use anyhow::anyhow;
use sluice_schemas::record::ContextPolicy;

use crate::config::Config;
use crate::exit::{DATA, ExitCode as _, NO_INPUT, USAGE};
use crate::pipeline;
use crate::score::Scorer;
use crate::score::model::Model;
use crate::score::runtime::{Device, SessionOptions};

/// A reference model that is ready to score.
#[derive(Debug)]
pub struct Reference {
    /// What was read.
    pub model: Model,
    /// The model on its device.
    pub scorer: Scorer,
    /// How it sees a document.
    pub policy: ContextPolicy,
    /// Where it runs.
    pub device: Device,
}

impl Reference {
    /// Reads and opens the model; what is to be known of it goes to the log.
    pub fn open(config: &Config) -> anyhow::Result<Self> {
        let device =
            config.model.device.parse::<Device>().map_err(|error| anyhow!(error)).exit_code(USAGE)?;
        let model = Model::load(&config.model.path, device, config.score.entropies).exit_code(NO_INPUT)?;
        for finding in &model.findings {
            tracing::warn!(finding = finding.code(), "{finding}");
        }
        let policy = pipeline::context_policy(config, &model).exit_code(USAGE)?;
        let options = SessionOptions {
            library: onnxruntime_library(&config.model.onnxruntime),
            device,
            threads: config.model.threads,
            device_memory_bytes: config.model.device_memory_bytes,
        };
        let scorer = Scorer::new(&model, &options, config.score.entropies).exit_code(NO_INPUT)?;
        Ok(Self { model, scorer, policy, device })
    }

    /// Runs the shapes that scoring will meet; says how many there were.
    pub fn warm_up(&mut self, config: &Config) -> anyhow::Result<usize> {
        pipeline::warm_up(&mut self.scorer, self.device, self.policy, &config.batch).exit_code(DATA)
    }
}

/// The library that the settings name, else the one of the environment, else the system's.
fn onnxruntime_library(setting: &std::path::Path) -> PathBuf {
    if !setting.as_os_str().is_empty() {
        return setting.to_owned();
    }
    std::env::var_os("ORT_DYLIB_PATH").map_or_else(|| PathBuf::from("libonnxruntime.so"), PathBuf::from)
}
