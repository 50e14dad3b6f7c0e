//! Properties of packing, over documents drawn by a seeded generator.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;

use sluice_schemas::record::{Bos, ContextPolicy};

use super::{BatchShape, FirstToken, Packer, Packing, ROWS_AHEAD};
use crate::batch::{NO_TARGET, PackedBatch};
use crate::cut::{Piece, UnequalContexts, cut};
use crate::document::Document;
use crate::random::SplitMix64;

const BOS: u32 = 900_000;

/// A document whose token ids are unique over the test, with a loss that names its token.
fn document(number: usize, first_token: u32, length: usize) -> Document {
    let tokens: Vec<u32> = (first_token..first_token + length as u32).collect();
    let losses =
        tokens.iter().enumerate().map(|(i, &t)| if i == 0 { f32::NAN } else { t as f32 / 8.0 }).collect();
    Document::scored(format!("d{number}"), format!("source {}", number % 3), tokens, losses).unwrap()
}

/// The same, scored in windows.
fn scored(number: usize, first_token: u32, length: usize, context: ContextPolicy) -> Document {
    let tokens: Vec<u32> = (first_token..first_token + length as u32).collect();
    let first = context.bos == Bos::None;
    let loss = |(i, &t): (usize, &u32)| if i == 0 && first { f32::NAN } else { t as f32 / 8.0 };
    let losses = tokens.iter().enumerate().map(loss).collect();
    Document::scored(format!("d{number}"), format!("source {}", number % 3), tokens, losses)
        .unwrap()
        .with_context(context)
}

fn pack_all(mut packer: Packer, rows: usize, documents: &[Document]) -> Vec<PackedBatch> {
    let mut batches = Vec::new();
    for document in documents {
        packer.push(document);
        while packer.fills(1) {
            let batch = packer.next_batch().unwrap();
            assert_eq!(batch.batch.rows, rows);
            batches.push(batch);
        }
    }
    packer.close();
    batches.extend(std::iter::from_fn(|| packer.next_batch()));
    batches
}

fn pack(shape: BatchShape, documents: &[Document]) -> Vec<PackedBatch> {
    pack_all(Packer::new(shape), shape.rows, documents)
}

/// The rows of the same documents by the plainest program for the rule: lists that are searched from end to end.
fn rows_by_search(
    documents: &[Document],
    row: usize,
    packing: Packing,
    rows_ahead: usize,
) -> Vec<Vec<Piece>> {
    let mut waiting: Vec<Piece> = Vec::new();
    let mut rows = Vec::new();
    let make_row = |waiting: &mut Vec<Piece>| {
        let mut made = vec![waiting.remove(0)];
        loop {
            let left = row - made.iter().map(Piece::len).sum::<usize>();
            let longest = waiting.iter().map(Piece::len).filter(|&length| length <= left).max();
            let Some(longest) = longest else { return made };
            let first = waiting.iter().position(|piece| piece.len() == longest).unwrap();
            made.push(waiting.remove(first));
        }
    };
    for document in documents {
        for piece in cut(document, row, packing.unequal_contexts) {
            if piece.len() > row - 2 {
                rows.push(vec![piece]);
                continue;
            }
            waiting.push(piece);
            while waiting.iter().map(Piece::len).sum::<usize>() > rows_ahead * row {
                rows.push(make_row(&mut waiting));
            }
        }
    }
    while !waiting.is_empty() {
        rows.push(make_row(&mut waiting));
    }
    rows
}

fn check_layout(packed: &PackedBatch) {
    let batch = &packed.batch;
    let cells = batch.rows * batch.len;
    let lengths = [&batch.tokens, &batch.segments, &batch.positions, &batch.targets].map(Vec::len);
    assert_eq!(lengths, [cells; 4]);
    assert_eq!([batch.reference.len(), batch.reference_entropy.len(), batch.attribute.len()], [cells; 3]);
    for index in 0..cells {
        let row_start = index % batch.len == 0;
        let segment = batch.segments[index];
        let begins = segment != 0 && (row_start || batch.segments[index - 1] != segment);
        let ends = (index + 1) % batch.len == 0 || batch.segments[index + 1] != segment;
        if begins {
            assert!(batch.positions[index] == 0 && !ends, "a segment holds at least two tokens");
        } else if segment != 0 {
            assert_eq!(batch.positions[index], batch.positions[index - 1] + 1);
        }
        if segment == 0 || ends {
            assert_eq!(batch.targets[index], NO_TARGET);
        }
        if batch.targets[index] == NO_TARGET {
            assert!(batch.reference[index].is_nan());
        } else {
            assert_eq!(batch.targets[index], batch.tokens[index + 1]);
        }
    }
}

