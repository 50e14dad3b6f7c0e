//! JSON as other programs write it. Python's `json` writes `NaN` and `Infinity`, which are no JSON, and some editors a
//! byte order mark.

use std::borrow::Cow;

use serde::de::DeserializeOwned;

/// U+FEFF in UTF-8.
pub(crate) const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The text less the byte order mark that may stand before it.
pub(crate) fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Reads a value. A number that is not finite is passed over where nobody asks for it, and is text where somebody does,
/// so that it is refused by its name and never taken for "not set".
pub fn from_slice<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    let json = without_mark(json);
    serde_json::from_slice(json).or_else(|error| match finite(json, Instead::Text) {
        Cow::Borrowed(_) => Err(error),
        Cow::Owned(json) => serde_json::from_slice(&json),
    })
}

/// What stands in the place of a number that is not finite.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Instead {
    /// Its name as a string.
    Text,
    /// Null: the absence of a value.
    Null,
}

/// The same JSON without the words for numbers that are not finite; borrowed where there are none.
pub(crate) fn finite(json: &[u8], instead: Instead) -> Cow<'_, [u8]> {
    const WORDS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
    let mut written = Vec::new();
    let (mut copied, mut at, mut in_string) = (0, 0, false);
    while let Some(&byte) = json.get(at) {
        match byte {
            b'"' => in_string = !in_string,
            // Whatever is escaped ends no string.
            b'\\' if in_string => at += 1,
            b'N' | b'I' | b'-' if !in_string => {
                if let Some(word) = WORDS.iter().find(|word| json[at..].starts_with(word)) {
                    written.extend_from_slice(&json[copied..at]);
                    match instead {
                        Instead::Text => written.extend([b"\"", *word, b"\""].concat()),
                        Instead::Null => written.extend_from_slice(b"null"),
                    }
                    at += word.len();
                    copied = at;
                    continue;
                }
            }
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return Cow::Borrowed(json);
    }
    written.extend_from_slice(&json[copied..]);
    Cow::Owned(written)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Asked {
        wanted: Option<f64>,
    }

    #[test]
    fn numbers_that_are_not_finite_are_passed_over_where_nobody_asks() {
        let json = br#"{"limits": [0.0, Infinity, -Infinity], "wanted": 1.5, "NaN": "a\"NaN", "x": NaN}"#;
        assert_eq!(from_slice::<Asked>(json).unwrap().wanted, Some(1.5));
        let all: Value = from_slice(json).unwrap();
        let expected =
            json!({"limits": [0.0, "Infinity", "-Infinity"], "wanted": 1.5, "NaN": "a\"NaN", "x": "NaN"});
        assert_eq!(all, expected, "what stands in strings stays");
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused_where_somebody_asks() {
        let error = from_slice::<Asked>(br#"{"wanted": -Infinity}"#).unwrap_err().to_string();
        assert!(error.contains("\"-Infinity\"") && error.contains("f64"), "{error}");
    }

    #[test]
    fn a_byte_order_mark_is_passed_over() {
        assert_eq!(from_slice::<Asked>("\u{feff}{\"wanted\":2}".as_bytes()).unwrap().wanted, Some(2.0));
    }

    #[test]
    fn what_is_no_json_stays_an_error_that_shows_where() {
        for json in ["{\"wanted\": nan}", "{\"wanted\": NaNs}", "{", "\"\\", "Infinit", "-"] {
            assert!(from_slice::<BTreeMap<String, Value>>(json.as_bytes()).is_err(), "{json}");
        }
        let error = from_slice::<Asked>(b"{\"wanted\":\n !}").unwrap_err();
        assert_eq!((error.line(), error.column()), (2, 2));
    }
}
