//! A Hugging Face tokenizer: text to the token ids of a record, and back to pieces of text for people.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;

use rayon::iter::{IntoParallelRefIterator as _, ParallelIterator as _};
use sluice_schemas::fingerprint::Fingerprint;
use tokenizers::Tokenizer;

use crate::{json, refuse_pointer};

/// Most tokens of one document, where nothing else bounds them.
pub const TOKENS_MAX: usize = 4 << 20;
/// Bytes that are tokenized at a time where a text may have too many tokens. Tokenizing takes up to 300 times the bytes
/// that it is given.
const PART_BYTES: usize = 64 << 10;
/// Tokens by which a part may differ from the same bytes within the whole text: those of the word that it was cut in.
const PART_TOKENS_MORE: usize = 64;

/// A `tokenizer.json` that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// It cannot be read.
    #[error("cannot read the tokenizer {path}: {error}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why. Not its `source`, which whoever shows the whole chain would show twice.
        error: std::io::Error,
    },
    /// It is none.
    #[error("{path} is no tokenizer.json: {why}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// A text that has no token ids.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// It has more tokens than it may have.
    #[error("the text has more than {most} tokens, the most that one document may have here")]
    TooMany {
        /// How many it may have.
        most: usize,
    },
    /// The tokenizer does not take it.
    #[error("the tokenizer fails on this text: {0}")]
    Failed(String),
}

/// A Hugging Face tokenizer and the file it came from.
///
/// It gives the document's own tokens: neither cut nor padded, without special tokens, and text that spells one is text.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    file: Vec<u8>,
    vocabulary: u32,
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`.
    pub fn read(path: &Path) -> Result<Self, TokenizerError> {
        let file = std::fs::read(path)
            .map_err(|error| TokenizerError::Unreadable { path: path.to_owned(), error })?;
        refuse_pointer(path, &file)
            .map_err(|why| TokenizerError::Invalid { path: path.to_owned(), why: why.to_string() })?;
        Self::new(file).map_err(|why| TokenizerError::Invalid { path: path.to_owned(), why })
    }

    fn new(file: Vec<u8>) -> Result<Self, String> {
        let mut tokenizer: Tokenizer = json::from_slice(&file).map_err(|error| error.to_string())?;
        // A tokenizer that cuts or pads by itself would lose tokens or add some.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        // "<|endoftext|>" in a text is a text about tokenizers, not the end of one.
        tokenizer.set_encode_special_tokens(true);
        let highest = tokenizer.get_vocab(true).values().copied().max().ok_or("it knows no token")?;
        let vocabulary = highest.checked_add(1).ok_or("its highest token id is no id: number them from 0")?;
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

    /// Token ids of a text, of which there may be at most `most`. A text of more costs no more memory than one of `most`.
    pub fn encode(&self, text: &str, most: usize) -> Result<Vec<u32>, EncodeError> {
        if text.len() > most && self.has_more(text, most)? {
            return Err(EncodeError::TooMany { most });
        }
        let ids = self.ids(text)?;
        if ids.len() > most { Err(EncodeError::TooMany { most }) } else { Ok(ids) }
    }

    /// The same for several texts, over all cores.
    pub fn encode_all<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        most: usize,
    ) -> Vec<Result<Vec<u32>, EncodeError>> {
        texts.par_iter().map(|text| self.encode(text.as_ref(), most)).collect()
    }

    /// Id of a token by its own name, such as `<|endoftext|>`; special ones, which no text spells, are among them.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.tokenizer.token_to_id(name)
    }

    /// The tokens' own names.
    pub fn names(&self, tokens: &[u32]) -> Vec<String> {
        tokens.iter().map(|&token| self.tokenizer.id_to_token(token).unwrap_or_default()).collect()
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

    /// Whether `text` has more tokens than `most` wherever it is cut, as far as that shows part by part.
    fn has_more(&self, text: &str, most: usize) -> Result<bool, EncodeError> {
        let (mut rest, mut tokens) = (text, 0);
        while !rest.is_empty() {
            let end = rest.floor_char_boundary(PART_BYTES);
            // Between words, so that few tokens differ.
            let end = rest[..end].rfind(' ').filter(|&space| space > 0).unwrap_or(end);
            let (part, after) = rest.split_at(end);
            rest = after;
            tokens += self.ids(part)?.len().saturating_sub(PART_TOKENS_MORE);
            if tokens > most {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn ids(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        // A regular expression that tries too much panics in the library, on a thread that has work of others to do.
        match quietly(|| self.tokenizer.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec()))
        {
            Ok(Ok(ids)) => Ok(ids),
            Ok(Err(error)) => Err(EncodeError::Failed(error.to_string())),
            Err(panicked) => Err(EncodeError::Failed(panicked)),
        }
    }
}

thread_local! {
    /// Whether a panic of this thread is caught and told as an error.
    static IS_QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs what may panic on bad input; a panic becomes an error, and nothing is printed.
fn quietly<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !IS_QUIET.get() {
                hook(panic);
            }
        }));
    });
    IS_QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    IS_QUIET.set(false);
    result.map_err(|payload| {
        let said = payload.downcast_ref::<String>().map(String::as_str);
        said.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it gave up").to_owned()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A tokenizer with a token for each of three letters, whose words are what `pattern` finds.
    fn tokenizer(pattern: &str) -> TextTokenizer {
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false
            },
            "post_processor": null, "decoder": null,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "vocab": {"a": 0, "b": 1, " ": 2}, "merges": []
            }
        });
        TextTokenizer::new(json.to_string().into_bytes()).unwrap()
    }

    #[test]
    fn a_text_of_more_tokens_than_it_may_have_is_refused() {
        let tokenizer = tokenizer("a+| ");
        assert_eq!(tokenizer.encode("aab", 3).unwrap(), [0, 0, 1]);
        assert!(matches!(tokenizer.encode("aab", 2), Err(EncodeError::TooMany { most: 2 })));
        let long = "ab ".repeat(500_000);
        assert!(matches!(tokenizer.encode(&long, 1_400_000), Err(EncodeError::TooMany { .. })));
        assert_eq!(tokenizer.encode(&long, 1_500_000).unwrap().len(), 1_500_000);
        // Letters that the tokenizer has no token for: many bytes, few tokens.
        assert_eq!(tokenizer.encode(&"é ".repeat(100_000), 100_000).unwrap().len(), 100_000);
    }

    #[test]
    fn a_pattern_that_tries_too_much_is_an_error_and_no_panic() {
        let tokenizer = tokenizer("(a+)+!");
        let error = tokenizer.encode(&"a".repeat(40), 1000).unwrap_err();
        assert!(matches!(&error, EncodeError::Failed(why) if why.contains("retry-limit")), "{error}");
        assert_eq!(tokenizer.encode("ab", 10).unwrap(), [0, 1], "it goes on");
    }

    #[test]
    fn patterns_are_those_of_hugging_face() {
        assert_eq!(tokenizer("\\R|\\p{N}{1,3}|\\h").encode("a b", 10).unwrap(), [0, 2, 1]);
    }

    #[test]
    fn a_file_that_is_none_is_named() {
        let missing = TextTokenizer::read(Path::new("/no/tokenizer.json"));
        assert!(matches!(missing, Err(TokenizerError::Unreadable { .. })));
        assert!(TextTokenizer::new(b"{garbage".to_vec()).is_err());
    }
}
