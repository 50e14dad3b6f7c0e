//! gzip and zstd, as their tools write and read them: told by the first bytes and never by a name.

use std::io::{self, BufRead, BufReader, Cursor, Read};

use anyhow::bail;
use flate2::bufread::GzDecoder;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The last three bytes of a skippable frame's magic number; the first is 0x50 to 0x5f. `pzstd` begins with one.
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];
/// The widest window there is, as of `zstd --long=31`: 2 GiB, of which no more is touched than is unpacked.
const ZSTD_WINDOW_LOG_MAX: u32 = 31;
/// Bytes that tell every format below.
const MAGIC_BYTES: usize = 8;
/// Other formats by their first bytes, and what makes text of them.
const FOREIGN: [(&[u8], &str); 9] = [
    (b"\xfd7zXZ\0", "an xz file; unpack it: `xz -dc FILE | ... -`"),
    (b"\x04\x22\x4d\x18", "an lz4 file; unpack it: `lz4 -dc FILE | ... -`"),
    (b"PK\x03\x04", "a zip archive; unpack it: `unzip -p FILE | ... -`"),
    (b"PAR1\x15", "a Parquet file; write its rows as JSON Lines first"),
    (b"ARROW1\0\0", "an Arrow file; write its rows as JSON Lines first"),
    // Before UTF-16, whose mark this begins with.
    (b"\xff\xfe\0\0", "UTF-32; make it UTF-8: `iconv -f UTF-32 -t UTF-8 FILE | ... -`"),
    (b"\0\0\xfe\xff", "UTF-32; make it UTF-8: `iconv -f UTF-32 -t UTF-8 FILE | ... -`"),
    (b"\xff\xfe", "UTF-16; make it UTF-8: `iconv -f UTF-16 -t UTF-8 FILE | ... -`"),
    (b"\xfe\xff", "UTF-16; make it UTF-8: `iconv -f UTF-16 -t UTF-8 FILE | ... -`"),
];

/// A stream of bytes that another thread may read.
pub type Bytes = Box<dyn BufRead + Send>;

/// Takes off gzip or zstd where the bytes are so packed; an error where they are packed otherwise.
pub fn decompress(mut raw: Box<dyn Read + Send>) -> anyhow::Result<Bytes> {
    let start = head(&mut raw, |start| start.len() >= MAGIC_BYTES)?;
    if let Some((_, what)) = FOREIGN.iter().find(|(magic, _)| start.starts_with(magic)) {
        bail!("this is {what}");
    }
    if start.starts_with(b"BZh") && start.get(4..8) == Some(b"1AY&") {
        bail!("this is a bzip2 file; unpack it: `bzip2 -dc FILE | ... -`");
    }
    let is = |magic: &[u8]| start.starts_with(magic);
    let is_skippable = start.len() >= 4 && start[0] & 0xf0 == 0x50 && start[1..4] == ZSTD_SKIPPABLE;
    let (is_gzip, is_zstd) = (is(&GZIP), is(&ZSTD) || is_skippable);
    let whole = BufReader::with_capacity(1 << 16, Cursor::new(start).chain(raw));
    if is_gzip {
        Ok(Box::new(BufReader::with_capacity(1 << 16, Members(Some(GzDecoder::new(whole))))))
    } else if is_zstd {
        // Several frames and skippable ones are read on the way.
        let mut decoder = zstd::Decoder::with_buffer(whole)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        Ok(Box::new(BufReader::with_capacity(1 << 16, decoder)))
    } else {
        Ok(Box::new(whole))
    }
}

