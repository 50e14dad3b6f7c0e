"""A scored topic as PyTorch tensors, for DataLoaders, checkpoints and process groups of torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

import sluice_feed
from sluice_feed import Batch, ConfigurationError, merge_state_dicts

_ARRAYS = (
    "input_ids",
    "labels",
    "position_ids",
    "segment_ids",
    "cu_seqlens",
    "reference_loss",
    "reference_entropy",
    "attribute",
)
_REST = ("max_seqlen", "document_ids", "sources", "document_starts", "step", "number", "lane", "digest")


def tensors(batch: Batch) -> dict[str, Any]:
    """A micro-batch as tensors on the CPU that share its memory, by the names of `Batch`; the rest stays as it is."""
    arrays = {name: torch.from_numpy(getattr(batch, name)) for name in _ARRAYS}
    return {**arrays, **{name: getattr(batch, name) for name in _REST}}


class ScoredStream(sluice_feed.ScoredStream, IterableDataset[dict[str, Any]]):
    """`sluice_feed.ScoredStream` as an IterableDataset whose micro-batches are dictionaries of tensors (`tensors`).

    In a DataLoader, or torchdata's StatefulDataLoader, give batch_size=None and num_workers=0. Its states are kept by
    torch.save, and by a distributed checkpoint (`dcp.save({"data": stream})`), which any number of ranks can load.
    """

    def steps(self) -> Any:
        """For each step the micro-batches of this rank as dictionaries of tensors."""
        if get_worker_info() is not None:
            raise ConfigurationError(
                "a DataLoader reads the stream in a worker process, where ranks cannot agree on steps: give num_workers=0"
                " (a thread of the stream's own reads ahead)"
            )
        return super().steps()

    def full_state_dict(self) -> dict[str, Any]:
        """The state of all ranks, on every rank, from which any number of ranks can go on. All ranks call it together."""
        own = self.state_dict()
        if self.world_size == 1:
            return own
        group = self._group
        if not isinstance(group, ProcessGroup):
            raise ConfigurationError("the ranks agree by a group of your own: gather their state_dict() by it, and merge")
        return merge_state_dicts(group.gather(own))

    def _convert(self, batch: Batch) -> dict[str, Any]:
        return tensors(batch)


class ProcessGroup:
    """Agreement of ranks over a process group of torch.distributed (all-reduce with MIN, before each step).

    A group on the CPU (gloo) does not wait for what the GPU still computes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._device = (
            torch.device("cpu") if _has_cpu(group) else torch.accelerator.current_accelerator(check_available=True)
        )

    @classmethod
    def of_all(cls) -> ProcessGroup:
        """All ranks. Where their backend has no collectives on the CPU, a gloo group is made, by all ranks together."""
        if _has_cpu(None):
            return cls()
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup), "every rank is in the group of all"
        return cls(group)

    def minimum(self, values: list[int]) -> list[int]:
        """The smallest that any rank gives in each place."""
        smallest = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.group)
        return [int(value) for value in smallest.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, in their order; pickled."""
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def _has_cpu(group: dist.ProcessGroup | None) -> bool:
    devices = dist.get_backend_config(group)
    return "cpu" in str(devices)
