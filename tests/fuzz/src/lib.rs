//! What is tried with bytes that nobody meant: whatever they are, an answer or an error value comes of them, in bounded
//! memory. `tests/fuzz.rs` tries some in every run of the tests, and `ops/fuzz` very many, led by coverage.

use std::io::Cursor;
use std::sync::LazyLock;

use bytes::Bytes;
use prost::Message as _;
use sluice_daemon::config::Layers;
use sluice_daemon::device::Device;
use sluice_daemon::score::graft::HeadOptions;
use sluice_daemon::score::model::rewrite;
use sluice_schemas::onnx::ModelProto;
use sluice_schemas::record::{ScoredDocument, TokenizedDocument};
use sluice_text::{Fields, Format, TextReader, json};

/// Most bytes of a text, small enough to be met.
const TEXT_BYTES_MAX: usize = 4096;

/// Every target by its name.
pub const TARGETS: [(&str, Target); 4] =
    [("records", records), ("lines", lines), ("settings", settings), ("graph", graph)];

/// Tries some bytes.
pub type Target = fn(&[u8]);

/// Decodes both records of Kafka's topics; what is a record says the same once it is encoded again.
///
/// # Panics
///
/// Where a record says something else once it is encoded again.
pub fn records(data: &[u8]) {
    let payload = Bytes::copy_from_slice(data);
    if let Ok(document) = TokenizedDocument::decode(payload.clone()) {
        let again = TokenizedDocument::decode(document.encode());
        assert_eq!(again.as_ref().ok(), Some(&document), "{again:?}");
    }
    if let Ok(scored) = ScoredDocument::decode(payload) {
        assert_eq!(scored.reference_losses.len(), scored.document.tokens.len());
        let again = ScoredDocument::decode(scored.encode());
        assert_eq!(again.as_ref().ok(), Some(&scored), "{again:?}");
    }
}

/// Reads a file of text, packed or not, and a value of JSON as Python writes it. The first byte says what the file is
/// called and taken for.
///
/// # Panics
///
/// Where a text is longer than it may be, or has no id.
pub fn lines(data: &[u8]) {
    let Some((&first, rest)) = data.split_first() else { return };
    let format = [Format::Auto, Format::Jsonl, Format::Text][usize::from(first) % 3];
    let name = if first & 0x80 == 0 { "file" } else { "file.jsonl" };
    let fields = Fields { context: Some("context".to_owned()), ..Fields::default() };
    let reader = TextReader { format, fields, text_bytes_max: TEXT_BYTES_MAX };
    if let Ok(documents) = reader.read(name, Box::new(Cursor::new(rest.to_vec()))) {
        for document in documents.flatten() {
            assert!(document.text.len() + document.context.len() <= TEXT_BYTES_MAX);
            assert!(!document.id.is_empty());
        }
    }
    let _ = json::from_slice::<serde_json::Value>(rest);
}

/// Lays flags and variables over a file of settings. A byte 0 ends each part: the file, then pairs of names and values;
/// a name in capitals is a variable's, and any other a flag's.
///
/// # Panics
///
/// Where settings pass that cannot be used, or an error says nothing.
pub fn settings(data: &[u8]) {
    static LAYERS: LazyLock<Layers> = LazyLock::new(Layers::default);
    let text = String::from_utf8_lossy(data);
    let mut parts = text.split('\0');
    let file = parts.next().unwrap_or_default();
    // A file that somebody names is none of theirs to read.
    if text.contains("from_file") {
        return;
    }
    let (mut variables, mut flags) = (Vec::new(), Vec::new());
    while let Some(name) = parts.next() {
        let value = parts.next().unwrap_or_default();
        if name.starts_with("SLUICED") { variables.push((name, value)) } else { flags.extend([name, value]) }
    }
    match LAYERS.load(file, &variables, &flags) {
        Ok(config) => assert_eq!(config.problems(), Vec::<String>::new()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Looks for a model's head and rewrites the graph. What comes of it can be written, and read again.
///
/// # Panics
///
/// Where a rewritten graph cannot be read.
pub fn graph(data: &[u8]) {
    let Some((&first, rest)) = data.split_first() else { return };
    let Ok(mut model) = ModelProto::decode(rest) else { return };
    let device = if first & 1 == 0 { Device::Cpu } else { Device::Cuda(0) };
    let rows_max = (first & 4 == 0).then_some(64);
    if rewrite(&mut model, None, HeadOptions { device, entropies: first & 2 == 0, rows_max }).is_ok() {
        let bytes = model.encode_to_vec();
        assert!(ModelProto::decode(bytes.as_slice()).is_ok());
    }
}
