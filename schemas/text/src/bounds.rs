//! Tokens that stand around every text.

use crate::TextTokenizer;

/// What every document begins and ends with, such as a BOS and an EOS, where a model was trained on texts with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Id of the token before the text.
    pub begin: Option<u32>,
    /// Id of the token after it.
    pub end: Option<u32>,
}

/// A name that stands for no token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tokenizer knows no token {name:?}: give {flag} one as its tokenizer.json spells it")]
pub struct UnknownToken {
    /// What it was given to.
    flag: &'static str,
    /// The name.
    name: String,
}

impl Bounds {
    /// The tokens that `--begin-with` and `--end-with` name, as the tokenizer's file spells them.
    pub fn named(
        tokenizer: &TextTokenizer,
        begin_with: Option<&str>,
        end_with: Option<&str>,
    ) -> Result<Self, UnknownToken> {
        let token = |flag, name: Option<&str>| {
            let id =
                |name: &str| tokenizer.token_id(name).ok_or(UnknownToken { flag, name: name.to_owned() });
            name.map(id).transpose()
        };
        Ok(Self { begin: token("--begin-with", begin_with)?, end: token("--end-with", end_with)? })
    }

    /// The tokens of a text between them. A text without tokens stays one, to be refused as such.
    pub fn around(self, tokens: Vec<u32>) -> Vec<u32> {
        if tokens.is_empty() {
            return tokens;
        }
        self.begin.into_iter().chain(tokens).chain(self.end).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Bounds;

    #[test]
    fn a_document_stands_between_its_bounds_and_an_empty_one_stays_empty() {
        let bounds = Bounds { begin: Some(1), end: Some(2) };
        assert_eq!(bounds.around(vec![7, 8]), [1, 7, 8, 2]);
        assert!(bounds.around(vec![]).is_empty());
        assert_eq!(Bounds::default().around(vec![7]), [7]);
    }
}
