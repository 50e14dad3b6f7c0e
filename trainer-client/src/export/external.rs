//! Weights that lie beside a graph, in a file of their own.

use std::io::Write;

use anyhow::Result;
use sluice_schemas::onnx::tensor_proto::DataLocation;
use sluice_schemas::onnx::{StringStringEntryProto, TensorProto};

/// File name of weights that do not fit into the graph's.
pub const DATA_FILE: &str = "model.onnx.data";
/// Where external tensors begin: at a page, so that they can be mapped into memory.
pub(super) const PAGE_BYTES: usize = 4096;

/// Where weights go that are not in the graph's own file.
pub(super) struct External<'a> {
    file: &'a mut dyn Write,
    written: usize,
}

impl<'a> External<'a> {
    pub(super) fn new(file: &'a mut dyn Write) -> Self {
        Self { file, written: 0 }
    }

    /// Writes a tensor's bytes, and has it say where they are.
    pub(super) fn take(&mut self, tensor: &mut TensorProto, bytes: &[u8]) -> Result<()> {
        let begin = self.written.next_multiple_of(PAGE_BYTES);
        self.file.write_all(&vec![0; begin - self.written])?;
        self.file.write_all(bytes)?;
        self.written = begin + bytes.len();
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: Some(key.to_owned()),
            value: Some(value),
        };
        tensor.data_location = Some(DataLocation::External.into());
        tensor.external_data = vec![
            entry("location", DATA_FILE.to_owned()),
            entry("offset", begin.to_string()),
            entry("length", bytes.len().to_string()),
        ];
        Ok(())
    }
}
