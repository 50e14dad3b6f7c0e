//! Finding and starting ONNX Runtime, and opening a session that fails rather than falls back.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, bail};
use ort::environment::Environment;
use ort::ep;
use ort::session::Session;
use ort::session::builder::GraphOptimizationLevel;

use super::model::Model;

/// Where the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// ONNX Runtime's CPU provider.
    Cpu,
    /// The CUDA provider on the GPU with this index.
    Cuda(i32),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", index)) if index.parse::<u16>().is_ok() => {
                Ok(Self::Cuda(index.parse().unwrap_or_default()))
            }
            _ => Err(format!("`{text}` is no device; use `cpu` or `cuda:N`, such as `cuda:0`")),
        }
    }
}

/// How a session is opened.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Path of `libonnxruntime.so`.
    pub library: PathBuf,
    /// Where the model runs.
    pub device: Device,
    /// Threads of one operator on the CPU; 0 for one a core.
    pub threads: usize,
    /// Most bytes that the CUDA provider's arena may take; 0 for no limit.
    pub device_memory_bytes: usize,
}

/// ONNX Runtime allows one environment in a process.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// The process's environment; the first call loads ONNX Runtime from `library`, later ones share it.
pub fn environment(library: &Path) -> anyhow::Result<Environment> {
    let mut shared = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(environment) = shared.as_ref() {
        return Ok(environment.clone());
    }
    let builder = ort::init_from(library).with_context(|| {
        format!(
            "cannot load ONNX Runtime from {}; `ops/setup-onnxruntime` fetches it and prints its path, which belongs \
             into `model.onnxruntime` or the environment variable ORT_DYLIB_PATH",
            library.display()
        )
    })?;
    let environment =
        builder.with_name("sluiced").with_telemetry(false).build().context("cannot start ONNX Runtime")?;
    Ok(shared.insert(environment).clone())
}

/// Opens a session for `model`.
pub fn open_session(model: &Model, options: &SessionOptions) -> anyhow::Result<Session> {
    let environment = environment(&options.library)?;
    let mut builder = Session::builder(&environment)
        .context("cannot create a session")?
        .with_optimization_level(GraphOptimizationLevel::All)
        .map_err(|error| anyhow::anyhow!("cannot set the optimisation level: {error}"))?
        // Spinning threads would take the cores that decoding and Kafka need.
        .with_intra_op_spinning(false)
        .map_err(|error| anyhow::anyhow!("cannot switch off spinning: {error}"))?;
    if options.threads > 0 {
        builder = builder
            .with_intra_threads(options.threads)
            .map_err(|error| anyhow::anyhow!("cannot set {} threads: {error}", options.threads))?;
    }
    if let Device::Cuda(index) = options.device {
        let mut cuda = ep::CUDA::default().with_device_id(index);
        if options.device_memory_bytes > 0 {
            cuda = cuda.with_memory_limit(options.device_memory_bytes);
        }
        // Without `error_on_failure` a missing GPU costs a log line and an hour of CPU time.
        builder = builder.with_execution_providers([cuda.build().error_on_failure()]).map_err(|error| {
            anyhow::anyhow!(
                "cannot use cuda:{index}: {error}; the GPU build of ONNX Runtime (`ops/setup-onnxruntime --cuda`), \
                 CUDA 13 and a driver are needed"
            )
        })?;
    }
    if let Some(folder) = &model.data_folder {
        let Some(folder) = folder.to_str() else {
            bail!("the folder {} of the model's data is not UTF-8", folder.display());
        };
        builder = builder
            .with_config_entry("session.model_external_initializers_file_folder_path", folder)
            .map_err(|error| anyhow::anyhow!("cannot set the folder of external data: {error}"))?;
    }
    builder.commit_from_memory(&model.graph).context("ONNX Runtime refuses the model")
}
