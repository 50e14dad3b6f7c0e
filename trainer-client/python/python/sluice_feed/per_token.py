"""The kept tokens of a loop that has the loss of every token already: what Megatron and torchtitan have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sluice_feed._core import ConfigurationError, Selection
from sluice_feed.torch import masked_sum, select
from sluice_feed.torch.selection import Signals


class KeptSum(NamedTuple):
    """The kept tokens of one micro-batch.

    Attributes:
        total: sum of their losses, in nats, with its gradient: scalar.
        kept_count: how many they are: scalar, int64.
        kept: which they are: bool, shape of the losses.
    """

    total: Tensor
    kept_count: Tensor
    kept: Tensor


def kept_sum(
    losses: Tensor,
    is_labelled: Tensor,
    signals: Mapping[str, Tensor | None],
    selection: Selection,
    *,
    step: int,
    number: int | None = None,
    group: Any = None,
) -> KeptSum:
    """Chooses tokens of a micro-batch by losses that are already there, and adds them up.

    A collective over `group` where the scope is `batch`.

    Args:
        losses: of each token, in nats, `[rows, length]`, with their graph; float32 or wider.
        is_labelled: bool, the same shape: False where nothing is predicted, whatever `losses` holds there.
        signals: `reference_loss`, `reference_entropy`, `history_loss` and `entropy`, as far as the score needs them: nats,
            the same shape, NaN where there is none.
        selection: how tokens are chosen.
        step: of the run, from 1.
        number: which of the step's micro-batches it is, over all ranks; by default the rank.
        group: the data-parallel ranks; all by default.

    Raises:
        ConfigurationError: shapes do not fit, or a signal is missing.
    """
    if losses.dim() != 2 or is_labelled.shape != losses.shape:
        raise ConfigurationError(
            f"losses {tuple(losses.shape)} and labels {tuple(is_labelled.shape)} must both be [rows, length]"
        )
    seen = losses.detach().float().masked_fill(~is_labelled, torch.nan)
    given: Signals = {"loss": seen, **signals}
    numbers = None if number is None else [number]
    (kept,) = select([given], selection, row_len=losses.shape[1], step=step, numbers=numbers, group=group)
    total, count = masked_sum(losses, kept)
    return KeptSum(total, count, kept)


def multiply_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiplies every gradient that is there by a scalar, in place; of sharded ones each rank its own part."""
    for parameter in parameters:
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            gradient.mul_(factor)
