//! Properties of packing, over documents drawn by a seeded generator.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use super::{BatchShape, FirstToken, PackedBatch, Packer, Packing};
use crate::batch::NO_TARGET;
use crate::document::Document;
use crate::random::SplitMix64;

/// A document whose token ids are unique over the test, with a loss that names its token.
fn document(number: usize, first_token: u32, length: usize) -> Document {
    let tokens: Vec<u32> = (first_token..first_token + length as u32).collect();
    let losses =
        tokens.iter().enumerate().map(|(i, &t)| if i == 0 { f32::NAN } else { t as f32 / 8.0 }).collect();
    Document::scored(format!("d{number}"), format!("source {}", number % 3), tokens, losses).unwrap()
}

fn pack_all(shape: BatchShape, documents: &[Document]) -> Vec<PackedBatch> {
    let mut packer = Packer::new(shape);
    let mut batches = Vec::new();
    for document in documents {
        packer.push(document);
        while let Some(batch) = packer.next_batch() {
            assert_eq!(batch.batch.rows, shape.rows);
            batches.push(batch);
        }
    }
    while let Some(batch) = packer.flush() {
        batches.push(batch);
    }
    batches
}

fn check_layout(packed: &PackedBatch) {
    let batch = &packed.batch;
    let cells = batch.rows * batch.len;
    assert_eq!(
        [
            batch.tokens.len(),
            batch.segments.len(),
            batch.positions.len(),
            batch.targets.len(),
            batch.reference.len()
        ],
        [cells; 5]
    );
    for index in 0..cells {
        let row_start = index % batch.len == 0;
        let segment = batch.segments[index];
        let begins = segment != 0 && (row_start || batch.segments[index - 1] != segment);
        if begins {
            assert_eq!(batch.positions[index], 0);
            let alone = (index + 1) % batch.len == 0 || batch.segments[index + 1] != segment;
            assert!(!alone, "a segment holds at least two tokens");
        } else if segment != 0 {
            assert_eq!(batch.positions[index], batch.positions[index - 1] + 1);
        }
        let ends = (index + 1) % batch.len == 0 || batch.segments[index + 1] != segment;
        if segment == 0 || ends {
            assert_eq!(batch.targets[index], NO_TARGET);
            assert!(batch.reference[index].is_nan());
        } else {
            assert_eq!(batch.targets[index], batch.tokens[index + 1]);
        }
    }
}

#[test]
fn every_token_but_a_documents_first_is_predicted_exactly_once_with_its_own_loss() {
    let mut generator = SplitMix64::keyed(4, 0);
    for case in 0..200 {
        let shape = BatchShape { rows: 1 + generator.below(4), len: 2 + generator.below(20) };
        let mut next_token = 1;
        let mut documents = Vec::new();
        for number in 0..generator.below(30) {
            let length = generator.below(60);
            documents.push(document(number, next_token, length));
            next_token += length as u32;
        }
        let batches = pack_all(shape, &documents);
        let mut predicted = Vec::new();
        for packed in &batches {
            check_layout(packed);
            for index in 0..packed.batch.tokens.len() {
                let target = packed.batch.targets[index];
                if target != NO_TARGET {
                    assert!((packed.batch.reference[index] - target as f32 / 8.0).abs() < f32::EPSILON);
                    let piece = packed.piece_at(index).unwrap();
                    predicted.push((target, piece.document.source().to_owned()));
                }
            }
        }
        let expected: Vec<(u32, String)> = documents
            .iter()
            .flat_map(|d| d.tokens().iter().skip(1).map(|&token| (token, d.source().to_owned())))
            .collect();
        assert_eq!(predicted, expected, "case {case}: in stream order, once each");
    }
}

