"""What was kept, between two lines of the log."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sluice_feed.torch import SelectiveLoss
from sluice_feed.torch.distributed import Ranks
from sluice_feed.transformers.micro_batch import MicroBatch


class Meter:
    """Sums over this rank's micro-batches, on their device, so that no step waits for them."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums: Tensor | None = None

    def add(self, batch: MicroBatch, output: SelectiveLoss) -> None:
        """Counts a micro-batch that was learnt from."""
        losses = output.token_losses
        # Where tokens were chosen before, the forward knows the losses of the kept ones alone.
        known = batch.kept is None
        own = torch.stack(
            [
                output.kept.sum().double(),
                batch.labelled.double(),
                losses.double().nansum() if known else losses.new_tensor(torch.nan).double(),
                output.lost_count.double(),
            ]
        )
        self._sums = own if self._sums is None else self._sums + own

    def take(self) -> dict[str, float]:
        """The log's values of all ranks since the last time. A collective; empty if nothing was added."""
        if self._sums is None:
            return {}
        kept, labelled, loss, lost = self._ranks.sum(self._sums).tolist()
        self._sums = None
        values = {"kept_share": kept / max(labelled, 1.0)}
        if not math.isnan(loss):
            values["all_tokens_loss"] = loss / max(labelled - lost, 1.0)
        if lost > 0:
            # Tokens whose loss is not a number are never kept: a model that has broken down would not show in the loss.
            values["lost_tokens"] = lost
        return values
