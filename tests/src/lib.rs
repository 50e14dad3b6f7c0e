//! What the end-to-end tests share: the real binaries, a broker, a daemon, and ways to look at topics.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

mod broker;
mod cluster;
mod daemon;
mod elections;
pub mod experiments;
mod group;
mod kafka;
mod machine;
pub mod oracle;
mod prometheus;
mod proxy;
pub mod ranks;
pub mod steady;
mod topic;
mod trainer;
mod trapped_model;

use std::path::{Path, PathBuf};

pub use broker::Broker;
pub use cluster::Cluster;
pub use daemon::{Daemon, http_get};
pub use group::{Group, Place};
pub use kafka::{Frozen, Kafka, Shape};
pub use machine::Machine;
pub use prometheus::{Prometheus, promtool};
pub use proxy::{End, Proxy, Request};
pub use topic::{Record, produce, produce_keyless, produce_to, read_all};
pub use trainer::Trainer;
pub use trapped_model::{Leak, TRAP, write_greedy_model, write_hanging_model, write_leaking_model};

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
    environment("ORT_DYLIB_PATH")
}

/// The Python with protobuf and a Kafka client in it, as `ops/test` sets it up.
pub fn python() -> PathBuf {
    environment("SLUICE_TEST_PYTHON")
}

/// A Python with `PyTorch` and the wheel `sluice-feed`, as `ops/feed-python` prints it.
pub fn torch_python() -> PathBuf {
    environment("SLUICE_TEST_TORCH_PYTHON")
}

fn environment(name: &str) -> PathBuf {
    let value = std::env::var_os(name).unwrap_or_else(|| {
        panic!("{name} is not set; `ops/test` sets up what the tests need, and `eval \"$(ops/test --env)\"` exports it")
    });
    PathBuf::from(value)
}

/// A binary of this workspace, built in the same profile as the tests.
pub fn binary(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    // Tests lie in `deps`, beside the binaries' folder.
    let folder = this.ancestors().skip(1).find(|folder| !folder.ends_with("deps")).unwrap();
    let path = folder.join(name);
    assert!(path.exists(), "{} is not built; run `cargo build --release --bins` first", path.display());
    path
}