fn policies(generator: &mut SplitMix64, row: usize) -> Option<ContextPolicy> {
    let bos = [Bos::None, Bos::Document(BOS), Bos::Window(BOS)][generator.below(3)];
    let window = 4 + generator.below(row + 4) as u32;
    let stride = 1 + generator.below(window as usize - 2) as u32;
    (generator.below(4) > 0).then_some(ContextPolicy { window, stride, bos })
}

#[test]
fn every_token_that_can_be_predicted_is_predicted_exactly_once_with_its_own_loss() {
    let mut generator = SplitMix64::keyed(4, 0);
    for case in 0..300 {
        let shape = BatchShape { rows: 1 + generator.below(4), len: 4 + generator.below(20) };
        let policy = policies(&mut generator, shape.len);
        let mut next_token = 1;
        let mut documents = Vec::new();
        for number in 0..generator.below(60) {
            let length = generator.below(60);
            documents.push(match policy {
                Some(policy) => scored(number, next_token, length, policy),
                None => document(number, next_token, length),
            });
            next_token += length as u32;
        }
        let packing = Packing { unequal_contexts: UnequalContexts::Allow, ..Packing::default() };
        let (packer, rows_ahead) = match case % 3 {
            0 => (Packer::new(shape).looking_ahead(case % 5), case % 5),
            _ => (Packer::new(shape), ROWS_AHEAD),
        };
        let batches = pack_all(packer.packing(packing), shape.rows, &documents);
        let mut predicted: BTreeMap<u32, usize> = BTreeMap::new();
        for packed in &batches {
            check_layout(packed);
            for (target, reference) in packed.batch.targets.iter().zip(&packed.batch.reference) {
                if *target != NO_TARGET {
                    assert!((reference - *target as f32 / 8.0).abs() < f32::EPSILON, "case {case}");
                    *predicted.entry(*target).or_default() += 1;
                }
            }
        }
        let unread = usize::from(policy.is_none_or(|policy| policy.bos == Bos::None));
        let expected = documents.iter().flat_map(|d| d.tokens().iter().skip(unread));
        assert_eq!(predicted, expected.map(|&token| (token, 1)).collect(), "case {case}: once each");
        // The same rows as by the plainest program, in the same order.
        let rows: Vec<_> = batches.iter().flat_map(|packed| packed.rows.clone()).collect();
        let searched = rows_by_search(&documents, shape.len, packing, rows_ahead);
        assert!(format!("{rows:?}") == format!("{searched:?}"), "case {case}");
    }
}

#[test]
fn a_document_that_fits_a_row_is_not_cut() {
    let mut generator = SplitMix64::keyed(5, 0);
    let shape = BatchShape { rows: 4, len: 32 };
    let documents: Vec<Document> =
        (0..500).map(|number| document(number, 100 * number as u32, 2 + generator.below(40))).collect();
    let mut pieces: BTreeMap<String, usize> = BTreeMap::new();
    for piece in pack(shape, &documents).iter().flat_map(|packed| packed.rows.iter().flatten()) {
        *pieces.entry(piece.document.id().to_owned()).or_default() += 1;
    }
    for document in &documents {
        let expected = if document.tokens().len() <= shape.len { 1 } else { 2 };
        assert_eq!(pieces[document.id()], expected, "{} tokens", document.tokens().len());
    }
}

#[test]
fn no_piece_is_passed_over_by_more_rows_than_there_are_pieces_before_it() {
    // A long piece among short ones is never the best fit, and comes out all the same.
    let shape = BatchShape { rows: 1, len: 16 };
    let mut documents = vec![document(0, 1, 11)];
    documents.splice(0..0, (1..40).map(|number| document(number, 100 * number as u32, 8)));
    documents.extend((40..400).map(|number| document(number, 100 * number as u32, 8)));
    let batches = pack(shape, &documents);
    let row =
        batches.iter().position(|packed| packed.rows[0].iter().any(|piece| piece.document.id() == "d0"));
    assert!(row.unwrap() <= 39, "{row:?}");
}

#[test]
fn a_plain_document_goes_on_with_one_token_of_overlap() {
    let batches = pack(BatchShape { rows: 3, len: 4 }, &[document(0, 10, 6), document(1, 20, 3)]);
    let batch = &batches[0].batch;
    assert_eq!(batch.tokens, [10, 11, 12, 13, 13, 14, 15, 0, 20, 21, 22, 0]);
    assert_eq!(batch.segments, [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0]);
    let none = NO_TARGET;
    assert_eq!(batch.targets, [11, 12, 13, none, 14, 15, none, none, 21, 22, none, none]);
}

