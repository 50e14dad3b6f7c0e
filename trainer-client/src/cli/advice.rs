//! Which flags an error of the feed, which knows no command line, has to do with.

use sluice_feed::stream::{StreamError, TopicKind};

/// What to look at, if a flag or a command of ours would help.
pub(super) fn advice(error: &anyhow::Error) -> Option<&'static str> {
    match error.downcast_ref::<StreamError>()? {
        StreamError::Unreachable { .. } => Some("the address is that of --bootstrap-servers"),
        StreamError::PropertyFile(_)
        | StreamError::Settings(_)
        | StreamError::UnknownProperty(_)
        | StreamError::PropertyValue(_)
        | StreamError::OwnedProperty(_) => Some("see the --property flags"),
        StreamError::NoSuchTopic { .. } => Some("the name is that of --topic"),
        StreamError::EmptyTopic(_) => Some("`run --follow` waits for documents"),
        StreamError::Kind { found: TopicKind::Documents, .. } => {
            Some("`run` and `forecast` want scored ones: check --topic, or score it with `sluiced serve`")
        }
        StreamError::Kind { found: TopicKind::Scored, .. } => {
            Some("`reference` wants tokenized ones: check --topic")
        }
        StreamError::NoEntropies { .. } => Some(
            "`sluiced serve --score-entropies true` adds them; --score reference-entropy, intersection and union look at them",
        ),
        StreamError::NoLosses { .. } => {
            Some("`run` needs none with --score attribute, loss and entropy, and with --objective random")
        }
        StreamError::NoAttribute { .. } => Some(
            "`sluiced serve --model-path` of a token classifier gives one; --score attribute looks at it",
        ),
        StreamError::ForeignReference { .. } => Some("to allow both, name both with --reference-model"),
        StreamError::NotAllowed { .. } => Some("no --reference-model names it"),
        StreamError::Shorter { .. } | StreamError::MadeAnew { .. } => {
            Some("a new run can begin with this one's weights: --init")
        }
        StreamError::ForeignContext { .. } => {
            Some("for `sluiced serve` they are --score-window-tokens and --score-stride-tokens")
        }
        StreamError::UnequalContexts { .. } => {
            Some("see --sequence-length, and --unequal-contexts mask and allow")
        }
        _ => None,
    }
}
