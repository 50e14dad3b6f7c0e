//! How the model sees a document: the settings, and what the model can do, into a context policy.

use anyhow::bail;
use sluice_schemas::record::{Bos, ContextPolicy};

use super::model::Model;
use crate::config::{BosChoice, Config};

/// Longest window where none is asked for. Models are made for ever longer ones, whose attention costs more than it tells.
const WINDOW_UNLESS_ASKED: u32 = 4096;

/// The windows that `config` asks for from `model`.
pub fn context_policy(config: &Config, model: &Model) -> anyhow::Result<ContextPolicy> {
    let window = match (config.score.window_tokens, model.context_max) {
        (0, Some(longest)) => longest.min(WINDOW_UNLESS_ASKED),
        (0, None) => bail!(
            "config.json does not say how long a sequence may be (max_position_embeddings); set score.window_tokens"
        ),
        (asked, Some(longest)) if asked > longest => {
            bail!("score.window_tokens is {asked}, and the model was made for at most {longest} tokens")
        }
        (asked, _) => asked,
    };
    if window < 2 {
        bail!(
            "a window of {window} tokens predicts nothing; check max_position_embeddings in config.json and \
             score.window_tokens"
        );
    }
    // How fast it goes must not decide what comes out.
    let tokens_max = config.sizes().tokens_max;
    if window as usize > tokens_max {
        bail!(
            "a window holds {window} tokens, and a batch at most {tokens_max} (batch.tokens_max, or what \
             batch.lookahead_tokens and limits.in_flight_tokens leave of it): raise that, or set score.window_tokens to \
             {tokens_max} or less, which changes the losses"
        );
    }
    let stride = match config.score.stride_tokens {
        0 => (window / 2).max(1),
        asked if asked >= window => {
            bail!("score.stride_tokens is {asked}; it must be less than the window of {window} tokens")
        }
        asked => asked,
    };
    let bos = match (config.score.bos, model.bos_token) {
        (BosChoice::None, _) => Bos::None,
        (BosChoice::Document, Some(token)) => Bos::Document(token),
        (BosChoice::Window, Some(token)) => Bos::Window(token),
        (_, None) => {
            bail!("score.bos asks for a BOS token, and config.json does not name one (bos_token_id)")
        }
    };
    if let Bos::Document(token) | Bos::Window(token) = bos {
        if token >= model.identity.vocabulary {
            bail!(
                "bos_token_id in config.json is {token}, beyond the vocabulary of {}",
                model.identity.vocabulary
            );
        }
        if stride + 1 >= window {
            bail!(
                "with score.bos, which takes a place in the window, score.stride_tokens ({stride}) must be at least \
                 two less than the window ({window})"
            );
        }
    }
    Ok(ContextPolicy { window, stride, bos })
}
