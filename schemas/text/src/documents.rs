//! Files to texts: JSON Lines or plain, compressed or not, one document at a time.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::compression::{self, Bytes};
use crate::json::{BYTE_ORDER_MARK, Instead, finite, without_mark};
use crate::lines::{Line, read_line};

/// Most bytes of one document's text, where nothing else bounds it.
pub const TEXT_BYTES_MAX: usize = 16 << 20;
/// A line may have much besides its text, and escapes make the text itself longer.
const LINE_BYTES_MAX: usize = 64 << 20;
/// White space that is looked past for the first character of a file.
const BLANK_BYTES_MAX: usize = 1 << 16;

/// What has NUL bytes, and what makes text of it.
const NUL_MEANS: &str = "UTF-16 (`iconv -f UTF-16LE -t UTF-8 FILE | ... -`), an archive (`tar -xOf FILE | ... -`) or another \
                         binary file";

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// JSON Lines where the file begins with a JSON object, where its name says so (.jsonl, .ndjson, .json, compressed or
    /// not) and on standard input, else text.
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
    /// What stands before the text, where a document may have such a thing.
    pub context: Option<String>,
}

impl Default for Fields {
    fn default() -> Self {
        Self { text: "text".to_owned(), id: "id".to_owned(), source: "source".to_owned(), context: None }
    }
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
    /// What stands before it; empty where nothing does.
    pub context: String,
}

/// How files are read.
#[derive(Clone, Debug)]
pub struct TextReader {
    /// What the files are.
    pub format: Format,
    /// Names of the fields in JSON Lines.
    pub fields: Fields,
    /// Most bytes of one document's text. A longer one is an error, for which no more memory is spent than for this.
    pub text_bytes_max: usize,
}

/// The documents of one file, each with an error of its own where it is bad.
pub struct Documents {
    reader: Bytes,
    name: String,
    settings: TextReader,
    is_lines: bool,
    line: u64,
    buffer: Vec<u8>,
    ended: bool,
}

impl TextReader {
    /// Opens `file` (`-` is standard input). `through` may look at what is read of it, as a progress bar does.
    pub fn open(
        &self,
        file: &Path,
        through: impl FnOnce(Box<dyn Read + Send>) -> Box<dyn Read + Send>,
    ) -> anyhow::Result<Documents> {
        if file.as_os_str() == "-" {
            // Lines in any case, whose first need not be there yet.
            let format = if self.format == Format::Text { Format::Text } else { Format::Jsonl };
            return Self { format, ..self.clone() }.read("stdin", through(Box::new(std::io::stdin())));
        }
        // The path as it was given: files of the same name in two folders must not share ids.
        self.read(&file.to_string_lossy(), through(Box::new(File::open(file)?)))
    }

    /// The documents of what `raw` reads, under `name`.
    pub fn read(&self, name: &str, raw: Box<dyn Read + Send>) -> anyhow::Result<Documents> {
        let mut reader = compression::decompress(raw)?;
        let is_lines = match self.format {
            Format::Jsonl => true,
            Format::Text => false,
            Format::Auto if is_named_lines(name) => true,
            Format::Auto => {
                let head = compression::head(&mut reader, |head| {
                    head.len() > BLANK_BYTES_MAX || begins_with_object(head).is_some()
                })?;
                let is_lines = begins_with_object(&head) == Some(true);
                reader = Box::new(BufReader::with_capacity(1 << 16, Cursor::new(head).chain(reader)));
                is_lines
            }
        };
        let (name, settings) = (name.to_owned(), self.clone());
        Ok(Documents { reader, name, settings, is_lines, line: 0, buffer: Vec::new(), ended: false })
    }
}

/// Whether a name ends as JSON Lines do, with whatever a compressor has put behind it.
fn is_named_lines(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let file = name.rsplit('/').next().unwrap_or_default();
    file.split_once('.').is_some_and(|(_, endings)| {
        endings.rsplit('.').take(2).any(|ending| matches!(ending, "jsonl" | "ndjson" | "json"))
    })
}

/// Whether the text begins with a JSON object, or with an array of them; nothing where that is still to be seen.
fn begins_with_object(head: &[u8]) -> Option<bool> {
    let mut letters = without_mark(head).iter().filter(|byte| !byte.is_ascii_whitespace());
    let mut opening = letters.next()?;
    if *opening == b'[' {
        opening = letters.next()?;
    }
    Some(*opening == b'{' && matches!(letters.next()?, b'"' | b'}'))
}

impl Iterator for Documents {
    type Item = anyhow::Result<Text>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        if self.is_lines {
            return self.next_line();
        }
        self.ended = true;
        Some(self.whole().with_context(|| format!("cannot read {} as text", self.name)))
    }
}

