"""What the Trainer reads: steps of micro-batches that are ready, or rows that are still to be collated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sluice_feed._core import ConfigurationError
from sluice_feed.transformers.micro_batch import IGNORE_INDEX, SIGNALS

#: What stands where a row of a batch is shorter than its longest one.
PADDING = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0, "attention_mask": 0}
INTEGERS = tuple(PADDING)


def gives_steps(dataset: Any) -> bool:
    """Whether a dataset gives steps of ready micro-batches for this rank, as `sluice_feed.torch.ScoredStream` does.

    It has a method `steps()`, an iterator over lists of dictionaries of tensors (`sluice_feed.torch.tensors`). If it has
    `state_dict()` and `load_state_dict()` too, they belong to checkpoints.
    """
    return callable(getattr(dataset, "steps", None))


class StepLoader:
    """A train_dataloader whose items are steps: lists of micro-batches.

    accelerate does not wrap it. Its loaders fetch one batch ahead, so a state would stand after a batch that was not learnt
    from; and they deal batches out to ranks, although every rank has its own already.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[list[Mapping[str, Any]]]:
        return iter(self.dataset.steps())


def collate_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows of a dataset as one micro-batch, padded to the longest of them: `[rows, length]`.

    Args:
        rows: each a dictionary of lists or one-dimensional tensors of one length: `input_ids`, `labels` (already SHIFTED:
            `labels[i]` is the token that position `i` predicts, -100 none), `reference_loss` (nats; NaN or None where there
            is none), and what there may be of `position_ids`, `attention_mask`, `reference_entropy`, `history_loss` and
            `attribute`.

    Raises:
        ConfigurationError: rows do not have the same columns, or the columns of a row not the same length.
    """
    names = [name for name in (*INTEGERS, *SIGNALS) if name in rows[0]]
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    for index, row in enumerate(rows):
        if any(name not in row for name in names):
            raise ConfigurationError(f"row {index} of the batch lacks one of {names}, which row 0 has; it has {sorted(row)}")
        for name in names:
            columns[name].append(_as_tensor(row[name], name))
        lengths = {name: len(columns[name][-1]) for name in names}
        if len(set(lengths.values())) > 1:
            raise ConfigurationError(f"the columns of row {index} of the batch differ in length: {lengths}")
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=PADDING.get(name, float("nan")))
        for name, values in columns.items()
    }


def _as_tensor(values: Any, name: str) -> Tensor:
    dtype = torch.int64 if name in INTEGERS else torch.float32
    if isinstance(values, Tensor):
        return values.to(dtype)
    if name not in INTEGERS:
        values = [float("nan") if value is None else value for value in values]
    return torch.as_tensor(values, dtype=dtype)
