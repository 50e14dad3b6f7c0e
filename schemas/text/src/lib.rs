//! What both programs read of other people's files: text, JSON and tokenizers, as the tools of others write them. Also
//! how both print.
//!
//! Nothing here takes memory by the size of a file or of a line, and every bad document is an error value of its own.

mod bounds;
mod compression;
mod documents;
pub mod json;
mod lines;
pub mod output;
mod pointer;
mod tokenizer;

pub use bounds::{Bounds, UnknownToken};
pub use documents::{Documents, Fields, Format, TEXT_BYTES_MAX, Text, TextReader};
pub use lines::FileLines;
pub use pointer::{LfsPointer, refuse_pointer, refuse_pointer_in};
pub use tokenizer::{EncodeError, TOKENS_MAX, TextTokenizer, TokenizerError};
