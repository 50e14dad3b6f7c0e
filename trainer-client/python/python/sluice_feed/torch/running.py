"""The scope ``running-quantile``: no token competes, and a threshold that moves once a step decides.

So each micro-batch is chosen from as soon as its losses are known, and no rank waits for another.
"""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sluice_feed._core import Selection
from sluice_feed.torch.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def running_choice(scores: Tensor, own: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """The mask of a micro-batch, and the lowest score that it would have kept by itself (infinite where there is none).

    Args:
        scores: ``[positions]``, higher first, NaN where a position cannot be chosen.
        own: Mask of the share of its own highest scores: what it keeps in the first step of a run.
        threshold: What earlier steps have taught.
    """
    lowest = torch.nn.functional.pad(scores.masked_fill(~own, math.inf), (0, 1), value=math.inf).min()
    return (own if threshold is None else scores >= threshold), lowest


def add_lowest(selection: Selection, by_ranking: list[list[Tensor]]) -> None:
    """Remembers, for the end of the step, what micro-batches teach: for each ranking the lowest score of each of them."""
    lists = [torch.stack(lowest).tolist() if lowest else [] for lowest in by_ranking]
    by_batch = zip_longest(*[[value if math.isfinite(value) else None for value in values] for values in lists])
    selection.add_lowest_scores([(values[0], values[1] if len(values) > 1 else None) for values in by_batch])


def end_step(selection: Selection, *, group: ProcessGroup | None = None) -> None:
    """Moves the running thresholds by what all micro-batches of the step have taught, on all ranks of ``group`` alike.

    To be called once a step by every rank, when its last micro-batch was chosen from. Other scopes need none. What a
    checkpoint must carry is ``selection.state_dict()``.
    """
    ranks = Ranks(group)
    lowest = selection.lowest_scores()
    if ranks.size > 1:
        gathered: list[list[tuple[float | None, float | None]]] = [[] for _ in range(ranks.size)]
        dist.all_gather_object(gathered, lowest, group=group)
        lowest = [scores for own in gathered for scores in own]
    selection.end_step(lowest)
