//! Pieces against the windows that the reference read.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_schemas::windows::windows;

use super::{UnequalContexts, cut};
use crate::document::Document;

fn document(length: u32, context: ContextPolicy) -> Document {
    let tokens: Vec<u32> = (0..length).collect();
    let losses = tokens.iter().map(|&token| if token == 0 { f32::NAN } else { 1.0 }).collect();
    Document::scored("d".into(), String::new(), tokens, losses).unwrap().with_context(context)
}

fn policies() -> impl Iterator<Item = ContextPolicy> {
    [(8, 4), (8, 7), (16, 1), (5, 2)].into_iter().flat_map(|(window, stride)| {
        [Bos::None, Bos::Document(99), Bos::Window(99)].map(|bos| ContextPolicy { window, stride, bos })
    })
}

#[test]
fn where_a_window_fits_a_row_the_pieces_are_the_references_windows() {
    for policy in policies() {
        for length in 0..60 {
            let document = document(length, policy);
            let pieces = cut(&document, 16, UnequalContexts::Refuse);
            let expected = windows(document.tokens(), policy);
            assert_eq!(pieces.len(), expected.len());
            for (piece, window) in pieces.iter().zip(expected) {
                assert_eq!(piece.document.tokens(), &document.tokens()[window.span.clone()]);
                assert_eq!((piece.start, piece.bos), (window.span.start, window.bos));
                assert_eq!(piece.start + piece.first_predicted, window.first_scored);
            }
        }
    }
}

#[test]
fn where_it_does_not_the_first_piece_alone_keeps_what_the_reference_says() {
    for policy in policies().filter(|policy| policy.window > 6) {
        let document = document(40, policy);
        let known = |unequal| {
            let pieces = cut(&document, 6, unequal);
            assert!(pieces.iter().all(|piece| piece.len() <= 6));
            let known = |piece: &super::Piece| {
                piece.document.reference().iter().filter(|loss| !loss.is_nan()).count()
            };
            pieces.iter().map(|piece| (piece.start, known(piece))).collect::<Vec<_>>()
        };
        let masked = known(UnequalContexts::Mask);
        assert!(masked[0].1 > 0 && masked[1..].iter().all(|&(_, known)| known == 0), "{masked:?}");
        let allowed = known(UnequalContexts::Allow);
        assert!(allowed.len() == masked.len() && allowed.iter().all(|&(_, known)| known > 0), "{allowed:?}");
        // One that fits is read as the reference read it, whatever the windows.
        let short = cut(&self::document(5, policy), 6, UnequalContexts::Mask);
        assert_eq!((short.len(), short[0].start), (1, 0));
        assert!(short[0].document.reference()[1..].iter().all(|loss| !loss.is_nan()));
    }
}

#[test]
fn no_policy_and_no_row_makes_it_panic() {
    let numbers = [0, 1, 2, 3, 7, u32::MAX];
    for (window, stride) in numbers.into_iter().flat_map(|w| numbers.map(|s| (w, s))) {
        for bos in [Bos::None, Bos::Document(0), Bos::Window(99)] {
            for row in [2, 3, 8] {
                let context = ContextPolicy { window, stride, bos };
                for length in [0, 1, 2, 3, 20] {
                    let pieces = cut(&document(length, context), row, UnequalContexts::Mask);
                    assert!(pieces.iter().all(|piece| piece.len() <= row), "{context:?} {row}");
                }
            }
        }
    }
}