/// The first bytes of `reader`, read until they are `enough` or there are no more. A pipe may give them one by one.
pub fn head(reader: &mut impl Read, enough: impl Fn(&[u8]) -> bool) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut part = [0; 4096];
    while !enough(&head) {
        match reader.read(&mut part) {
            Ok(0) => break,
            Ok(read) => head.extend_from_slice(&part[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(head)
}

/// The members of a gzip file, one after the other, with the zeros after the last that a tape or a block device leaves,
/// which `gzip` passes over too.
struct Members<R>(Option<GzDecoder<R>>);

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.0 {
            let read = member.read(into)?;
            if read > 0 || into.is_empty() {
                return Ok(read);
            }
            let mut rest = self.0.take().map(GzDecoder::into_inner);
            if let Some(next) = rest.as_mut().map(next_member).transpose()?.flatten()
                && next == GZIP[0]
            {
                self.0 = rest.map(GzDecoder::new);
            } else if let Some(rest) = &mut rest
                && !rest.fill_buf()?.is_empty()
            {
                return Err(io::Error::other("what follows the gzip data is no gzip data"));
            }
        }
        Ok(0)
    }
}

/// Passes over zeros; the byte that follows them, where there is one.
fn next_member(reader: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        let available = reader.fill_buf()?;
        let zeros = available.iter().take_while(|&&byte| byte == 0).count();
        match available.get(zeros) {
            Some(&byte) => {
                reader.consume(zeros);
                return Ok(Some(byte));
            }
            None if zeros == 0 => return Ok(None),
            None => reader.consume(zeros),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Gives one byte at a time, as a slow pipe may.
    struct OneByOne(Cursor<Vec<u8>>);

    impl Read for OneByOne {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let most = into.len().min(1);
            self.0.read(&mut into[..most])
        }
    }

    fn unpack(packed: &[u8]) -> anyhow::Result<String> {
        let mut text = String::new();
        decompress(Box::new(OneByOne(Cursor::new(packed.to_vec()))))?.read_to_string(&mut text)?;
        Ok(text)
    }

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(text: &str) -> Vec<u8> {
        zstd::encode_all(text.as_bytes(), 1).unwrap()
    }

    #[test]
    fn every_member_and_frame_is_read() {
        assert_eq!(unpack(b"plain").unwrap(), "plain");
        assert_eq!(unpack(&[gzip("one "), gzip(""), gzip("two")].concat()).unwrap(), "one two");
        assert_eq!(unpack(&[gzip("one"), vec![0; 100_000]].concat()).unwrap(), "one");
        assert_eq!(unpack(&[zstd("one "), zstd("two")].concat()).unwrap(), "one two");
        let skippable = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let parts = [skippable.clone(), zstd("one "), skippable.clone(), zstd("two"), skippable];
        assert_eq!(unpack(&parts.concat()).unwrap(), "one two");
    }

    #[test]
    fn what_is_cut_short_or_followed_by_other_bytes_is_an_error() {
        for whole in [gzip(&"text ".repeat(1000)), zstd(&"text ".repeat(1000))] {
            assert!(unpack(&whole[..whole.len() - 3]).is_err());
            assert!(unpack(&[&whole[..], b"more"].concat()).is_err());
        }
    }

    #[test]
    fn a_window_of_two_gibibytes_is_read() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(31).unwrap();
        encoder.long_distance_matching(true).unwrap();
        encoder.write_all(b"text").unwrap();
        assert_eq!(unpack(&encoder.finish().unwrap()).unwrap(), "text");
    }

    #[test]
    fn other_formats_are_named_with_what_to_do() {
        let error = unpack(b"\xfd7zXZ\0\0\x04rest").unwrap_err().to_string();
        assert!(error.contains("xz -dc"), "{error}");
        assert!(unpack(b"\xff\xfet\0").unwrap_err().to_string().contains("iconv -f UTF-16"));
        assert!(unpack(b"\xff\xfe\0\0t\0\0\0").unwrap_err().to_string().contains("iconv -f UTF-32"));
        assert!(unpack(b"\0\0\xfe\xff\0\0\0t").unwrap_err().to_string().contains("iconv -f UTF-32"));
        assert_eq!(unpack(b"BZ").unwrap(), "BZ");
    }
}
