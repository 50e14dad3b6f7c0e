//! Every way in which a record can be wrong has its name.
#![allow(clippy::unwrap_used, missing_docs)]

use bytes::Bytes;
use prost::Message as _;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{
    LossFormat, Losses, RecordError, ScoredDocument, ScoredRecord, TokenIds, TokenizedDocument,
};
use sluice_schemas::wire;

fn tokenized() -> wire::TokenizedDocument {
    wire::TokenizedDocument {
        schema_version: 1,
        id: "a".to_owned(),
        tokens: vec![1, 0, 2, 0].into(),
        token_width: 2,
        tokenizer_fingerprint: vec![7; 32].into(),
        ..Default::default()
    }
}

fn scored() -> wire::ScoredDocument {
    wire::ScoredDocument {
        schema_version: 1,
        document: Some(tokenized()),
        reference_loss: [f32::NAN, 2.5].iter().flat_map(|loss| loss.to_le_bytes()).collect::<Vec<_>>().into(),
        loss_format: wire::LossFormat::F32.into(),
        reference_model_fingerprint: vec![8; 32].into(),
        context: Some(wire::ContextPolicy {
            window: 64,
            stride: 32,
            bos: wire::BosPolicy::None.into(),
            bos_token: 0,
        }),
        precision: wire::Precision::F32.into(),
        ..Default::default()
    }
}

#[test]
fn a_tokenized_document_is_refused_for_the_right_reason() {
    type Spoil = fn(&mut wire::TokenizedDocument);
    let cases: [(&str, Spoil); 6] = [
        ("unknown_version", |r| r.schema_version = 2),
        ("missing_id", |r| r.id.clear()),
        ("empty_document", |r| r.tokens = Bytes::new()),
        ("bad_token_width", |r| r.token_width = 3),
        ("bad_token_length", |r| r.tokens = vec![1, 2, 3].into()),
        ("bad_fingerprint", |r| r.tokenizer_fingerprint = vec![7; 31].into()),
    ];
    for (code, spoil) in cases {
        let mut record = tokenized();
        spoil(&mut record);
        let error = TokenizedDocument::decode(record.encode_to_vec().into()).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(RecordError::CODES.contains(&code));
    }
    assert!(matches!(TokenizedDocument::decode(Bytes::new()), Err(RecordError::EmptyPayload)));
}

#[test]
fn every_truncation_is_an_error_or_a_smaller_valid_record_and_never_a_panic() {
    let whole = scored().encode_to_vec();
    for len in 0..whole.len() {
        let _ = ScoredDocument::decode(Bytes::copy_from_slice(&whole[..len]));
        let _ = TokenizedDocument::decode(Bytes::copy_from_slice(&whole[..len]));
    }
    assert!(ScoredDocument::decode(whole.into()).is_ok());
}

