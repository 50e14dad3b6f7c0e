//! Text to token ids for evaluation, and back to pieces of text for people.

use std::path::Path;

use anyhow::{Context, anyhow};
use sluice_schemas::fingerprint::Fingerprint;
use tokenizers::Tokenizer;

use crate::failure::Classify;

/// File name of a tokenizer in a Hugging Face style folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// A Hugging Face tokenizer and the file it came from.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    file: Vec<u8>,
    vocabulary: u32,
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`. A file that cannot be read is another [`crate::failure::Failure`] than one that is no
    /// tokenizer.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let file = std::fs::read(path)
            .with_context(|| format!("cannot read tokenizer {}", path.display()))
            .or_no_input()?;
        let tokenizer = Tokenizer::from_bytes(&file)
            .map_err(|error| anyhow!("{} is not a Hugging Face tokenizer: {error}", path.display()))
            .or_data()?;
        Self::new(tokenizer, file)
            .with_context(|| format!("cannot use tokenizer {}", path.display()))
            .or_data()
    }

    fn new(mut tokenizer: Tokenizer, file: Vec<u8>) -> anyhow::Result<Self> {
        // Documents are cut by the packer; a tokenizer that cuts or pads by itself would lose tokens or add some.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| anyhow!("{error}"))?;
        // "<|endoftext|>" in a text is a text about tokenizers, not the end of one.
        tokenizer.set_encode_special_tokens(true);
        let highest = tokenizer.get_vocab(true).values().copied().max().context("it knows no token")?;
        let vocabulary =
            highest.checked_add(1).context("its highest token id is no id: number them from 0")?;
        Ok(Self { tokenizer, file, vocabulary })
    }

    /// SHA-256 of the file, which records carry.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of_bytes(&self.file)
    }

    /// The file's bytes, to be kept beside a checkpoint.
    pub fn file(&self) -> &[u8] {
        &self.file
    }

    /// Number of ids a model needs rows for: the highest id and one.
    pub fn vocabulary(&self) -> u32 {
        self.vocabulary
    }

    /// Token ids of a text, without special tokens, even where it spells one: as `sluiced ingest` makes documents.
    pub fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let encoding =
            self.tokenizer.encode_fast(text, false).map_err(|error| anyhow!("cannot tokenize: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text that each token adds. A character that several tokens make up stands with the last of them, and
    /// the others are empty.
    pub fn pieces(&self, tokens: &[u32]) -> Vec<String> {
        let mut stream = self.tokenizer.decode_stream(false);
        let piece = |&token| match stream.step(token) {
            Ok(piece) => piece.unwrap_or_default(),
            // A decoder that rewrites what it has already said cannot be followed; the token's own name will do.
            Err(_) => self.tokenizer.id_to_token(token).unwrap_or_default(),
        };
        tokens.iter().map(piece).collect()
    }
}
