"""One step of the optimizer: its micro-batches, and what its loss is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sluice_feed._core import Selection
from sluice_feed.per_token import multiply_gradients
from sluice_feed.torch import SelectiveLoss
from sluice_feed.torch.distributed import Ranks
from sluice_feed.torch.selection import TWO_RANKINGS, Signals, select
from sluice_feed.transformers.forward import ARGUMENT
from sluice_feed.transformers.micro_batch import MicroBatch


class SelectiveStep:
    """How the kept tokens of a step come to be its divisor, in one of three ways.

    * One micro-batch: its forward chooses, and divides by what all ranks have kept.
    * Several, and all their tokens compete: they are run once without gradients, chosen from, and run again.
    * Several, and each decides by itself: what they keep is known after the last. Losses are divided by the labelled tokens
      of all ranks, so that gradients have their usual size, and gradients are multiplied when all is known.
    """

    def __init__(self, batches: Sequence[MicroBatch], selection: Selection, ranks: Ranks, labelled: Tensor) -> None:
        self.batches = batches
        self.selection = selection
        self.ranks = ranks
        self.labelled = labelled
        self.is_corrected = False
        # Sums over this rank's micro-batches, and over all ranks'.
        self.loss: Tensor | None = None
        self.kept: Tensor | None = None
        for batch in batches:
            batch.selection, batch.group = selection, ranks.group

    def prepare(self, model: nn.Module) -> None:
        """Chooses the tokens of several micro-batches. All ranks call it together."""
        if len(self.batches) == 1:
            return
        if self._tokens_compete():
            self._choose(model)
        else:
            self.is_corrected = True
            for batch in self.batches:
                batch.divisor = self.labelled

    def _tokens_compete(self) -> bool:
        """Whether what one micro-batch keeps depends on the others."""
        keep = self.selection.keep_at(self.batches[0].step)
        if keep is None:
            decides_alone = self.selection.threshold is not None
        else:
            decides_alone = keep >= 1.0 and self.selection.score not in TWO_RANKINGS
        return self.selection.scope == "batch" and not decides_alone

    def add(self, output: SelectiveLoss) -> None:
        """Counts what a forward has kept."""
        kept = output.kept_count
        self.kept = kept if self.kept is None else self.kept + kept

    def corrected(self, loss: Tensor, is_last: bool, model: nn.Module) -> Tensor:
        """The loss to report after a backward pass; after the last of the step gradients are corrected.

        The reports of a step add up to its loss, whose mean over the ranks is the mean over all kept tokens.
        """
        if not self.is_corrected:
            return loss
        self.loss = loss if self.loss is None else self.loss + loss
        if not is_last:
            return torch.zeros_like(loss)
        assert self.kept is not None
        factor = self.labelled.clamp(min=1).to(loss.dtype) / self.kept.clamp(min=1)
        multiply_gradients(model.parameters(), factor)
        return self.loss * factor

    @torch.no_grad()
    def _choose(self, model: nn.Module) -> None:
        signals: list[Signals] = []
        for batch in self.batches:
            batch.only_token_losses = True
            losses, *entropies = model(**{ARGUMENT: batch})
            batch.only_token_losses = False
            own: dict[str, Tensor | None] = {"loss": losses, **batch.signals}
            signals.append({**own, "entropy": entropies[0]} if entropies else own)
        first = self.batches[0]
        masks = select(
            signals,
            self.selection,
            row_len=first.labels.shape[1],
            step=first.step,
            numbers=[batch.number for batch in self.batches],
            group=self.ranks.group,
        )
        counts: Any = sum(mask.sum() for mask in masks)
        divisor = self.ranks.sum(counts)
        for batch, mask in zip(self.batches, masks):
            batch.kept, batch.divisor = mask, divisor
