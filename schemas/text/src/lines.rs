//! Lines of a bounded length.

use std::fs::File;
use std::io::{self, BufRead};
use std::path::Path;

use anyhow::bail;

use crate::compression::{self, Bytes};
use crate::json::without_mark;

/// Most bytes of a line of a file: what a record of a broker may have, as JSON.
const LINE_BYTES_MAX: usize = 64 << 20;

/// How a line ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// There is none any more.
    None,
    /// It was read whole, with the line feed that ends it.
    Whole,
    /// It was longer than it may be, and has been passed over; its length.
    TooLong(u64),
}

/// The lines of a file that hold something, compressed or not.
pub struct FileLines {
    reader: Bytes,
    line: u64,
    buffer: Vec<u8>,
}

impl FileLines {
    /// Opens a file.
    pub fn open(file: &Path) -> anyhow::Result<Self> {
        let reader = compression::decompress(Box::new(File::open(file)?))?;
        Ok(Self { reader, line: 0, buffer: Vec::new() })
    }

    /// Number of the line that was given last, counted from 1.
    pub fn line(&self) -> u64 {
        self.line
    }

    /// The next line that holds something; `None` at the end.
    pub fn next_line(&mut self) -> anyhow::Result<Option<&[u8]>> {
        loop {
            self.line += 1;
            match read_line(&mut self.reader, &mut self.buffer, LINE_BYTES_MAX)? {
                Line::None => return Ok(None),
                Line::Whole if without_mark(&self.buffer).trim_ascii().is_empty() => {}
                Line::Whole => break,
                Line::TooLong(bytes) => {
                    bail!("the line has {bytes} bytes, and a line may have {LINE_BYTES_MAX}")
                }
            }
        }
        Ok(Some(without_mark(&self.buffer)))
    }
}

/// Reads a line of at most `max` bytes into `line`; a longer one is passed over and never held.
pub fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>, max: usize) -> io::Result<Line> {
    line.clear();
    let mut read = 0_u64;
    loop {
        let available = match reader.fill_buf() {
            Ok(available) => available,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let end = available.iter().position(|&byte| byte == b'\n').map(|feed| feed + 1);
        let part = &available[..end.unwrap_or(available.len())];
        read += part.len() as u64;
        if read <= max as u64 {
            line.extend_from_slice(part);
        } else {
            // Given back at once: the rest of the file may be read with what it holds.
            *line = Vec::new();
        }
        let (used, is_end) = (part.len(), end.is_some() || part.is_empty());
        reader.consume(used);
        if is_end {
            return Ok(match read {
                0 => Line::None,
                read if read > max as u64 => Line::TooLong(read),
                _ => Line::Whole,
            });
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_passed_over_and_the_next_is_read() {
        for capacity in [1, 3, 64] {
            let text = &b"one\n123456789\n\n12345678"[..];
            let mut reader = io::BufReader::with_capacity(capacity, text);
            let mut line = Vec::new();
            let mut next = || {
                let read = read_line(&mut reader, &mut line, 8).unwrap();
                (read, String::from_utf8(line.clone()).unwrap())
            };
            assert_eq!(next(), (Line::Whole, "one\n".to_owned()));
            assert_eq!(next(), (Line::TooLong(10), String::new()));
            assert_eq!(next(), (Line::Whole, "\n".to_owned()));
            assert_eq!(next(), (Line::Whole, "12345678".to_owned()));
            assert_eq!(next(), (Line::None, String::new()));
        }
    }
}
