//! Files of text as people and their tools write them.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::path::Path;

use sluice_text::{Fields, Format, Text, TextReader};

const TEXT_BYTES_MAX: usize = 1 << 20;

fn reader(format: Format) -> TextReader {
    let fields = Fields { context: Some("context".to_owned()), ..Fields::default() };
    TextReader { format, fields, text_bytes_max: TEXT_BYTES_MAX }
}

/// The documents of a file of this name and content; its path in ids and errors is FILE.
fn read_as(format: Format, name: &str, content: &[u8]) -> Vec<Result<Text, String>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    let documents = reader(format).open(&path, |raw| raw).unwrap();
    let path = path.to_str().unwrap();
    documents
        .map(|document| {
            let document = document.map(|text| Text { id: text.id.replace(path, "FILE"), ..text });
            document.map_err(|error| format!("{error:#}").replace(path, "FILE"))
        })
        .collect()
}

fn read(name: &str, content: &[u8]) -> Vec<Result<Text, String>> {
    read_as(Format::Auto, name, content)
}

fn text(id: &str, text: &str, source: Option<&str>) -> Text {
    Text {
        id: id.to_owned(),
        text: text.to_owned(),
        source: source.map(str::to_owned),
        context: String::new(),
    }
}

const LINES: &str =
    "{\"id\":\"a\",\"text\":\"one\",\"source\":\"web\"}\n\n{\"text\":\"two\"}\r\n{\"id\":7,\"text\":\"\"}";

