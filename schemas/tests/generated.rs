//! The Rust types are committed, so that a build needs no protobuf compiler; this test keeps them true.
//!
//! `SLUICE_BLESS=1 cargo test -p sluice-schemas` writes them anew after a change of a `.proto`.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};

fn generate(proto: &str, package: &str, comments: bool) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile([root.join("proto").join(proto)], [root.join("proto")]).unwrap();
    let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(package);
    std::fs::create_dir_all(&out).unwrap();
    let mut config = prost_build::Config::new();
    config.out_dir(&out).bytes(["."]).btree_map(["."]);
    if !comments {
        // ONNX indents its comments, which rustdoc would run as code.
        config.disable_comments(["."]);
    }
    config.compile_fds(descriptors).unwrap();

    let file = format!("{package}.rs");
    let fresh = std::fs::read_to_string(out.join(&file)).unwrap();
    let committed = root.join("src/generated").join(&file);
    if std::env::var_os("SLUICE_BLESS").is_some() {
        std::fs::write(&committed, &fresh).unwrap();
    }
    assert!(
        std::fs::read_to_string(&committed).unwrap() == fresh,
        "{} is not what {proto} gives; run SLUICE_BLESS=1 cargo test -p sluice-schemas",
        committed.display()
    );
}

#[test]
fn records_are_up_to_date() {
    generate("sluice/v1/records.proto", "sluice.v1", true);
}

#[test]
fn onnx_is_up_to_date() {
    generate("onnx/onnx-ml.proto", "onnx", false);
}
