//! `sluiced tokenizer train`: a byte-level BPE of a given size, digits one by one.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use indicatif::ProgressBar;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use crate::exit::{ExitCode as _, NO_INPUT};
use crate::ingest::{Fields, Format, open};

/// Separates documents, for those who want to.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Trains on the texts of `files` and writes `out`.
pub fn train(files: &[PathBuf], fields: &Fields, vocabulary: usize, out: &Path) -> anyhow::Result<()> {
    let mut texts = Vec::new();
    for file in files {
        let documents = open(file, Format::Auto, fields, &ProgressBar::hidden())
            .with_context(|| format!("cannot read {}", file.display()))
            .exit_code(NO_INPUT)?;
        for document in documents {
            texts.push(document.with_context(|| file.display().to_string())?.text);
        }
    }
    // Byte-level marks of word boundaries and bytes for whatever is not in the vocabulary, as GPT-2; single digits,
    // so that numbers are spelt alike wherever they stand.
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(vec![
        PreTokenizerWrapper::Digits(Digits::new(true)),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
    ]))));
    tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::default())));
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(vocabulary)
        .min_frequency(2)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build()
        .into();
    tokenizer
        .train(&mut trainer, texts.iter())
        .map_err(|error| anyhow!("cannot train the tokenizer: {error}"))?;
    tokenizer
        .save(out, false)
        .map_err(|error| anyhow!("cannot write the tokenizer {}: {error}", out.display()))?;
    tracing::info!(
        documents = texts.len(),
        vocabulary = tokenizer.get_vocab_size(true),
        "trained a tokenizer"
    );
    Ok(())
}
