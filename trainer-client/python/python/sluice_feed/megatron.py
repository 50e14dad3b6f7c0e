"""Selective language modeling in Megatron-LM's `loss_func`.

Megatron's models give the loss of every token, unreduced, to `loss_func(loss_mask, output_tensor)`; a selective step is
another mask. With `--calculate-per-token-loss` Megatron adds up losses and counts over all micro-batches and data-parallel
ranks, and divides gradients by the count at the end: so losses are the mean over the kept tokens, whatever each kept.

    from functools import partial
    from sluice_feed import Selection
    from sluice_feed.megatron import inputs, selective_loss_func

    def forward_step(data_iterator, model):
        batch = inputs(next(data_iterator), device="cuda")
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, partial(
            selective_loss_func, batch["loss_mask"], batch["reference_loss"], selection=selection, step=step,
            tensor_parallel_group=parallel_state.get_tensor_model_parallel_group())

Every tensor- and pipeline-parallel rank of one data-parallel rank reads the SAME micro-batches: make the stream with
`rank=parallel_state.get_data_parallel_rank()` and `world_size=parallel_state.get_data_parallel_world_size()`. Ranks of the
first and last pipeline stage alone need one.

Nothing here imports Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sluice_feed._core import ConfigurationError, Selection
from sluice_feed.per_token import kept_sum

IGNORE_INDEX = -100


def inputs(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Tensor]:
    """A micro-batch of `ScoredStream` by Megatron's names, on a device.

    `tokens`, `labels` (shifted already, as Megatron's are; 0 where there is none), `loss_mask` (float32: 1 where there is a
    label), `position_ids`, `reference_loss` and `reference_entropy`, all `[rows, length]`; `cu_seqlens` (int32, for
    `PackedSeqParams` with `qkv_format="thd"`): Megatron keeps documents apart by those alone, not by position_ids.
    """
    is_labelled = batch["labels"] != IGNORE_INDEX
    given = {
        "tokens": batch["input_ids"],
        "labels": batch["labels"].masked_fill(~is_labelled, 0),
        "loss_mask": is_labelled.float(),
        "position_ids": batch["position_ids"],
        "reference_loss": batch["reference_loss"],
    }
    for name in ("reference_entropy", "cu_seqlens"):
        if batch.get(name) is not None:
            given[name] = batch[name]
    return {name: value.to(device, non_blocking=True) for name, value in given.items()}


def selective_loss_func(
    loss_mask: Tensor,
    reference_loss: Tensor,
    output_tensor: Tensor,
    *,
    selection: Selection,
    step: int,
    reference_entropy: Tensor | None = None,
    number: int | None = None,
    micro_batches: int = 1,
    data_parallel_group: Any = None,
    tensor_parallel_group: Any = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What Megatron's `loss_func` returns with `--calculate-per-token-loss`: of the kept tokens, and of no others.

    Args:
        loss_mask: 1 where there is a label, and 0 elsewhere: `[rows, length]`.
        reference_loss: in nats, the same shape, NaN where there is none; float32.
        output_tensor: the model's loss of each token, in nats, the same shape.
        selection: how tokens are chosen. Scopes `sequence` and `micro-batch` and thresholds need no other micro-batch;
            scope `batch` is for steps of one micro-batch a rank.
        step: of the run, from 1.
        reference_entropy: for the scores that look at it.
        number: which of the step's micro-batches it is, over all data-parallel ranks, where scope is `batch` or tokens
            are drawn; by default the rank in `data_parallel_group`.
        micro_batches: of a step, for one data-parallel rank (Megatron's `get_num_microbatches()`).
        data_parallel_group: ranks whose tokens compete where the scope is `batch`. Give it then: the default is all ranks.
        tensor_parallel_group: where there are several tensor-parallel ranks. They must keep the same tokens, so those of its
            first rank's losses are kept.

    Returns:
        The sum of the kept losses in nats, how many they are (int32), and `{"lm loss": [sum, count]}` for the log.

    Raises:
        ConfigurationError: scope `batch` over several micro-batches, which Megatron runs one after the other; a signal is
            missing, or shapes do not fit.
    """
    if selection.scope == "batch" and selection.threshold is None and micro_batches > 1:
        raise ConfigurationError(
            f"scope batch compares the tokens of all {micro_batches} micro-batches of a step, but Megatron runs them one"
            " after the other: choose scope micro-batch or sequence, or a threshold"
        )
    losses = output_tensor.view(loss_mask.shape).float()
    compared = losses.detach()
    if tensor_parallel_group is not None and dist.get_world_size(tensor_parallel_group) > 1:
        # Their losses come out of the same sums, but a last bit that differs would be a token that one of them lacks.
        compared = compared.clone()
        dist.broadcast(compared, dist.get_global_rank(tensor_parallel_group, 0), group=tensor_parallel_group)
    signals = {"reference_loss": reference_loss, "reference_entropy": reference_entropy}
    chosen = kept_sum(
        compared,
        loss_mask.bool(),
        signals,
        selection,
        step=step,
        number=number,
        group=data_parallel_group,
    )
    total = losses.masked_fill(~chosen.kept, 0.0).sum()
    count = chosen.kept_count.to(torch.int)
    report = torch.stack([total.detach(), count.to(total.dtype)])
    return total, count, {"lm loss": report}
