"""The head of a language model in blocks: losses of all rows, gradients of some, and never a tensor of all logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sluice_feed._core import ConfigurationError

#: Logits of a block on a CPU, unless told otherwise: 4 MiB in float32, which caches hold.
CPU_BLOCK = 1 << 20
#: Logits of a block elsewhere: 64 MiB in float32, so that products fill a GPU.
GPU_BLOCK = 1 << 24
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Logits:
    """How logits are made of hidden states: ``hidden @ weight.T``, then the bias, the scale, and the soft-cap."""

    #: Factor of the logits (Cohere's ``logit_scale``; Granite divides by its ``logits_scaling``).
    scale: float = 1.0
    #: ``c`` of ``c * tanh(logits / c)`` (Gemma 2's ``final_logit_softcapping``, arXiv 2408.00118, section 2).
    softcap: float | None = None
    #: Logits of a block, three of which are held at a time; ``None`` for what suits the device.
    block: int | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0.0:
            raise ConfigurationError(f"logit_softcap must be above 0, not {self.softcap}; leave it out for no soft-cap")
        if self.block is not None and self.block < 1:
            raise ConfigurationError(f"block_logits must be at least 1, not {self.block}")

    def block_of(self, rows: Tensor) -> tuple[int, int]:
        """Rows and columns of a block: a square, as products are fastest, or wider where there are fewer rows."""
        block = self.block or (CPU_BLOCK if rows.device.type == "cpu" else GPU_BLOCK)
        height = max(1, min(len(rows), math.isqrt(block)))
        return height, max(1, block // height)

    def of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[rows, columns]``, in float32, or in float64 for operands in float64."""
        logits = _product(hidden, weight.t())
        if bias is not None:
            logits += bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the product from that of the logits, in its place."""
        if self.softcap is not None:
            # The slope of c * tanh(x / c) is 1 - tanh(x / c)^2.
            gradient *= 1.0 - (logits / self.softcap).square_()
        if self.scale != 1.0:
            gradient *= self.scale
        return gradient


def wide_dtype(hidden: Tensor) -> torch.dtype:
    """What sums and losses are computed in: float32, or float64 for hidden states in float64."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _operand_dtype(hidden: Tensor) -> torch.dtype:
    """What products take: half precision where the device adds it up in float32, else the wide type."""
    return hidden.dtype if hidden.dtype in HALF and hidden.device.type == "cuda" else wide_dtype(hidden)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``; float32 where both are in half precision."""
    # Types are settled here; autocast would round them again.
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype not in HALF:
            return left @ right
        if hasattr(torch.ops.aten.mm, "dtype"):
            return torch.mm(left, right, out_dtype=torch.float32)
        # Before PyTorch 2.8 the product itself is rounded to half precision.
        return (left @ right).float()


def _columns(
    weight: Tensor, bias: Tensor | None, width: int, operand: torch.dtype, wide: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Weight and bias of ``width`` tokens of the vocabulary after the other, with the first one's number."""
    for left in range(0, len(weight), width):
        columns = slice(left, left + width)
        yield left, weight[columns].to(operand), None if bias is None else bias[columns].to(wide)


def _inside(labels: Tensor, left: int, width: int) -> tuple[Tensor, Tensor]:
    """The labels' columns in a block that begins at ``left``, ``[k, 1]``, and whether they are in it at all."""
    column = labels[:, None] - left
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


