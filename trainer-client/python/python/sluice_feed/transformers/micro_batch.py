"""A micro-batch on its way through the Trainer to the model's forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sluice_feed._core import ConfigurationError, Selection

IGNORE_INDEX = -100
#: Signals that a selection may look at, beside the loss; nats (but the attribute), shape of the labels.
SIGNALS = ("reference_loss", "reference_entropy", "history_loss", "attribute")


class MicroBatch:
    """What a selective step needs of one micro-batch, in an object that nobody looks into.

    A plain object and neither a dictionary nor a dataclass: FSDP casts floating-point tensors that it finds in a forward's
    arguments to half precision, which would round reference losses to hundredths, and the Trainer's own code would take
    `labels` for labels that the model has to shift.

    Attributes:
        input_ids, labels, position_ids: int64, `[rows, length]`; labels are already shifted, -100 where nothing
            is predicted.
        signals: `reference_loss` and its friends, float32, nats, `[rows, length]`.
        cu_seqlens: boundaries of packed documents in row-major order, int32, or None.
        max_seqlen: tokens of the longest document, with `cu_seqlens`.
        number: which of the step's micro-batches it is, over all ranks, from 0; None for one that only fills up.
        step: step of the run, from 1, for schedules and draws.
        kept: tokens to learn from, where they were chosen before; bool, `[rows, length]`.
        divisor: what to divide by in the place of the tokens that are kept in this micro-batch.
        only_token_losses: asks the forward for the losses of all tokens, and nothing else.
    """

    def __init__(self, batch: Mapping[str, Any], *, number: int | None, step: int) -> None:
        _check(batch)
        self.input_ids: Tensor = batch["input_ids"]
        self.labels: Tensor = batch["labels"]
        self.position_ids: Tensor | None = batch.get("position_ids")
        self.signals: dict[str, Tensor] = {name: batch[name] for name in SIGNALS if batch.get(name) is not None}
        self.cu_seqlens: Tensor | None = batch.get("cu_seqlens")
        self.max_seqlen: int | None = batch.get("max_seqlen")
        self.number, self.step = number, step
        self.kept: Tensor | None = None
        self.divisor: Tensor | None = None
        self.only_token_losses = False
        self.selection: Selection | None = None
        self.group: Any = None

    def filler(self) -> MicroBatch:
        """One of the same shape that nothing is learnt from."""
        empty = {"input_ids": self.input_ids, "labels": torch.full_like(self.labels, IGNORE_INDEX)}
        if self.position_ids is not None:
            empty["position_ids"] = self.position_ids
        for name, signal in self.signals.items():
            empty[name] = torch.full_like(signal, torch.nan)
        return MicroBatch(empty, number=None, step=self.step)

    def to(self, device: torch.device) -> MicroBatch:
        """Itself, its tensors on `device`."""
        for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "kept"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device, non_blocking=True))
        self.signals = {name: value.to(device, non_blocking=True) for name, value in self.signals.items()}
        return self

    @property
    def labelled(self) -> Tensor:
        """How many tokens have a label: scalar, int64."""
        return (self.labels != IGNORE_INDEX).sum()

    def is_unshifted(self) -> bool:
        """Whether every label is the token at its own position, as models of transformers take them.

        Among shifted labels this needs documents that repeat a single token.
        """
        is_labelled = self.labels != IGNORE_INDEX
        tokens = self.input_ids[is_labelled]
        return bool((self.labels == self.input_ids)[is_labelled].all()) and bool((tokens != tokens[:1]).any())


def _check(batch: Mapping[str, Any]) -> None:
    missing = [name for name in ("input_ids", "labels") if not isinstance(batch.get(name), Tensor)]
    if missing:
        raise ConfigurationError(
            f"a micro-batch has no tensor {' and no tensor '.join(missing)}, only {sorted(batch)}; a data_collator or"
            " remove_unused_columns may have taken it away"
        )
    shape = batch["input_ids"].shape
    for name in ("labels", "position_ids", *SIGNALS):
        value = batch.get(name)
        if value is not None and value.shape != shape:
            raise ConfigurationError(
                f"{name} has the shape {tuple(value.shape)}, but input_ids has {tuple(shape)}; both hold one value for each"
                " position [rows, length]"
            )