#[test]
fn a_scored_document_is_refused_for_the_right_reason() {
    fn losses(values: &[f32]) -> Bytes {
        values.iter().flat_map(|loss| loss.to_le_bytes()).collect::<Vec<_>>().into()
    }
    type Spoil = fn(&mut wire::ScoredDocument);
    let cases: [(&str, Spoil); 11] = [
        ("unknown_version", |r| r.schema_version = 0),
        ("missing_field", |r| r.document = None),
        ("missing_field", |r| r.context = None),
        ("unknown_policy", |r| r.precision = 99),
        ("unknown_policy", |r| r.context.as_mut().unwrap().bos = 99),
        ("unknown_loss_format", |r| r.loss_format = 99),
        ("bad_loss_length", |r| r.reference_loss = losses(&[f32::NAN])),
        ("unexpected_prediction", |r| r.reference_loss = losses(&[0.0, 1.0])),
        ("non_finite_loss", |r| r.reference_loss = losses(&[f32::NAN, f32::INFINITY])),
        ("non_finite_loss", |r| r.reference_entropy = losses(&[f32::NAN, f32::NAN])),
        ("negative_loss", |r| r.reference_loss = losses(&[f32::NAN, -0.01])),
    ];
    for (code, spoil) in cases {
        let mut record = scored();
        spoil(&mut record);
        let error = ScoredDocument::decode(record.encode_to_vec().into()).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
}

fn attributed() -> wire::ScoredDocument {
    wire::ScoredDocument {
        reference_loss: Bytes::new(),
        loss_format: 0,
        model_kind: wire::ModelKind::TokenClassifier.into(),
        attribute: Some(wire::TokenAttribute {
            values: [0.25_f32, 1.0].iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into(),
            format: wire::LossFormat::F32.into(),
            class_name: "toxic".to_owned(),
            class_index: 1,
        }),
        ..scored()
    }
}

#[test]
fn a_record_of_a_token_classifier_comes_back_as_it_was_and_is_no_record_of_losses() {
    let bytes = Bytes::from(attributed().encode_to_vec());
    let ScoredRecord::Attributes(record) = ScoredRecord::decode(bytes.clone()).unwrap() else {
        panic!("it carries no losses")
    };
    assert_eq!(record.attribute.to_vec(), [0.25, 1.0]);
    assert_eq!((record.attribute.class_name(), record.attribute.class_index()), ("toxic", 1));
    assert_eq!(record.encode(), bytes);
    assert_eq!(ScoredDocument::decode(bytes).unwrap_err().code(), "other_model_kind");

    // What a reader makes of it that knows nothing of fields 9 and 10: a record without losses, and no losses of 0.
    let before = wire::ScoredDocument { model_kind: 0, attribute: None, ..attributed() };
    let error = ScoredRecord::decode(before.encode_to_vec().into()).unwrap_err();
    assert_eq!(error.code(), "unknown_loss_format");
}

#[test]
fn a_record_of_a_token_classifier_is_refused_for_the_right_reason() {
    type Spoil = fn(&mut wire::ScoredDocument);
    fn attribute(record: &mut wire::ScoredDocument) -> &mut wire::TokenAttribute {
        record.attribute.as_mut().unwrap()
    }
    let cases: [(&str, Spoil); 8] = [
        ("missing_field", |r| r.attribute = None),
        ("unknown_model_kind", |r| r.model_kind = 99),
        ("other_model_kind", |r| r.model_kind = 0),
        ("other_model_kind", |r| r.reference_loss = scored().reference_loss),
        ("unknown_loss_format", |r| attribute(r).format = 0),
        ("bad_attribute_length", |r| attribute(r).values = vec![0; 4].into()),
        ("non_finite_attribute", |r| attribute(r).values = vec![0xff; 8].into()),
        ("bad_fingerprint", |r| r.reference_model_fingerprint = Bytes::new()),
    ];
    for (code, spoil) in cases {
        let mut record = attributed();
        spoil(&mut record);
        let error = ScoredRecord::decode(record.encode_to_vec().into()).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(RecordError::CODES.contains(&code));
    }
}

#[test]
fn the_first_token_has_a_loss_only_after_a_bos_token() {
    use sluice_schemas::record::{Bos, ContextPolicy};
    for (bos, policy) in
        [(Bos::Document(5), wire::BosPolicy::Document), (Bos::Window(5), wire::BosPolicy::Window)]
    {
        for first in [0.5, f32::NAN] {
            let mut record = scored();
            record.context =
                Some(wire::ContextPolicy { window: 64, stride: 32, bos: policy.into(), bos_token: 5 });
            record.reference_loss =
                [first, 2.5].iter().flat_map(|loss: &f32| loss.to_le_bytes()).collect::<Vec<_>>().into();
            let read = ScoredDocument::decode(record.encode_to_vec().into()).unwrap();
            assert_eq!(read.context, ContextPolicy { window: 64, stride: 32, bos });
            assert_eq!(read.encode(), Bytes::from(record.encode_to_vec()));
        }
    }
}

#[test]
fn ids_take_two_bytes_where_they_fit_and_come_back_as_they_were() {
    for ids in [vec![0, 65_535], vec![0, 65_536, u32::MAX]] {
        let document = TokenizedDocument {
            id: "x".to_owned(),
            tokens: TokenIds::new(&ids),
            tokenizer: Fingerprint::of_bytes(b"t"),
            source: String::new(),
            attributes: std::collections::BTreeMap::default(),
        };
        let read = TokenizedDocument::decode(document.encode()).unwrap();
        assert_eq!(read, document);
        assert_eq!(read.tokens.to_vec(), ids);
    }
}

#[test]
fn foreign_tokenizers_and_vocabularies_are_named() {
    let document = TokenizedDocument::decode(tokenized().encode_to_vec().into()).unwrap();
    assert_eq!(document.check_tokenizer(Fingerprint::of_bytes(b"")).unwrap_err().code(), "foreign_tokenizer");
    document.check_tokenizer(Fingerprint::from([7; 32])).unwrap();
    assert_eq!(document.tokens.check_vocabulary(2).unwrap_err().code(), "token_beyond_vocabulary");
    document.tokens.check_vocabulary(3).unwrap();
}

#[test]
fn half_precision_keeps_losses_within_its_rounding() {
    let losses = [f32::NAN, 0.001, 1.0 / 3.0, 9.876_54, 15.99];
    let packed = Losses::new(&losses, LossFormat::F16).unwrap();
    for (packed, exact) in packed.iter().zip(losses).skip(1) {
        assert!((packed - exact).abs() <= 0.004, "{packed} against {exact}");
    }
    assert_eq!(Losses::new(&[f32::NAN, 1e6], LossFormat::F16).unwrap_err().code(), "non_finite_loss");
}
