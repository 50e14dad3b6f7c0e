"""The choice among tokens over numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sluice_feed._core import ConfigurationError, Selection

Signals = Mapping[str, NDArray[np.float32]]
#: Why a batch of another topic is refused.
NO_ATTRIBUTE = (
    "score 'attribute' keeps tokens by what a token classifier says of them, and no token of these micro-batches has an"
    " attribute (all are NaN), so nothing would ever be kept; read a topic that a token classifier has scored, with"
    " ScoredStream(..., needs_attribute=True), or choose another score"
)
NAMES = ("loss", "reference_loss", "entropy", "history_loss", "reference_entropy", "attribute")


def select(
    signals: Signals | Sequence[Signals], selection: Selection, *, step: int = 1, micro_batch: int = 0
) -> list[NDArray[np.bool_]]:
    """Chooses tokens of micro-batches, as the Rust trainer does: it is the same function.

    With scope "batch" give all micro-batches of the step at once. With scope "running-quantile" call `selection.end_step`
    when the step is done.

    Args:
        signals: for each micro-batch (or for the only one) arrays `[rows, length]` in nats by name: `loss` (of the model in
            training), `reference_loss`, and what the score needs of `entropy`, `history_loss`, `reference_entropy` and
            `attribute` (in its own unit). NaN where there is none; a token without a loss or without what the score needs is
            never kept.
        selection: how tokens are chosen.
        step: the step of the run, from 1, which schedules and draws depend on.
        micro_batch: number within the step of the first micro-batch given.

    Returns:
        For each micro-batch a bool array `[rows, length]`: True where a token is kept.

    Raises:
        ConfigurationError: arrays do not fit one another, or are not those that the score needs; the score is "attribute"
            and no token with a loss has one.
    """
    batches = [signals] if isinstance(signals, Mapping) else list(signals)
    if not batches:
        return []
    shapes = [np.shape(batch["loss"]) if "loss" in batch else () for batch in batches]
    if any(len(shape) != 2 for shape in shapes) or len({shape[-1] for shape in shapes}) != 1:
        raise ConfigurationError("loss must be an array [rows, length] in each micro-batch, of one length in all of them")
    for shape, batch in zip(shapes, batches):
        for name in NAMES:
            if name in batch and np.shape(batch[name]) != shape:
                raise ConfigurationError(f"{name} is {np.shape(batch[name])}, and loss {shape}: give a value for each token")
    flat = [
        {name: np.ascontiguousarray(batch[name], dtype=np.float32).reshape(-1) for name in NAMES if name in batch}
        for batch in batches
    ]
    if selection.score == "attribute" and all("attribute" in batch for batch in flat):
        has_loss = [~np.isnan(batch["loss"]) for batch in flat]
        can_be_kept = [own & ~np.isnan(batch["attribute"]) for own, batch in zip(has_loss, flat)]
        if any(own.any() for own in has_loss) and not any(own.any() for own in can_be_kept):
            raise ConfigurationError(NO_ATTRIBUTE)
    masks = selection.select(flat, shapes[0][1], step, micro_batch)
    return [mask.reshape(shape) for mask, shape in zip(masks, shapes)]