#[test]
fn a_long_document_goes_on_with_one_token_of_overlap() {
    let batches = pack_all(BatchShape { rows: 2, len: 4 }, &[document(0, 10, 6), document(1, 20, 3)]);
    let batch = &batches[0].batch;
    assert_eq!(batch.tokens, [10, 11, 12, 13, 13, 14, 15, 0]);
    assert_eq!(batch.segments, [1, 1, 1, 1, 1, 1, 1, 0], "one free cell holds no prediction and is padded");
    assert_eq!(batch.targets, [11, 12, 13, NO_TARGET, 14, 15, NO_TARGET, NO_TARGET]);
    assert_eq!(batches[1].batch.tokens, [20, 21, 22, 0]);
    assert_eq!(batches[1].batch.rows, 1);
}

#[test]
fn documents_without_a_prediction_leave_no_trace() {
    let batches = pack_all(BatchShape { rows: 1, len: 4 }, &[document(0, 1, 0), document(1, 1, 1)]);
    assert!(batches.is_empty());
}

#[test]
fn what_is_left_in_a_packer_is_where_it_goes_on() {
    let shape = BatchShape { rows: 2, len: 7 };
    let documents: Vec<Document> = (0..40).map(|n| document(n, 100 * n as u32, n % 11)).collect();
    let whole = pack_all(shape, &documents);
    for cut in 0..documents.len() {
        let mut packer = Packer::new(shape);
        let mut batches = Vec::new();
        for (number, document) in documents.iter().enumerate() {
            if number == cut {
                let finished = packer.finished().map(<[_]>::to_vec).collect();
                packer = Packer::new(shape).holding(finished, packer.open().to_vec());
            }
            packer.push(document);
            batches.extend(packer.next_batch());
        }
        batches.extend(std::iter::from_fn(|| packer.flush()));
        // Written out, because NaN is not equal to itself.
        assert!(format!("{batches:?}") == format!("{whole:?}"), "cut before document {cut}");
    }
}

#[test]
fn batches_that_are_put_back_come_out_again() {
    let shape = BatchShape { rows: 2, len: 8 };
    let mut packer = Packer::new(shape);
    (0..12).for_each(|n| packer.push(&document(n, 100 * n as u32, 6)));
    let taken: Vec<_> = (0..2).filter_map(|_| packer.next_batch()).collect();
    taken.iter().rev().for_each(|packed| packer.put_back(packed.clone()));
    let again: Vec<_> = (0..2).filter_map(|_| packer.next_batch()).collect();
    // Written out, because NaN is not equal to itself.
    assert!(taken.len() == 2 && format!("{again:?}") == format!("{taken:?}"));
}

#[test]
fn across_documents_a_row_is_one_segment_whose_positions_run_on() {
    let shape = BatchShape { rows: 1, len: 6 };
    let pack = |first_token| {
        let packing = Packing { attend_across_documents: true, first_token };
        let mut packer = Packer::new(shape).packing(packing);
        packer.push(&document(0, 10, 3));
        packer.push(&document(1, 20, 5));
        std::iter::from_fn(|| packer.flush()).map(|packed| packed.batch).collect::<Vec<_>>()
    };
    let skipped = pack(FirstToken::Skip);
    assert_eq!(skipped[0].tokens, [10, 11, 12, 20, 21, 22]);
    assert_eq!(skipped[0].segments, [1; 6]);
    assert_eq!(skipped[0].positions, [0, 1, 2, 3, 4, 5]);
    assert_eq!(skipped[0].targets, [11, 12, NO_TARGET, 21, 22, NO_TARGET]);
    let predicted = pack(FirstToken::Predict);
    assert_eq!(predicted[0].targets, [11, 12, 20, 21, 22, NO_TARGET]);
    assert!(predicted[0].reference[2].is_nan(), "no reference knows what follows another document");
    // The second row goes on with a document, and a row's first token follows nothing.
    assert_eq!(
        (&predicted[1].tokens[..3], &predicted[1].targets[..3]),
        (&[22, 23, 24][..], &[23, 24, NO_TARGET][..])
    );
    assert_eq!(predicted[1].segments, [1, 1, 1, 0, 0, 0]);
}
