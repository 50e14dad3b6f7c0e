"""What ranks tell each other: sums, and lists that differ in length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sluice_feed._core import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """The processes that choose and normalise together, as this one of them sees them.

    ``group`` is a process group; ``None`` means all processes where ``torch.distributed`` is initialised, and this
    process alone where it is not. Every method is a collective: all ranks of the group call it, in the same order.

    Attributes:
        size: How many processes there are.
        rank: Which of them this one is, from 0.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.size, self.rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
            if self.rank < 0:
                raise ConfigurationError(
                    f"rank {dist.get_rank()} is not in the process group that it was given; give each rank a group"
                    " that it is a member of, such as its data-parallel group"
                )
        elif group is not None:
            raise ConfigurationError("a process group was given, but torch.distributed is not initialised in this process")

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks. The tensor that was given may be changed."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """``rows`` (``[own, k]``, integers) of all ranks, one rank's after the other's: ``[all, k]``.

        Ranks may have different numbers of rows, and none; those who have fewer are filled up with zeros.
        """
        if self.size == 1:
            return rows
        # The one place where the host waits: how long the lists are cannot be told without asking.
        most = torch.tensor([len(rows)], device=rows.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        filled = torch.zeros(int(most.item()), rows.shape[1], dtype=rows.dtype, device=rows.device)
        filled[: len(rows)] = rows
        lists = [torch.empty_like(filled) for _ in range(self.size)]
        dist.all_gather(lists, filled, group=self.group)
        return torch.cat(lists)

    def device(self) -> torch.device:
        """A device that the group's backend takes tensors on, for a rank that has no tensor to go by."""
        if self.size > 1 and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
