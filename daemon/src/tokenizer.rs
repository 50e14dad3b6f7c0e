//! `sluiced tokenizer train`: a byte-level BPE of a given size, digits one by one.

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use sluice_text::{Documents, Fields, Format, TEXT_BYTES_MAX, TextReader};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

use crate::exit::{DATA, ExitCode as _, NO_INPUT};

/// Separates documents, for those who want to.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The texts of several files, one after the other; what is bad is named, counted and passed over.
struct Texts<'a> {
    files: std::slice::Iter<'a, PathBuf>,
    reader: TextReader,
    open: Option<Documents>,
    counts: &'a mut Counts,
}

/// What became of the files.
#[derive(Default)]
struct Counts {
    documents: u64,
    bad: u64,
    /// Why a file could not be opened, after which nothing more is read.
    failure: Option<anyhow::Error>,
}

impl Iterator for Texts<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            match self.open.as_mut().and_then(Iterator::next) {
                Some(Ok(document)) => {
                    self.counts.documents += 1;
                    return Some(document.text);
                }
                Some(Err(error)) => {
                    self.counts.bad += 1;
                    tracing::warn!("passing over a bad document: {error:#}");
                }
                None => {
                    let file = self.files.next().filter(|_| self.counts.failure.is_none())?;
                    match self.reader.open(file, |raw| raw) {
                        Ok(documents) => self.open = Some(documents),
                        Err(error) => {
                            self.open = None;
                            let error = error.context(format!("cannot read {}", file.display()));
                            self.counts.failure = Some(error);
                            return None;
                        }
                    }
                }
            }
        }
    }
}

/// Trains on the texts of `files` and writes `out`. Bad documents are passed over, counted, and make the exit code 65.
pub fn train(files: &[PathBuf], fields: &Fields, vocabulary: usize, out: &Path) -> anyhow::Result<()> {
    let reader = TextReader { format: Format::Auto, fields: fields.clone(), text_bytes_max: TEXT_BYTES_MAX };
    let mut counts = Counts::default();
    let texts = Texts { files: files.iter(), reader, open: None, counts: &mut counts };
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
    tokenizer.train(&mut trainer, texts).map_err(|error| anyhow!("cannot train the tokenizer: {error}"))?;
    if let Some(failure) = counts.failure {
        return Err(failure).exit_code(NO_INPUT);
    }
    if counts.documents == 0 {
        return Err(anyhow!("there is no document to train a tokenizer on; nothing was written"))
            .exit_code(DATA);
    }
    tokenizer
        .save(out, false)
        .map_err(|error| anyhow!("cannot write the tokenizer {}: {error}", out.display()))?;
    tracing::info!(
        documents = counts.documents,
        bad = counts.bad,
        vocabulary = tokenizer.get_vocab_size(true),
        "trained a tokenizer"
    );
    if counts.bad > 0 {
        return Err(anyhow!("{} documents were bad and passed over; see the warnings above", counts.bad))
            .exit_code(DATA);
    }
    Ok(())
}
