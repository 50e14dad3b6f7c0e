//! A change of the `.proto` must not break a reader, or a record, of yesterday.
//!
//! `released.txt` lists every field and enum value ever released. `SLUICE_BLESS=1` adds new ones to it and never
//! takes one away.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;
use protox::prost_reflect::{DescriptorPool, Kind};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Losses, Precision, ScoredDocument, TokenIds, TokenizedDocument,
};

/// One line for each field and value: what a reader built from this `.proto` depends on.
fn describe() -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let files = protox::compile([root.join("sluice/v1/records.proto")], [&root]).unwrap();
    let pool = DescriptorPool::from_file_descriptor_set(files).unwrap();
    let mut lines = BTreeSet::new();
    for message in pool.all_messages() {
        for field in message.fields() {
            let kind = match field.kind() {
                Kind::Message(of) => of.full_name().to_owned(),
                Kind::Enum(of) => of.full_name().to_owned(),
                scalar => format!("{scalar:?}").to_lowercase(),
            };
            lines.insert(format!(
                "{} = {} {:?} {kind}",
                field.full_name(),
                field.number(),
                field.cardinality()
            ));
        }
    }
    for value in pool.all_enums().flat_map(|e| e.values().collect::<Vec<_>>()) {
        lines.insert(format!("{} = {}", value.full_name(), value.number()));
    }
    lines
}

#[test]
fn nothing_released_has_changed() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/released.txt");
    let current = describe();
    let mut released: BTreeSet<String> =
        std::fs::read_to_string(&path).unwrap_or_default().lines().map(str::to_owned).collect();
    if std::env::var_os("SLUICE_BLESS").is_some() {
        released.extend(current.iter().cloned());
        let lines: Vec<_> = released.iter().map(String::as_str).collect();
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    }
    let broken: Vec<_> = released.difference(&current).collect();
    assert!(broken.is_empty(), "the .proto no longer has what released readers depend on: {broken:#?}");
    let unlisted: Vec<_> = current.difference(&released).collect();
    assert!(unlisted.is_empty(), "new in the .proto; SLUICE_BLESS=1 puts it on record: {unlisted:#?}");
}

#[test]
fn the_comparison_sees_a_renumbered_field() {
    let released = describe();
    let changed: BTreeSet<String> = released
        .iter()
        .map(|line| line.replace("TokenizedDocument.id = 2", "TokenizedDocument.id = 9"))
        .collect();
    assert_eq!(released.difference(&changed).count(), 1);
}

fn unhex(text: &str) -> Bytes {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect::<Vec<u8>>()
        .into()
}

fn document() -> TokenizedDocument {
    TokenizedDocument {
        id: "gsm/17".to_owned(),
        tokens: TokenIds::new(&[3, 70_000, 65_535]),
        tokenizer: Fingerprint::of_bytes(b"tokenizer"),
        source: "curated".to_owned(),
        attributes: [("licence".to_owned(), "MIT".to_owned())].into(),
    }
}

#[test]
fn records_of_yesterday_are_read_today() {
    let tokenized = TokenizedDocument::decode(unhex(include_str!("v1-tokenized-document.hex"))).unwrap();
    assert_eq!(tokenized, document());

    let scored = ScoredDocument::decode(unhex(include_str!("v1-scored-document.hex"))).unwrap();
    let expected = ScoredDocument {
        document: document(),
        reference_losses: Losses::new(&[f32::NAN, 0.5, 11.25], LossFormat::F16).unwrap(),
        reference_entropies: Some(Losses::new(&[f32::NAN, 1.5, 2.25], LossFormat::F16).unwrap()),
        reference_model: Fingerprint::of_bytes(b"model"),
        context: ContextPolicy { window: 2048, stride: 1024, bos: Bos::None },
        precision: Precision::Bf16,
    };
    assert_eq!(scored, expected);
    assert_eq!(scored.encode(), unhex(include_str!("v1-scored-document.hex")));
}