@torch.no_grad()
def row_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    rows: Tensor,
    logits: Logits,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``rows`` (``[k]``, indices) their losses, the logarithms of their sums of exponentials, and their entropies.

    Each is ``[k]``, in nats, in the wide type; entropies are empty unless asked for. ``hidden`` is
    ``[positions, width]``, ``weight`` ``[vocabulary, width]``, ``labels`` ``[positions]``, and every label of ``rows``
    is a token.
    """
    wide, operand = wide_dtype(hidden), _operand_dtype(hidden)
    losses = torch.empty(len(rows), dtype=wide, device=hidden.device)
    log_sums = torch.empty_like(losses)
    entropies = torch.empty_like(losses) if with_entropy else losses.new_empty(0)
    height, width = logits.block_of(rows)
    for top in range(0, len(rows), height):
        block = slice(top, top + height)
        states, targets = hidden[rows[block]].to(operand), labels[rows[block]]
        of_label = torch.zeros(len(states), dtype=wide, device=hidden.device)
        sums, within = [], []
        for left, part, part_bias in _columns(weight, bias, width, operand, wide):
            values = logits.of(states, part, part_bias)
            column, is_inside = _inside(targets, left, len(part))
            of_label += values.gather(1, column).masked_fill_(~is_inside, 0.0).view(-1)
            sums.append(values.logsumexp(dim=1))
            if with_entropy:
                probabilities = values.sub_(sums[-1][:, None]).exp_()
                within.append(torch.special.entr(probabilities).sum(dim=1))
        of_columns = torch.stack(sums, dim=1)
        log_sums[block] = of_columns.logsumexp(dim=1)
        losses[block] = log_sums[block] - of_label
        if with_entropy:
            # The entropy of what block of columns it is, and the mean of the entropies within the blocks.
            shares = (of_columns - log_sums[block, None]).exp()
            entropies[block] = (torch.special.entr(shares) + shares * torch.stack(within, dim=1)).sum(dim=1)
    return losses, log_sums, entropies


class Rows(NamedTuple):
    """Rows to learn from, by index, with their labels and what :func:`row_losses` said of them; each ``[k]``."""

    indices: Tensor
    labels: Tensor
    losses: Tensor
    log_sums: Tensor
    logits: Logits


class Gradients(NamedTuple):
    """What a backward pass fills in; ``None`` where nobody asks."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class SumOfRows(torch.autograd.Function):
    """The sum of the losses of some rows, already known, and its gradients, for which their logits are made again.

    Takes hidden states, weight, bias and :class:`Rows`. A sum over no rows is 0, with gradients of 0.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, rows.indices, rows.labels, rows.losses, rows.log_sums)
        ctx.logits = rows.logits
        return rows.losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, indices, labels, losses, log_sums = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gradients = Gradients(
            torch.zeros_like(hidden) if needs_hidden else None,
            torch.zeros_like(weight) if needs_weight else None,
            torch.zeros_like(bias) if needs_bias else None,
        )
        rows = Rows(indices, labels, losses, log_sums, ctx.logits)
        if len(indices) > 0:
            _backward(hidden, weight, bias, rows, into=gradients, upstream=upstream)
        return (*gradients, None)


def _backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, *, into: Gradients, upstream: Tensor) -> None:
    """Fills gradients: columns of the vocabulary one block after the other, so that those of the weight are whole.

    The gradient of a loss by its logits is the softmax less one at the label.
    """
    wide, operand = wide_dtype(hidden), _operand_dtype(hidden)
    kept = hidden[rows.indices].to(operand)
    of_kept = torch.zeros(kept.shape, dtype=wide, device=kept.device)
    # Half precision could lose gradients that are scaled down before they are added up, so `upstream` comes last.
    upstream = upstream.to(wide)
    height, width = rows.logits.block_of(rows.indices)
    for left, part, part_bias in _columns(weight, bias, width, operand, wide):
        columns = slice(left, left + width)
        of_part = torch.zeros(part.shape, dtype=wide, device=kept.device)
        of_part_bias = torch.zeros(len(part), dtype=wide, device=kept.device)
        for top in range(0, len(kept), height):
            block = slice(top, top + height)
            values = rows.logits.of(kept[block], part, part_bias)
            gradient = (values - rows.log_sums[block, None]).exp_()
            column, is_inside = _inside(rows.labels[block], left, len(part))
            gradient.scatter_add_(1, column, -is_inside.to(wide))
            gradient = rows.logits.backward_(gradient, values)
            if into.bias is not None:
                of_part_bias += gradient.sum(dim=0)
            gradient = gradient.to(operand)
            if into.weight is not None:
                of_part += _product(gradient.t(), kept[block])
            if into.hidden is not None:
                of_kept[block] += _product(gradient, part)
        if into.weight is not None:
            into.weight[columns] = of_part.mul_(upstream)
        if into.bias is not None:
            into.bias[columns] = of_part_bias.mul_(upstream)
    if into.hidden is not None:
        into.hidden.index_copy_(0, rows.indices, of_kept.mul_(upstream).to(hidden.dtype))
