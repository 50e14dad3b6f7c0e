//! Opening a session that fails rather than falls back.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use ort::ep;
use ort::ep::cuda::AttentionBackend;
use ort::session::Session;
use ort::session::builder::GraphOptimizationLevel;
use prost::Message as _;

use super::environment::environment;
use super::model::Model;
pub use crate::device::Device;
use crate::exit::{DATA, ExitCode as _};

/// Libraries that the CUDA provider is linked to, each after those it needs. Where they lie beside ONNX Runtime, as
/// `ops/setup-onnxruntime --cuda` puts them, they are loaded from there; else the system's are found by their names.
const CUDA_LIBRARIES: [&str; 4] =
    ["libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10"];

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

fn cuda(index: i32, options: &SessionOptions) -> ep::ExecutionProviderDispatch {
    // TF32 rounds what goes into a product to 10 bits, and a record says f32 where it means it.
    let mut cuda = ep::CUDA::default()
        .with_device_id(index)
        .with_tf32(false)
        // Growing by powers of two, the arena takes up to twice of what is needed.
        .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested)
        // Chosen here, and not by whether cuDNN lies about, which then need not be brought.
        .with_attention_backend(
            AttentionBackend::FLASH_ATTENTION
                | AttentionBackend::EFFICIENT_ATTENTION
                | AttentionBackend::MATH,
        );
    if options.device_memory_bytes > 0 {
        cuda = cuda.with_memory_limit(options.device_memory_bytes);
    }
    // Without it a missing GPU costs a log line and an hour of CPU time.
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
        // A pattern of memory is kept by the sum of the inputs' shapes, which here are all different and sum up alike: the largest
        // batch's would be had for every other.
        .with_memory_pattern(false)
        .map_err(|error| anyhow::anyhow!("cannot switch off memory patterns: {error}"))?
        // A product of weights that the graph widens from 4 bits is one of floats; ONNX Runtime fuses the two, and its default (4)
        // then rounds what they are multiplied with to 8 bits. 1 is float32.
        .with_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        .map_err(|error| anyhow::anyhow!("cannot ask for products in float32: {error}"))?
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
    };
    if !providers.is_empty() {
        preload_cuda(&options.library)?;
        // Weights beside the arena, which they would double where it grows.
        builder = builder
            .with_device_allocated_initializers()
            .map_err(|error| anyhow::anyhow!("cannot place the weights: {error}"))?;
        builder = builder.with_execution_providers(providers).map_err(|error| {
            anyhow::anyhow!(
                "cannot use {}: {error}; the GPU build of ONNX Runtime (`ops/setup-onnxruntime --cuda`, which brings \
                 CUDA 13's libraries) and a driver are needed",
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
    builder
        .commit_from_memory(&model.onnx.encode_to_vec())
        .context("ONNX Runtime refuses the model")
        .exit_code(DATA)
}
