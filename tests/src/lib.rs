//! What the end-to-end tests share: the real binaries, a broker, a daemon, and ways to look at topics.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A file of golden values.
pub fn golden(name: &str) -> PathBuf {
    root().join("tests/golden").join(name)
}

/// ONNX Runtime's library, as `ops/test` sets it up.
pub fn onnxruntime() -> PathBuf {
    let path = std::env::var_os("ORT_DYLIB_PATH")
        .expect("ORT_DYLIB_PATH is not set; run `ops/test`, or export ORT_DYLIB_PATH=$(ops/setup-onnxruntime)");
    PathBuf::from(path)
}
