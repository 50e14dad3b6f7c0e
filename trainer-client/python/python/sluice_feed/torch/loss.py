"""The loss of the tokens that are worth learning from (Rho-1, arXiv 2404.07965, equation 4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, Union, overload

import torch
from torch import Tensor

from sluice_feed._core import ConfigurationError, Selection
from sluice_feed.torch.distributed import Ranks
from sluice_feed.torch.head import HALF, Logits, Rows, SumOfRows, row_losses
from sluice_feed.torch.selection import select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: A count of tokens.
Count = Union[int, float, Tensor]


class SelectiveLoss(NamedTuple):
    """A loss and what was chosen. A tuple, because FSDP2 and DDP look for tensors in those.

    Attributes:
        loss: What to call ``backward()`` on: scalar, in nats. Its mean over the ranks is the mean loss of all kept
            tokens.
        kept: The tokens learnt from: bool, shape of the labels.
        kept_count: Tokens kept by all ranks in this call: scalar, int64.
        token_losses: Loss of each token in nats, shape of the labels, without gradient: float32, or float64 for hidden
            states in float64. NaN where there is no label, and where a given mask made it unnecessary.
        lost_count: Labelled tokens of this rank (of a given mask, if there is one) whose loss is not a number: scalar,
            int64. They cannot be chosen, so a model that has broken down shows here where its loss may not show it.
    """

    loss: Tensor
    kept: Tensor
    kept_count: Tensor
    token_losses: Tensor
    lost_count: Tensor


@overload
def token_losses(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    ignore_index: int = ...,
    block_logits: int | None = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def token_losses(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    logit_softcap: float | None = ...,
    ignore_index: int = ...,
    block_logits: int | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def token_losses(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    block_logits: int | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of every token in nats, without gradient; with ``return_entropy`` also the entropy of each prediction.

    Logits are made in blocks and forgotten. See :func:`selective_loss` for the arguments.

    Returns:
        Tensors of the shape of ``labels``, float32 (float64 for hidden states in float64), NaN where there is no label.

    Raises:
        ConfigurationError: Shapes, types or devices do not fit, or the weight is sharded.
    """
    logits = Logits(logit_scale, logit_softcap, block_logits)
    flat, flat_labels = _checked(hidden, head_weight, bias, labels)
    rows = _rows(flat_labels != ignore_index, flat_labels, head_weight)
    losses, _, entropies = row_losses(
        flat, head_weight, bias, flat_labels, rows=rows, logits=logits, with_entropy=return_entropy
    )
    spread = _spread(losses, rows, labels)
    return (spread, _spread(entropies, rows, labels)) if return_entropy else spread


