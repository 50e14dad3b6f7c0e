//! Files to texts: JSON Lines or plain, compressed or not, one document at a time.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context as _, bail};
use indicatif::ProgressBar;
use serde_json::{Map, Value};

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// JSON Lines where the name says so (.jsonl, .ndjson, .json, compressed or not) and on standard input, else text.
    Auto,
    /// A JSON object on every line.
    Jsonl,
    /// One document a file.
    Text,
}

/// Names of the fields in JSON Lines.
#[derive(Clone, Debug)]
pub struct Fields {
    /// The text.
    pub text: String,
    /// The document's id; where it is missing, file name and line number make one.
    pub id: String,
    /// Where the document comes from.
    pub source: String,
}

/// A document before tokenization.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Stable over re-runs of the same files.
    pub id: String,
    /// The text.
    pub text: String,
    /// Its source, where the document names one.
    pub source: Option<String>,
}

/// The documents of `file` (`-` is standard input), each with an error of its own where it is bad.
pub fn open(
    file: &Path,
    format: Format,
    fields: &Fields,
    progress: &ProgressBar,
) -> anyhow::Result<Box<dyn Iterator<Item = anyhow::Result<Text>>>> {
    let standard_input = file.as_os_str() == "-";
    let raw: Box<dyn Read> =
        if standard_input { Box::new(std::io::stdin()) } else { Box::new(File::open(file)?) };
    let mut reader = decompress(progress.wrap_read(raw))?;
    // The path as it was given: files of the same name in two folders must not share ids.
    let name = if standard_input { "stdin".to_owned() } else { file.to_string_lossy().into_owned() };
    if is_jsonl(format, standard_input, &name) {
        return Ok(Box::new(JsonLines { reader, name, fields: fields.clone(), line: 0, failed: false }));
    }
    let mut text = String::new();
    let document = reader
        .read_to_string(&mut text)
        .map(|_| Text { id: name.clone(), text, source: None })
        .with_context(|| format!("cannot read {name} as text"));
    Ok(Box::new(std::iter::once(document)))
}

fn is_jsonl(format: Format, standard_input: bool, name: &str) -> bool {
    match format {
        Format::Jsonl => true,
        Format::Text => false,
        Format::Auto => {
            let bare = name.trim_end_matches(".gz").trim_end_matches(".zst");
            standard_input || [".jsonl", ".ndjson", ".json"].iter().any(|ending| bare.ends_with(ending))
        }
    }
}

/// Takes off gzip or zstd, told by the first bytes and not by the name.
fn decompress(raw: impl Read + 'static) -> anyhow::Result<Box<dyn BufRead>> {
    let mut reader = BufReader::with_capacity(1 << 16, raw);
    let start = reader.fill_buf()?;
    if start.starts_with(&GZIP_MAGIC) {
        Ok(Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(reader))))
    } else if start.starts_with(&ZSTD_MAGIC) {
        Ok(Box::new(BufReader::new(zstd::Decoder::with_buffer(reader)?)))
    } else {
        Ok(Box::new(reader))
    }
}

struct JsonLines {
    reader: Box<dyn BufRead>,
    name: String,
    fields: Fields,
    line: u64,
    failed: bool,
}

impl Iterator for JsonLines {
    type Item = anyhow::Result<Text>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut bytes = Vec::new();
        while !self.failed {
            self.line += 1;
            bytes.clear();
            match self.reader.read_until(b'\n', &mut bytes) {
                Ok(0) => return None,
                Ok(_) if bytes.trim_ascii().is_empty() => {}
                Ok(_) => {
                    return Some(self.parse(&bytes).with_context(|| format!("{}:{}", self.name, self.line)));
                }
                Err(error) => {
                    // A file that is cut short gives the same error for ever.
                    self.failed = true;
                    return Some(Err(error).with_context(|| format!("{}:{}", self.name, self.line)));
                }
            }
        }
        None
    }
}

impl JsonLines {
    fn parse(&self, line: &[u8]) -> anyhow::Result<Text> {
        let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
        let mut object: Map<String, Value> = serde_json::from_slice(line).context("not a JSON object")?;
        let Some(Value::String(text)) = object.remove(&self.fields.text) else {
            bail!("no text in the field `{}`; --text-field names another", self.fields.text);
        };
        let id = match object.remove(&self.fields.id) {
            Some(Value::String(id)) if !id.is_empty() => id,
            Some(Value::Number(number)) => number.to_string(),
            _ => format!("{}:{}", self.name, self.line),
        };
        let source = object.get(&self.fields.source).and_then(Value::as_str).map(str::to_owned);
        Ok(Text { id, text, source })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn fields() -> Fields {
        Fields { text: "text".to_owned(), id: "id".to_owned(), source: "source".to_owned() }
    }

    fn read(name: &str, content: &[u8]) -> Vec<Result<Text, String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let documents = open(&path, Format::Auto, &fields(), &ProgressBar::hidden()).unwrap();
        let path = path.to_str().unwrap();
        documents
            .map(|document| {
                let document = document.map(|text| Text { id: text.id.replace(path, "FILE"), ..text });
                document.map_err(|error| format!("{error:#}").replace(path, "FILE"))
            })
            .collect()
    }

    const LINES: &str =
        "{\"id\":\"a\",\"text\":\"one\",\"source\":\"web\"}\n\n{\"text\":\"two\"}\n{\"id\":7,\"text\":\"\"}";

    fn expected() -> Vec<Result<Text, String>> {
        let text = |id: &str, text: &str, source: Option<&str>| {
            Ok(Text { id: id.to_owned(), text: text.to_owned(), source: source.map(str::to_owned) })
        };
        vec![text("a", "one", Some("web")), text("FILE:3", "two", None), text("7", "", None)]
    }

    #[test]
    fn json_lines_plain_gzip_and_zstd_give_the_same() {
        assert_eq!(read("x.jsonl", LINES.as_bytes()), expected());
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(LINES.as_bytes()).unwrap();
        assert_eq!(read("x.jsonl", &gzip.finish().unwrap()), expected());
        assert_eq!(read("x.jsonl", &zstd::encode_all(LINES.as_bytes(), 1).unwrap()), expected());
    }

    #[test]
    fn a_bad_line_is_named_and_the_next_is_read() {
        let read =
            read("x.jsonl", b"{\"text\":\"good\"}\nnot json\n[1]\n{\"text\":5}\n\xff\n{\"text\":\"end\"}\n");
        assert_eq!(read.len(), 6);
        assert!(read[1].as_ref().unwrap_err().starts_with("FILE:2: not a JSON object"), "{read:?}");
        assert!(read[3].as_ref().unwrap_err().contains("FILE:4: no text in the field `text`"), "{read:?}");
        assert!(read[2].is_err() && read[4].is_err() && read[5].is_ok());
    }

    #[test]
    fn a_compressed_file_that_is_cut_short_ends_with_an_error() {
        let whole = zstd::encode_all(LINES.repeat(1000).as_bytes(), 1).unwrap();
        let read = read("x.jsonl", &whole[..whole.len() / 2]);
        assert!(read.last().unwrap().is_err());
    }

    #[test]
    fn a_byte_order_mark_is_passed_over() {
        assert!(read("x.jsonl", b"\xef\xbb\xbf{\"text\":\"marked\"}").remove(0).is_ok());
    }

    #[test]
    fn a_plain_file_is_one_document() {
        let text = Text { id: "FILE".to_owned(), text: "one\ntwo\n".to_owned(), source: None };
        assert_eq!(read("x.txt", b"one\ntwo\n"), [Ok(text)]);
        assert!(read("x.txt", b"\xff")[0].is_err());
    }
}
