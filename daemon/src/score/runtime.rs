//! Finding and starting ONNX Runtime, and opening a session that fails rather than falls back.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, bail};
use ort::environment::Environment;
use ort::ep;
use ort::session::Session;
use ort::session::builder::GraphOptimizationLevel;

use super::model::Model;
use crate::exit::{DATA, ExitCode as _};

/// Where the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// ONNX Runtime's CPU provider.
    Cpu,
    /// The CUDA provider on the GPU with this index.
    Cuda(i32),
    /// The `TensorRT` provider on the GPU with this index, and the CUDA provider for what it does not take.
    TensorRt(i32),
}

/// Libraries that the CUDA provider is linked to, each after those it needs. Where they lie beside ONNX Runtime, as
/// `ops/setup-onnxruntime --cuda` puts them, they are loaded from there; else the system's are found by their names.
const CUDA_LIBRARIES: [&str; 4] =
    ["libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10"];

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::TensorRt(index) => write!(f, "tensorrt:{index}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, index) = text.split_once(':').unwrap_or((text, "0"));
        let index = index.parse::<u16>().map(i32::from);
        match (kind, index) {
            ("cpu", _) if text == "cpu" => Ok(Self::Cpu),
            ("cuda", Ok(index)) => Ok(Self::Cuda(index)),
            ("tensorrt", Ok(index)) => Ok(Self::TensorRt(index)),
            _ => Err(format!("`{text}` is no device; use `cpu`, `cuda:N` or `tensorrt:N`, such as `cuda:0`")),
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

fn cuda(index: i32, options: &SessionOptions) -> ep::ExecutionProviderDispatch {
    // TF32 rounds what goes into a product to 10 bits, and a record says f32 where it means it.
    let mut cuda = ep::CUDA::default().with_device_id(index).with_tf32(false);
    if options.device_memory_bytes > 0 {
        cuda = cuda.with_memory_limit(options.device_memory_bytes);
    }
    cuda.build().error_on_failure()
}

/// Loads CUDA's libraries that lie beside ONNX Runtime's.
fn preload_cuda(library: &Path) -> anyhow::Result<()> {
    let folder = library.parent().unwrap_or(Path::new("."));
    for path in CUDA_LIBRARIES.iter().map(|name| folder.join(name)).filter(|path| path.exists()) {
        ort::util::preload_dylib(&path).with_context(|| format!("cannot load {}", path.display()))?;
    }
    Ok(())
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
    let providers = match options.device {
        Device::Cpu => Vec::new(),
        Device::Cuda(index) => vec![cuda(index, options)],
        Device::TensorRt(index) => vec![
            // Without `error_on_failure` a missing GPU costs a log line and an hour of CPU time.
            ep::TensorRT::default().with_device_id(index).build().error_on_failure(),
            cuda(index, options),
        ],
    };
    if !providers.is_empty() {
        preload_cuda(&options.library)?;
        builder = builder.with_execution_providers(providers).map_err(|error| {
            anyhow::anyhow!(
                "cannot use {}: {error}; the GPU build of ONNX Runtime (`ops/setup-onnxruntime --cuda`, which brings \
                 CUDA 13's libraries) and a driver are needed, and for TensorRT its own libraries",
                options.device
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
    builder.commit_from_memory(&model.graph).context("ONNX Runtime refuses the model").exit_code(DATA)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_with_an_index() {
        let parse = |text: &str| text.parse::<Device>();
        assert_eq!(parse("cpu"), Ok(Device::Cpu));
        assert_eq!(parse("cuda"), Ok(Device::Cuda(0)));
        assert_eq!(parse("cuda:3"), Ok(Device::Cuda(3)));
        assert_eq!(parse("tensorrt:1"), Ok(Device::TensorRt(1)));
        assert_eq!(Device::TensorRt(1).to_string(), "tensorrt:1");
        for wrong in ["", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "rocm:0"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