def selective_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    reference_loss: Tensor | None = None,
    *,
    selection: Selection | None = None,
    keep: float | str | None = None,
    step: int = 1,
    reference_entropy: Tensor | None = None,
    history_loss: Tensor | None = None,
    attribute: Tensor | None = None,
    kept: Tensor | None = None,
    divisor: Count | None = None,
    number: int | None = None,
    row_len: int | None = None,
    group: ProcessGroup | None = None,
    averaged_over: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    block_logits: int | None = None,
) -> SelectiveLoss:
    """The mean loss of the tokens of a micro-batch that are worth learning from, to call ``backward()`` on.

    The head is run for every label without a graph, and tokens are chosen; then it is run again, in the backward pass,
    for the kept ones alone. Logits are in memory a few blocks at a time. A label of the position ``i`` is the token
    that position ``i`` predicts: labels are already shifted.

    This is a collective: every rank of ``group`` calls it, also one whose micro-batch has no label. Its loss is then 0,
    and its gradients are zeros, as they are where no rank keeps a token.

    The loss is ``sum of this rank's kept losses * averaged_over / all ranks' kept tokens``: DDP and FSDP average
    gradients over ranks, and the average of these is the gradient of the mean over all kept tokens.

    With gradient accumulation and scope ``batch`` all micro-batches of a step compete, so they are chosen from first::

        with torch.no_grad():
            losses = [token_losses(hidden(m), head_weight, m.labels) for m in micro_batches]
        signals = [{"loss": own, "reference_loss": m.reference_loss} for own, m in zip(losses, micro_batches)]
        kept = select(signals, selection, row_len=..., step=step)
        divisor = all_reduce(sum(mask.sum() for mask in kept))
        for m, mask in zip(micro_batches, kept):
            selective_loss(hidden(m), head_weight, m.labels, kept=mask, divisor=divisor).loss.backward()

    Args:
        hidden: Last hidden states, ``[..., width]``, in bfloat16, float16, float32 or float64. Under autocast they are
            cast as the head's input would be.
        head_weight: ``[vocabulary, width]``; of a tied head the embedding's. Whole: see :class:`SelectiveModel` for
            FSDP2.
        labels: ``[...]``, int64; ``ignore_index`` where nothing is predicted.
        reference_loss: The reference model's loss in nats, shape of the labels, NaN where there is none.
        selection: A ``sluice_feed.Selection``.
        keep: In the place of ``selection``: the share to keep by excess loss, of all ranks' tokens, such as 0.6. A
            schedule needs to know the run's steps: give a ``selection`` for it.
        step: Step of the run, from 1.
        reference_entropy: Entropy of the reference's prediction, for the scores that ask for it.
        history_loss: Loss of an earlier state of the model, for score ``improvement``.
        attribute: What a token classifier says of each label, for score ``attribute``; shape of the labels.
        kept: In the place of both: the tokens to learn from, decided before. Those without a label are left out.
        divisor: What to divide by, in the place of the tokens that all ranks keep in this call: those of the whole
            step, with gradient accumulation.
        number: The micro-batch's number among those of all ranks in this step; by default the rank. See :func:`select`.
        row_len: Length of a packed sequence, for scope ``sequence``; by default the last dimension of the labels.
        group: The ranks that share the step. ``None``: all of them if ``torch.distributed`` is initialised.
        averaged_over: Over how many ranks gradients are averaged; by default the group's size, and 1 where they are
            added up (torchtitan).
        bias: Of the head, ``[vocabulary]``.
        logit_scale: Factor of the logits.
        logit_softcap: ``c`` of ``c * tanh(logits / c)``, after the scale.
        ignore_index: The label of positions that predict nothing.
        block_logits: Logits of a block, of which three are in memory at a time, 4 bytes a logit. By default 2^22 on a
            CPU, and 2^24 elsewhere.

    Raises:
        ConfigurationError: Not one of ``selection``, ``keep`` and ``kept`` was given; shapes, types or devices do not
            fit; the weight is sharded; a signal is missing.
    """
    logits = Logits(logit_scale, logit_softcap, block_logits)
    if sum(given is not None for given in (selection, keep, kept)) != 1:
        raise ConfigurationError("give one of selection=, keep= and kept=: how to choose tokens, or which were chosen")
    flat, flat_labels = _checked(hidden, head_weight, bias, labels)
    ranks = Ranks(group)
    is_labelled = flat_labels != ignore_index
    if kept is None:
        chosen = _selection(selection, keep)
        rows = _rows(is_labelled, flat_labels, head_weight)
        with_entropy = chosen.score == "entropy"
        losses, log_sums, entropies = row_losses(
            flat, head_weight, bias, flat_labels, rows=rows, logits=logits, with_entropy=with_entropy
        )
        every_loss = _spread(losses, rows, labels)
        signals = {
            "loss": every_loss,
            "entropy": _spread(entropies, rows, labels) if with_entropy else None,
            "history_loss": history_loss,
            "reference_loss": reference_loss,
            "reference_entropy": reference_entropy,
            "attribute": attribute,
        }
        numbers = [ranks.rank if number is None else number]
        length = row_len or (labels.shape[-1] if labels.numel() > 0 else 1)
        (kept,) = select([signals], chosen, row_len=length, step=step, numbers=numbers, group=group)
        kept_rows = kept.reshape(-1)[rows]
        rows, losses, log_sums = rows[kept_rows], losses[kept_rows], log_sums[kept_rows]
    else:
        if kept.shape != labels.shape or kept.dtype != torch.bool:
            raise ConfigurationError(
                f"kept must be a bool for each label, {tuple(labels.shape)}, not {kept.dtype} {tuple(kept.shape)}"
            )
        kept = kept.to(labels.device) & is_labelled.view(labels.shape)
        rows = _rows(kept.reshape(-1), flat_labels, head_weight)
        losses, log_sums, _ = row_losses(flat, head_weight, bias, flat_labels, rows=rows, logits=logits)
        every_loss = _spread(losses, rows, labels)
        is_labelled = kept.reshape(-1)
    total: Tensor = SumOfRows.apply(flat, head_weight, bias, Rows(rows, flat_labels[rows], losses, log_sums, logits))
    loss, kept_count = _mean(total, len(rows), divisor, ranks, averaged_over)
    lost_count = (is_labelled & every_loss.reshape(-1).isnan()).sum()
    return SelectiveLoss(loss, kept, kept_count, every_loss, lost_count)


