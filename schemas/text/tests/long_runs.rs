//! Runs of a million characters, which a regular expression with a limit on what it tries back gives up on.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use sluice_text::{TOKENS_MAX, TextTokenizer};

#[test]
fn what_follows_a_long_run_is_tokenized_as_it_is_alone() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny-llama/tokenizer.json");
    let tokenizer = TextTokenizer::read(&path).unwrap();
    let encode = |text: &str| tokenizer.encode(text, TOKENS_MAX).unwrap();
    for run in [" ", "a", "-", "\n", "é", "字"] {
        // Digits are tokens of their own in this tokenizer, so that nothing before them joins what follows.
        let after = encode("1 the river runs to the sea. The number is 42.");
        let whole =
            encode(&format!("{}1 the river runs to the sea. The number is 42.", run.repeat(1_200_000)));
        assert_eq!(whole[whole.len() - after.len()..], after, "after {run:?}");
        assert_eq!(
            whole[..whole.len() - after.len()],
            encode(&run.repeat(1_200_000)),
            "the run of {run:?} itself"
        );
    }
}
