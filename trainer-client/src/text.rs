//! The tokenizer of evaluation text and of what people look at: the one that `sluiced ingest` makes documents with.

pub use sluice_text::{Bounds, TextTokenizer};

/// File name of a tokenizer in a Hugging Face style folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