def masked_sum(losses: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Of losses that are already there, the sum of the kept ones, with its gradient, and their number (int64).

    For loops that divide by themselves, as Megatron's do with ``--calculate-per-token-loss``. Both tensors have one
    shape; what is not kept may be NaN.
    """
    if losses.shape != kept.shape:
        raise ConfigurationError(f"losses {tuple(losses.shape)} and kept {tuple(kept.shape)} must have one shape")
    is_kept = kept.bool()
    return losses.masked_fill(~is_kept, 0.0).sum(), is_kept.sum()


def masked_mean(
    losses: Tensor,
    kept: Tensor,
    *,
    divisor: Count | None = None,
    group: ProcessGroup | None = None,
    averaged_over: int | None = None,
) -> Tensor:
    """Of losses that are already there, in nats, the mean of the kept ones of all ranks.

    Each rank gets its part of it, as of :func:`selective_loss`. A collective over ``group``. 0 where no rank keeps a
    token.
    """
    total, count = masked_sum(losses, kept)
    return _mean(total, count, divisor, Ranks(group), averaged_over)[0]


def _mean(
    total: Tensor, count: int | Tensor, divisor: Count | None, ranks: Ranks, averaged_over: int | None
) -> tuple[Tensor, Tensor]:
    """A rank's part of the mean over all kept tokens, and how many they are."""
    if isinstance(divisor, (int, float)) and not 0 <= divisor < math.inf:
        raise ConfigurationError(f"divisor={divisor} is no number of tokens: give those that all ranks keep in the step")
    kept_count = ranks.sum(torch.as_tensor(count, dtype=torch.int64, device=total.device).clone())
    by = torch.as_tensor(kept_count if divisor is None else divisor, device=total.device).detach()
    # Nothing kept anywhere is a loss of 0 and not 0 / 0.
    factor = (ranks.size if averaged_over is None else averaged_over) / by.to(total.dtype).clamp(min=1.0)
    return total * factor, kept_count


def _selection(selection: Selection | None, keep: float | str | None) -> Selection:
    return Selection(keep=keep) if selection is None else selection


def _rows(mask: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Indices of the positions in ``mask``, whose labels are all tokens."""
    rows = mask.nonzero().view(-1)
    if len(rows) > 0:
        lowest, highest = (int(end) for end in torch.stack(labels[rows].aminmax()).tolist())
        if lowest < 0 or highest >= len(weight):
            raise ConfigurationError(
                f"labels go from {lowest} to {highest}, but the head has {len(weight)} tokens, numbered from 0; is the"
                " topic of another tokenizer than the model, or ignore_index another than the labels'?"
            )
    return rows


def _spread(values: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """``values`` at the positions ``rows`` of a tensor of the shape of ``like``, NaN elsewhere."""
    spread = torch.full((like.numel(),), torch.nan, dtype=values.dtype, device=values.device)
    return spread.index_copy_(0, rows, values).view(like.shape)


def _checked(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states as ``[positions, width]`` and labels as ``[positions]``, when all fits together."""
    for name, given in (("hidden", hidden), ("head_weight", weight), ("bias", bias), ("labels", labels)):
        if given is not None and hasattr(given, "placements"):
            raise ConfigurationError(
                f"{name} is a DTensor, sharded over ranks: the loss must be computed where FSDP2 has made the head"
                " whole, in the forward of the module that fully_shard was applied to and that has the head in its own"
                " group of parameters. sluice_feed.torch.SelectiveModel is such a module; do not apply fully_shard to"
                " its head as well"
            )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ConfigurationError(
            f"hidden {tuple(hidden.shape)} and head_weight {tuple(weight.shape)} do not fit: [..., width] and"
            " [vocabulary, width] are needed"
        )
    if hidden.shape[:-1] != labels.shape:
        raise ConfigurationError(
            f"labels {tuple(labels.shape)} must be one for each hidden state of {tuple(hidden.shape[:-1])}; they are"
            " already shifted, so none is missing at the end"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigurationError(f"bias {tuple(bias.shape)} must be one for each of the {weight.shape[0]} tokens")
    if hidden.dtype not in (*HALF, torch.float32, torch.float64):
        raise ConfigurationError(f"hidden is {hidden.dtype}; it must be bfloat16, float16, float32 or float64")
    if labels.dtype != torch.int64:
        raise ConfigurationError(f"labels are {labels.dtype}; they must be int64")
    device = hidden.device
    if weight.device != device or labels.device != device or (bias is not None and bias.device != device):
        raise ConfigurationError(
            f"hidden is on {device}, head_weight on {weight.device} and labels on {labels.device}; move them"
        )
    if torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    return hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