fn expected() -> Vec<Result<Text, String>> {
    vec![Ok(text("a", "one", Some("web"))), Ok(text("FILE:3", "two", None)), Ok(text("7", "", None))]
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn json_lines_are_told_by_what_a_file_begins_with_and_not_by_its_name() {
    let zstd = zstd::encode_all(LINES.as_bytes(), 1).unwrap();
    let marked = format!("\u{feff}\n {LINES}");
    for name in ["x.jsonl", "x.JSONL", "x.jsonl.gzip", "x.jsonl.zstd", "63", "x", "x.txt", "x.dat.v1"] {
        assert_eq!(read(name, LINES.as_bytes()), expected(), "{name}");
        assert_eq!(read(name, &gzip(LINES.as_bytes())), expected(), "{name}");
        assert_eq!(read(name, &zstd), expected(), "{name}");
        assert_eq!(read(name, marked.as_bytes())[0], expected()[0], "{name}");
    }
    assert_eq!(read_as(Format::Text, "x.jsonl", b"{\"text\":1}"), [Ok(text("FILE", "{\"text\":1}", None))]);
}

#[test]
fn a_name_tells_json_lines_whose_first_line_is_bad() {
    for name in ["x.jsonl", "x.NDJSON", "x.json.zstd", "x.jsonl.gz"] {
        let read = read(name, b"oops\n{\"text\":\"good\"}\n");
        assert!(read.len() == 2 && read[0].is_err() && read[1].is_ok(), "{name}: {read:?}");
    }
    // An array of objects is refused line by line, and never taken for text.
    assert!(read("x", b"[{\"text\":\"one\"}]")[0].as_ref().unwrap_err().contains("not a JSON object"));
    for plain in ["x.json lines.txt", "jsonl", "json.txt"] {
        assert!(read(plain, b"oops")[0].is_ok(), "{plain}");
    }
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
fn a_line_is_read_as_python_writes_it() {
    let lines = [
        r#"{"text": "one", "score": NaN, "range": [-Infinity, Infinity], "id": "NaN"}"#,
        // Half a surrogate pair, in a field that nobody asks for.
        r#"{"text": "two", "title": "\ud800", "id": "b", "nested": {"text": "no"}}"#,
        r#"{"text": "first", "id": "c", "text": "last"}"#,
        r#"{"text": NaN, "id": "d"}"#,
        r#"{"text": "half a \ud800", "id": "e"}"#,
        r#"{"text": "six", "context": "before ", "id": -6, "source": null}"#,
        r#"{"text": "seven", "context": ["no text"]}"#,
    ];
    let read = read("x.jsonl", lines.join("\n").as_bytes());
    assert_eq!(read[0], Ok(text("NaN", "one", None)));
    assert_eq!(read[1], Ok(text("b", "two", None)));
    assert_eq!(read[2], Ok(text("c", "last", None)));
    assert!(read[3].as_ref().unwrap_err().contains("FILE:4: no text in the field `text`"), "{read:?}");
    assert!(read[4].as_ref().unwrap_err().contains("hex escape"), "{read:?}");
    assert_eq!(read[5], Ok(Text { context: "before ".to_owned(), ..text("-6", "six", None) }));
    assert!(read[6].as_ref().unwrap_err().contains("the field `context` holds no text"), "{read:?}");
}

#[test]
fn a_text_that_is_too_long_is_named_and_the_next_is_read() {
    let long = "z".repeat(TEXT_BYTES_MAX + 1);
    let lines = format!("{{\"text\":\"{long}\"}}\n{{\"text\":\"after\"}}\n");
    let found = read("x.jsonl", lines.as_bytes());
    assert!(
        found[0].as_ref().unwrap_err().contains("the text has more than 1048576 bytes"),
        "{:?}",
        found[1]
    );
    assert_eq!(found[1], Ok(text("FILE:2", "after", None)));
    // A line of 70 MB, of which there is no telling what it holds.
    let lines = format!("{{\"text\":\"{}\"}}\n{{\"text\":\"after\"}}\n", long.repeat(70));
    let found = read("x.jsonl", &gzip(lines.as_bytes()));
    assert!(found[0].as_ref().unwrap_err().contains("the line has 73400402 bytes"), "{:?}", found[0]);
    assert!(found[1].is_ok());

    assert!(read("x.txt", long.as_bytes())[0].as_ref().unwrap_err().contains("more than 1048576 bytes"));
    assert!(read("x.txt", format!("\u{feff}{}", &long[1..]).as_bytes())[0].is_ok());
}

#[test]
fn a_compressed_file_that_is_cut_short_ends_with_an_error() {
    let whole = zstd::encode_all(LINES.repeat(1000).as_bytes(), 1).unwrap();
    assert!(read("x.jsonl", &whole[..whole.len() / 2]).last().unwrap().is_err());
}

#[test]
fn a_plain_file_is_one_document_without_its_mark() {
    assert_eq!(read("x.txt", b"one\ntwo\n"), [Ok(text("FILE", "one\ntwo\n", None))]);
    assert_eq!(read("x.txt", "\u{feff}one".as_bytes()), [Ok(text("FILE", "one", None))]);
    assert_eq!(read("x.txt", b""), [Ok(text("FILE", "", None))]);
    assert_eq!(read("x.txt", b"{ braces }"), [Ok(text("FILE", "{ braces }", None))]);
    assert!(read("x.txt", b"abc\xff")[0].as_ref().unwrap_err().contains("not UTF-8 from byte 3"));
}

#[test]
fn what_cannot_be_opened_is_an_error_and_not_a_document() {
    let folder = tempfile::tempdir().unwrap();
    assert!(reader(Format::Auto).open(Path::new("/no/such/file"), |raw| raw).is_err());
    assert!(reader(Format::Auto).open(folder.path(), |raw| raw).is_err());
    let parquet = folder.path().join("x.jsonl");
    std::fs::write(&parquet, b"PAR1\x15\x04\x15\x00more").unwrap();
    let Err(error) = reader(Format::Auto).open(&parquet, |raw| raw) else { panic!("it is no text") };
    assert!(error.to_string().contains("Parquet"), "{error}");
}

/// Tar archives and UTF-16 without its mark are valid UTF-8, and would be tokenized with their headers and zeros.
#[test]
fn a_file_with_nul_bytes_is_no_text_unless_it_is_asked_for() {
    let lines = "{\"text\":\"one\"}\n{\"text\":\"two\"}\n";
    let mut header = [0; 512];
    header[..10].copy_from_slice(b"base.jsonl");
    header[257..262].copy_from_slice(b"ustar");
    let archive = [&header[..], lines.as_bytes(), &[0; 1024]].concat();
    let utf_16: Vec<u8> = "the river".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (name, content, at) in
        [("a.tar", &archive, 10), ("a.tar.gz", &gzip(&archive), 10), ("river.txt", &utf_16, 1)]
    {
        let [document] = &read(name, content)[..] else { panic!("{name}") };
        let error = document.as_ref().unwrap_err();
        assert!(error.contains(&format!("FILE as text: byte {at} is NUL")), "{error}");
        assert!(error.contains("iconv -f UTF-16LE") && error.contains("tar -xOf"), "{error}");
    }
    let [Ok(document)] = &read_as(Format::Text, "river.txt", &utf_16)[..] else { panic!() };
    assert_eq!(document.text.as_bytes(), utf_16);

    let utf_16: Vec<u8> = lines.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let documents = read("lines.jsonl", &utf_16);
    assert!(documents.iter().all(|document| document.as_ref().is_err_and(|error| error.contains("iconv"))));
    // A NUL that is spelt is a letter like another.
    assert_eq!(read("lines.jsonl", br#"{"text":"a\u0000b"}"#), [Ok(text("FILE:1", "a\0b", None))]);
}
