"""Selective Language Modeling in PyTorch: micro-batches, which tokens a step learns from, and the loss of those alone.

* :class:`ScoredStream`: a scored topic as micro-batches of tensors; :class:`ProcessGroup`: how its ranks agree.
* :func:`select`: the choice of tokens, on tensors on their device, equal, bit by bit, to ``sluice_feed.select``,
  over all micro-batches of a step and all ranks of a process group.
* :func:`selective_loss`: the loss of one micro-batch and its gradients, with no tensor of all logits.
* :func:`token_losses`: the loss of every token, for a choice over several micro-batches.
* :func:`masked_mean` and :func:`masked_sum`: for loops that have the loss of every token already.
* :class:`SelectiveModel`: a backbone and its head as one module, as DDP and FSDP2 need them.
"""

from __future__ import annotations

from sluice_feed.torch.loss import SelectiveLoss, masked_mean, masked_sum, selective_loss, token_losses
from sluice_feed.torch.model import SelectiveModel
from sluice_feed.torch.running import end_step
from sluice_feed.torch.selection import Signals, select
from sluice_feed.torch.stream import ProcessGroup, ScoredStream, tensors

__all__ = [
    "ProcessGroup",
    "ScoredStream",
    "SelectiveLoss",
    "SelectiveModel",
    "Signals",
    "end_step",
    "masked_mean",
    "masked_sum",
    "select",
    "selective_loss",
    "tensors",
    "token_losses",
]
