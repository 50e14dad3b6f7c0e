//! What is run before the daemon says that it is ready.

use anyhow::{Context as _, bail};

use super::Score;
use crate::batch::{Batch, Ladder, Window};

/// Runs the shapes of batches that scoring will meet, so that memory is had and kernels are chosen before the daemon
/// says that it is ready; says how many there were.
///
/// On a GPU, where kernels are chosen by shape, these are all there are. The CPU chooses none by shape: the smallest and the
/// largest tell whether the model runs and the memory is there.
pub fn warm_up(scorer: &mut dyn Score, ladder: Ladder, tokens_max: usize) -> anyhow::Result<usize> {
    let shapes = warm_up_shapes(ladder, tokens_max);
    for &(rows, len) in &shapes {
        // The target is token 0, or class 0: every model has both.
        let window = Window::whole(0, vec![0; len].into(), None);
        let scores = scorer
            .score(&Batch::new(vec![window; rows], ladder))
            .with_context(|| format!("the model fails on a batch of {rows} x {len} tokens of padding"))?;
        if let Some(loss) = scores.losses.iter().find(|loss| !loss.is_finite()) {
            bail!("the model gives a loss of {loss}; its weights or its arithmetic are broken");
        }
    }
    Ok(shapes.len())
}

/// Rows and lengths, largest batch first, so that the memory it leaves behind serves the others.
fn warm_up_shapes(ladder: Ladder, tokens_max: usize) -> Vec<(usize, usize)> {
    // One token alone predicts nothing.
    let shapes: Vec<_> = ladder.shapes().into_iter().filter(|&(_, len)| len >= 2).collect();
    if !shapes.is_empty() {
        return shapes;
    }
    let lengths: Vec<usize> = ladder.lengths().into_iter().filter(|&len| len >= 2).collect();
    let full = |len: usize| ((tokens_max / len).max(1), len);
    match lengths.as_slice() {
        [] => vec![],
        [only] => vec![full(*only), (1, *only)],
        [shortest, .., longest] => vec![full(*longest), (1, *shortest)],
    }
}
