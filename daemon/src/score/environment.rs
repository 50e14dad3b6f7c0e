//! Finding and starting ONNX Runtime.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use ort::environment::Environment;

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