impl Documents {
    /// The whole file as one document.
    fn whole(&mut self) -> anyhow::Result<Text> {
        let mut bytes = Vec::new();
        let most = self.settings.text_bytes_max;
        // One more than it may have, and its mark.
        let bound = most as u64 + BYTE_ORDER_MARK.len() as u64 + 1;
        self.reader.by_ref().take(bound).read_to_end(&mut bytes)?;
        if bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        if bytes.len() > most {
            bail!("{}", too_long(most));
        }
        if self.settings.format != Format::Text
            && let Some(at) = bytes.iter().position(|&byte| byte == 0)
        {
            bail!(
                "byte {at} is NUL, so it is no UTF-8 text: {NUL_MEANS}; `--format text` reads it all the same"
            );
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            anyhow!("it is not UTF-8 from byte {} on; `iconv` makes it so", error.utf8_error().valid_up_to())
        })?;
        Ok(Text { id: self.name.clone(), text, source: None, context: String::new() })
    }

    fn next_line(&mut self) -> Option<anyhow::Result<Text>> {
        let most = LINE_BYTES_MAX.max(self.settings.text_bytes_max.saturating_mul(2));
        let mut buffer = std::mem::take(&mut self.buffer);
        let found = loop {
            self.line += 1;
            match read_line(&mut self.reader, &mut buffer, most) {
                Ok(Line::None) => break None,
                Ok(Line::Whole) if without_mark(&buffer).trim_ascii().is_empty() => {}
                Ok(Line::Whole) => break Some(self.parse(&buffer)),
                Ok(Line::TooLong(bytes)) => {
                    break Some(Err(anyhow!("the line has {bytes} bytes, and a line may have {most}")));
                }
                Err(error) => {
                    // A file that is cut short gives the same error for ever.
                    self.ended = true;
                    break Some(Err(error.into()));
                }
            }
        };
        // What a long line took is not kept for the short ones.
        buffer.shrink_to(1 << 20);
        self.buffer = buffer;
        found.map(|document| document.with_context(|| format!("{}:{}", self.name, self.line)))
    }

    fn parse(&self, line: &[u8]) -> anyhow::Result<Text> {
        let fields = &self.settings.fields;
        let line = without_mark(line);
        let found = parse_object(line, fields).or_else(|error| match finite(line, Instead::Null) {
            Cow::Borrowed(_) => Err(error),
            Cow::Owned(line) => parse_object(&line, fields),
        });
        if found.is_err() && line.contains(&0) {
            bail!("not a JSON object: it has NUL bytes: {NUL_MEANS}");
        }
        let found = found.context("not a JSON object")?;
        let Some(Field::Text(text)) = found.text else {
            bail!("no text in the field `{}`", fields.text);
        };
        let context = match found.context {
            Some(Field::Text(context)) => context,
            Some(Field::Other) => {
                bail!("the field `{}` holds no text", fields.context.as_deref().unwrap_or_default())
            }
            Some(Field::Number(_)) | None => String::new(),
        };
        if text.len() + context.len() > self.settings.text_bytes_max {
            bail!("{}", too_long(self.settings.text_bytes_max));
        }
        let id = match found.id {
            Some(Field::Text(id)) if !id.is_empty() => id,
            Some(Field::Number(number)) => number,
            _ => format!("{}:{}", self.name, self.line),
        };
        let source = match found.source {
            Some(Field::Text(source)) => Some(source),
            _ => None,
        };
        Ok(Text { id, text, source, context })
    }
}

fn too_long(most: usize) -> String {
    format!(
        "the text has more than {most} bytes, the most that one document may have here; cut it into several"
    )
}

/// The fields that are asked for; of whatever else a line has, nothing is kept.
#[derive(Default)]
struct Found {
    text: Option<Field>,
    id: Option<Field>,
    source: Option<Field>,
    context: Option<Field>,
}

/// The value of a field.
enum Field {
    Text(String),
    Number(String),
    Other,
}

fn parse_object(line: &[u8], fields: &Fields) -> serde_json::Result<Found> {
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let found = Wanted(fields).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(found)
}

/// Picks the fields out of an object. As in Python, the last of several of one name counts.
struct Wanted<'a>(&'a Fields);

impl<'de> DeserializeSeed<'de> for Wanted<'_> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Wanted<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let mut found = Found::default();
        while let Some(key) = map.next_key::<String>()? {
            let Self(fields) = self;
            if key == fields.text {
                found.text = map.next_value()?;
            } else if key == fields.id {
                found.id = map.next_value()?;
            } else if key == fields.source {
                found.source = map.next_value()?;
            } else if fields.context.as_deref() == Some(key.as_str()) {
                found.context = map.next_value()?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyField)
    }
}

struct AnyField;

impl<'de> Visitor<'de> for AnyField {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Field, E> {
        Ok(Field::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Field, E> {
        Ok(Field::Text(text))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Field, E> {
        Ok(Field::Number(number.to_string()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Field, E> {
        Ok(Field::Number(number.to_string()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Field, E> {
        Ok(serde_json::Number::from_f64(number).map_or(Field::Other, |n| Field::Number(n.to_string())))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Field, E> {
        Ok(Field::Other)
    }

    fn visit_unit<E>(self) -> Result<Field, E> {
        Ok(Field::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Field, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Field::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Field::Other)
    }
}
