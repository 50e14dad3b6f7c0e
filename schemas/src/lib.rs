//! What travels between the rooms of Sluice: records and their checks, fingerprints, topic and header names,
//! how documents are cut into windows, and ONNX's own protobuf types. No I/O happens here.

pub mod fingerprint;
pub mod graph;
pub mod names;
pub mod record;
pub mod windows;

pub use windows::{ClassifiedSpan, WindowSpan, classified_windows, windows};

/// ONNX's protobuf types, generated from `proto/onnx/onnx-ml.proto`; byte fields share the buffer they were read
/// from, so that decoding a model never copies its weights.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
#[rustfmt::skip]
pub mod onnx {
    include!("generated/onnx.rs");
}

/// The records as they are on the wire, unchecked, generated from `proto/sluice/v1/records.proto`.
/// Use [`record`] instead, which holds what has been checked.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
#[rustfmt::skip]
pub mod wire {
    include!("generated/sluice.v1.rs");
}
