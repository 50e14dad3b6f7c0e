//! Fingerprints: SHA-256 digests that say which tokenizer and which model made a record.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

/// A SHA-256 digest; shown as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; Self::LEN]);

impl Fingerprint {
    /// Length in bytes.
    pub const LEN: usize = 32;

    /// Digest of `bytes`. A tokenizer's fingerprint is that of its whole `tokenizer.json`.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Digest of named parts, in the order of their names: for each part its name's length (u64, little-endian),
    /// its name, and the 32 bytes of its own digest.
    ///
    /// A model's fingerprint has one part for each file: the ONNX graph and every external data file, under the
    /// names by which the graph refers to them (the graph itself under `model.onnx`, whatever its file is called).
    pub fn of_parts(parts: &mut [(String, Self)]) -> Self {
        parts.sort();
        let mut hasher = Sha256::new();
        for (name, digest) in parts {
            hasher.update((name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(digest.0);
        }
        Self(hasher.finalize().into())
    }

    /// The digest that `bytes` holds, or nothing where it is not 32 bytes long.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The digest's bytes.
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// The first eight hexadecimal digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl From<[u8; Fingerprint::LEN]> for Fingerprint {
    fn from(digest: [u8; Self::LEN]) -> Self {
        Self(digest)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// A text that is not a fingerprint.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a fingerprint is 64 hexadecimal digits, not {0:?}")]
pub struct ParseFingerprintError(String);

impl FromStr for Fingerprint {
    type Err = ParseFingerprintError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseFingerprintError(text.to_owned());
        if text.len() != 2 * Self::LEN || !text.is_ascii() {
            return Err(error());
        }
        let mut digest = [0; Self::LEN];
        for (byte, start) in digest.iter_mut().zip((0..text.len()).step_by(2)) {
            *byte = u8::from_str_radix(&text[start..start + 2], 16).map_err(|_| error())?;
        }
        Ok(Self(digest))
    }
}

impl serde::Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_as_sha256sum_does() {
        // printf abc | sha256sum
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Fingerprint::of_bytes(b"abc").to_string(), expected);
        assert_eq!(expected.parse(), Ok(Fingerprint::of_bytes(b"abc")));
    }

    #[test]
    fn refuses_what_is_no_digest() {
        for text in ["", "abc", &"g".repeat(64), &"é".repeat(32)] {
            assert!(text.parse::<Fingerprint>().is_err(), "{text:?}");
        }
        assert_eq!(Fingerprint::from_slice(&[0; 31]), None);
    }

    #[test]
    fn parts_are_told_apart_by_name_and_not_by_order() {
        let part = |name: &str, bytes: &[u8]| (name.to_owned(), Fingerprint::of_bytes(bytes));
        let both = Fingerprint::of_parts(&mut [part("a", b"1"), part("b", b"2")]);
        assert_eq!(both, Fingerprint::of_parts(&mut [part("b", b"2"), part("a", b"1")]));
        assert_ne!(both, Fingerprint::of_parts(&mut [part("a", b"2"), part("b", b"1")]));
    }
}
