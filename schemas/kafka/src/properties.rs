//! Properties whose values are kept in files.

use std::collections::BTreeMap;
use std::path::PathBuf;

const FROM_FILE: &str = ".from_file";

/// A property that cannot be used. No message repeats a value, which may be a secret.
#[derive(Debug, thiserror::Error)]
pub enum PropertyError {
    /// The file of a secret cannot be read.
    #[error("the property `{name}.from_file` names {path}, which cannot be read: {error}")]
    Unreadable {
        /// The property that the file is for.
        name: String,
        /// The file.
        path: PathBuf,
        /// Why. Not its `source`, which whoever shows the whole chain would show twice.
        error: std::io::Error,
    },
    /// The file of a secret has nothing in it.
    #[error("the property `{name}.from_file` names {path}, which is empty")]
    Empty {
        /// The property that the file is for.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// A value and a file for the same property.
    #[error("the properties `{0}` and `{0}.from_file` are both set; leave one out")]
    Twice(String),
}

/// Replaces every `NAME.from_file = PATH` by `NAME` with what is in the file, less the white space around it.
pub fn resolve(properties: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>, PropertyError> {
    let mut resolved = BTreeMap::new();
    for (key, value) in properties {
        let Some(name) = key.strip_suffix(FROM_FILE) else {
            resolved.insert(key.clone(), value.clone());
            continue;
        };
        if properties.contains_key(name) {
            return Err(PropertyError::Twice(name.to_owned()));
        }
        let (name, path) = (name.to_owned(), PathBuf::from(value));
        match std::fs::read_to_string(&path) {
            // Some editors put a byte order mark before what they save.
            Ok(text) if text.trim_start_matches('\u{feff}').trim().is_empty() => {
                return Err(PropertyError::Empty { name, path });
            }
            Ok(text) => resolved.insert(name, text.trim_start_matches('\u{feff}').trim().to_owned()),
            Err(error) => return Err(PropertyError::Unreadable { name, path, error }),
        };
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn a_secret_is_read_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        std::fs::write(&file, "hunter2\n").unwrap();
        let mut properties = one("sasl.password.from_file", file.to_str().unwrap());
        properties.insert("sasl.username".to_owned(), "sluice".to_owned());
        let resolved = resolve(&properties).unwrap();
        assert_eq!(resolved["sasl.password"], "hunter2");
        std::fs::write(&file, "\u{feff}hunter2\r\n").unwrap();
        assert_eq!(resolve(&properties).unwrap()["sasl.password"], "hunter2");
        assert_eq!(resolved["sasl.username"], "sluice");
        assert_eq!(resolved.len(), 2);
        properties.insert("sasl.password".to_owned(), "hunter3".to_owned());
        let refusal = resolve(&properties).unwrap_err().to_string();
        assert!(refusal.contains("both set") && !refusal.contains("hunter"), "{refusal}");
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn a_file_that_gives_no_secret_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        let path = file.to_str().unwrap();
        let missing = resolve(&one("sasl.password.from_file", path)).unwrap_err().to_string();
        assert!(missing.contains(path) && missing.contains("cannot be read"), "{missing}");
        std::fs::write(&file, " \n").unwrap();
        let empty = resolve(&one("sasl.password.from_file", path)).unwrap_err().to_string();
        assert!(empty.contains(path) && empty.contains("empty"), "{empty}");
    }
}
