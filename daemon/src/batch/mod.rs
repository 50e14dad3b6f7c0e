//! Documents to windows to batches: pure functions and values, so that no clock and no thread decides what a batch
//! holds.

mod ladder;
mod lookahead;
mod window;

pub use ladder::Ladder;
pub use lookahead::{LookAhead, plan};
pub use window::{TokenClass, Window, windows, windows_of};

/// What one run of the model sees: rows padded on the right to one length, and the targets asked for.
///
/// Right padding needs no mask in a causal model: no real token can see what stands after it. One that sees both sides is given
/// `attention_mask`.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The windows, one to a row.
    pub windows: Vec<Window>,
    /// Length of a row in tokens.
    pub padded_len: usize,
    /// Rows, those that are padding and nothing else included; they come last.
    pub padded_rows: usize,
    /// Token ids, `padded_rows * padded_len`, padded with 0.
    pub tokens: Vec<i64>,
    /// 1 for real tokens, 0 for padding, of the same shape; a row of padding alone counts as real, for what a model makes of
    /// a row that it is to see nothing of is its own affair.
    pub attention_mask: Vec<i64>,
    /// Positions counted from 0 in every row, of the same shape.
    pub position_ids: Vec<i64>,
    /// Flat positions (`row * padded_len + position`) that predict the targets.
    pub target_rows: Vec<i64>,
    /// Token ids to be scored, row by row; of a token classifier the class, for each token once.
    pub targets: Vec<i64>,
}

impl Batch {
    /// Pads `windows` to the shape on `ladder` that holds them.
    pub fn new(windows: Vec<Window>, ladder: Ladder) -> Self {
        let longest = windows.iter().map(Window::len).max().unwrap_or(0);
        let padded_len = ladder.fit(longest);
        let padded_rows = ladder.fit_rows(windows.len(), padded_len);
        let mut tokens = vec![0; padded_rows * padded_len];
        let mut attention_mask = vec![1; tokens.len()];
        let (mut target_rows, mut targets) = (Vec::new(), Vec::new());
        for (row, window) in windows.iter().enumerate() {
            let start = row * padded_len;
            attention_mask[start + window.len()..start + padded_len].fill(0);
            for (slot, id) in tokens[start..].iter_mut().zip(window.ids()) {
                *slot = i64::from(id);
            }
            let scored = window.ids().enumerate().skip(window.first_position()).take(window.scored().len());
            for (position, id) in scored {
                // A token is predicted before it, and classified where it stands.
                let at = if window.class.is_some() { position } else { position - 1 };
                target_rows.push((start + at) as i64);
                targets.push(i64::from(window.class.unwrap_or(id)));
            }
        }
        let position_ids = (0..padded_rows).flat_map(|_| 0..padded_len as i64).collect();
        Self { windows, padded_len, padded_rows, tokens, attention_mask, position_ids, target_rows, targets }
    }

    /// Number of rows that hold something.
    pub fn rows(&self) -> usize {
        self.windows.len()
    }

    /// Tokens that are real, not padding.
    pub fn real_tokens(&self) -> usize {
        self.windows.iter().map(Window::len).sum()
    }

    /// Tokens that the model computes, padding included.
    pub fn padded_tokens(&self) -> usize {
        self.padded_rows * self.padded_len
    }
}

#[cfg(test)]
mod tests {
    use sluice_schemas::record::{Bos, ContextPolicy};

    use super::*;

    #[test]
    fn targets_are_the_tokens_after_their_rows() {
        let document: std::sync::Arc<[u32]> = (0..7).collect();
        for (bos, targets) in [(Bos::None, 1..7), (Bos::Document(9), 0..7), (Bos::Window(9), 0..7)] {
            let policy = ContextPolicy { window: 4, stride: 2, bos };
            let batch = Batch::new(windows(0, &document, policy), Ladder::new(8, 4));
            for (&row, &target) in batch.target_rows.iter().zip(&batch.targets) {
                let context = batch.tokens[row as usize];
                assert!(context + 1 == target || (target, context) == (0, 9), "{bos:?}: {context} {target}");
            }
            assert_eq!(batch.targets, targets.collect::<Vec<i64>>(), "{bos:?}");
            assert_eq!(batch.padded_len, 8);
            assert_eq!(batch.attention_mask[..8], [1, 1, 1, 1, 0, 0, 0, 0]);
            assert_eq!(batch.position_ids[8..10], [0, 1]);
        }
    }

    #[test]
    fn a_class_is_asked_for_where_each_token_stands() {
        let document: std::sync::Arc<[u32]> = (0..7).collect();
        for bos in [Bos::None, Bos::Document(9), Bos::Window(9)] {
            for both_sides in [true, false] {
                let class = TokenClass { index: 3, name: String::new(), both_sides };
                let policy = ContextPolicy { window: 4, stride: 2, bos };
                let batch = Batch::new(windows_of(0, &document, policy, Some(&class)), Ladder::new(8, 4));
                let seen: Vec<i64> =
                    batch.target_rows.iter().map(|&row| batch.tokens[row as usize]).collect();
                assert_eq!(seen, (0..7).collect::<Vec<i64>>(), "{bos:?}");
                assert_eq!(batch.targets, [3; 7]);
            }
        }
        let alone = windows_of(0, &[5].into(), ContextPolicy { window: 4, stride: 2, bos: Bos::None }, None);
        assert_eq!(alone, [], "one token alone has no loss");
    }

    #[test]
    fn rows_of_padding_are_asked_for_nothing() {
        let document: std::sync::Arc<[u32]> = (0..24).collect();
        let policy = ContextPolicy { window: 8, stride: 4, bos: Bos::None };
        let all = windows(0, &document, policy);
        let (exact, few) = (Ladder::new(8, 4), Ladder::new(8, 4).with_few_rows(64));
        let (alone, padded) = (Batch::new(all[..5].to_vec(), exact), Batch::new(all[..5].to_vec(), few));
        assert_eq!((padded.rows(), padded.padded_rows, padded.padded_tokens()), (5, 6, 48));
        assert_eq!((&padded.targets, &padded.target_rows), (&alone.targets, &alone.target_rows));
        assert_eq!((&padded.tokens[..40], &padded.tokens[40..]), (&alone.tokens[..], &[0; 8][..]));
        assert_eq!(padded.attention_mask[40..], [1; 8]);
    }
}