#[test]
fn a_bos_that_the_reference_saw_is_read_and_the_first_token_is_predicted_from_it() {
    let context = ContextPolicy { window: 4, stride: 2, bos: Bos::Document(BOS) };
    let batches =
        pack(BatchShape { rows: 2, len: 8 }, &[scored(0, 10, 3, context), scored(1, 20, 5, context)]);
    let batch = &batches[0].batch;
    // The second document is longer than a window: its second one is the reference's, and moved back to be full.
    assert_eq!(batch.tokens[..8], [BOS, 10, 11, 12, BOS, 20, 21, 22]);
    assert_eq!(batch.tokens[8..], [21, 22, 23, 24, 0, 0, 0, 0]);
    let none = NO_TARGET;
    assert_eq!(batch.targets[..8], [10, 11, 12, none, 20, 21, 22, none]);
    assert_eq!(batch.targets[8..], [none, 23, 24, none, none, none, none, none]);
    assert_eq!(batch.positions[8..12], [0, 1, 2, 3], "the reference's own");
    assert!((batch.reference[0] - 10.0 / 8.0).abs() < f32::EPSILON, "the first token keeps its loss");
}

#[test]
fn documents_without_a_prediction_leave_no_trace() {
    assert!(pack(BatchShape { rows: 1, len: 4 }, &[document(0, 1, 0), document(1, 1, 1)]).is_empty());
}

#[test]
fn what_is_left_in_a_packer_is_where_it_goes_on() {
    let shape = BatchShape { rows: 2, len: 7 };
    let documents: Vec<Document> = (0..80).map(|n| document(n, 100 * n as u32, n % 11)).collect();
    let whole = pack(shape, &documents);
    for stop in 0..documents.len() {
        let mut packer = Packer::new(shape);
        let mut batches = Vec::new();
        for (number, document) in documents.iter().enumerate() {
            if number == stop {
                let finished = packer.finished().map(<[_]>::to_vec).collect();
                packer = Packer::new(shape).holding(finished, packer.waiting().cloned().collect());
            }
            packer.push(document);
            batches.extend(packer.fills(1).then(|| packer.next_batch().unwrap()));
        }
        packer.close();
        batches.extend(std::iter::from_fn(|| packer.next_batch()));
        // Written out, because NaN is not equal to itself.
        assert!(format!("{batches:?}") == format!("{whole:?}"), "stopped before document {stop}");
    }
}

#[test]
fn batches_that_are_put_back_come_out_again() {
    let shape = BatchShape { rows: 2, len: 8 };
    let mut packer = Packer::new(shape);
    (0..40).for_each(|n| packer.push(&document(n, 100 * n as u32, 6)));
    let taken: Vec<_> = (0..2).filter_map(|_| packer.next_batch()).collect();
    taken.iter().rev().for_each(|packed| packer.put_back(packed.clone()));
    let again: Vec<_> = (0..2).filter_map(|_| packer.next_batch()).collect();
    assert!(taken.len() == 2 && format!("{again:?}") == format!("{taken:?}"));
}

#[test]
fn across_documents_a_row_is_one_segment_whose_positions_run_on() {
    let shape = BatchShape { rows: 1, len: 6 };
    let packed = |first_token| {
        let packing =
            Packing { attend_across_documents: true, first_token, unequal_contexts: UnequalContexts::Allow };
        let documents = [document(0, 10, 3), document(1, 20, 3), document(2, 30, 2)];
        let batches = pack_all(Packer::new(shape).packing(packing), 1, &documents);
        batches.into_iter().map(|packed| packed.batch).collect::<Vec<_>>()
    };
    let skipped = packed(FirstToken::Skip);
    assert_eq!(skipped[0].tokens, [10, 11, 12, 20, 21, 22]);
    assert_eq!(skipped[0].segments, [1; 6]);
    assert_eq!(skipped[0].positions, [0, 1, 2, 3, 4, 5]);
    assert_eq!(skipped[0].targets, [11, 12, NO_TARGET, 21, 22, NO_TARGET]);
    let predicted = packed(FirstToken::Predict);
    assert_eq!(predicted[0].targets, [11, 12, 20, 21, 22, NO_TARGET]);
    assert!(predicted[0].reference[2].is_nan(), "no reference knows what follows another document");
    assert_eq!(predicted[1].targets[..2], [31, NO_TARGET], "a row's first token follows nothing");
    assert_eq!(predicted[1].segments, [1, 1, 0, 0, 0, 0]);
}

#[test]
fn a_first_token_that_has_a_reference_loss_keeps_it_where_it_is_predicted() {
    // A document that begins with the BOS token gets no second one; what a producer of its own wrote there stays.
    let packing = Packing {
        attend_across_documents: true,
        first_token: FirstToken::Predict,
        unequal_contexts: UnequalContexts::Allow,
    };
    let second = Document::scored("d1".into(), String::new(), vec![20, 21], vec![2.5, 1.0]).unwrap();
    let batches = pack_all(
        Packer::new(BatchShape { rows: 1, len: 6 }).packing(packing),
        1,
        &[document(0, 10, 3), second],
    );
    assert_eq!(batches[0].batch.targets[..5], [11, 12, 20, 21, NO_TARGET]);
    assert_eq!(batches[0].batch.reference[2..4], [2.5, 1.0]);
}
