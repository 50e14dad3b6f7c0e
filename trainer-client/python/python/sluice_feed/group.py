"""How the ranks of a group reach agreements."""

from __future__ import annotations

import os
import sys
from typing import Any, Protocol

from sluice_feed._core import ConfigurationError


class Group(Protocol):
    """Ranks that take steps together. `sluice_feed.torch.ProcessGroup` is one over torch.distributed."""

    def minimum(self, values: list[int]) -> list[int]:
        """The smallest that any rank gives in each place, numbers of 64 bits with a sign.

        Every rank calls it as often as the others, with as many values.
        """
        ...  # pragma: no cover


class Alone:
    """A group of one."""

    def minimum(self, values: list[int]) -> list[int]:
        """The values themselves."""
        return values


def all_equal(group: Group, values: list[int]) -> bool:
    """Whether all ranks give the same values."""
    # Turned over, the smallest is the largest.
    own = values + [~value for value in values]
    return group.minimum(own) == own


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """What is given; else that of torch.distributed, if it is initialized; else RANK and WORLD_SIZE; else one rank alone."""
    if (rank is None) != (world_size is None):
        raise ConfigurationError("give rank and world_size, or neither of them")
    if rank is not None and world_size is not None:
        return rank, world_size
    distributed = _distributed()
    if distributed is not None:
        return distributed.get_rank(), distributed.get_world_size()
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def default_group(world_size: int) -> Group:
    """The group of torch.distributed for several ranks."""
    if world_size == 1:
        return Alone()
    if _distributed() is None:
        raise ConfigurationError(
            f"{world_size} ranks must agree before each step: call torch.distributed.init_process_group before the stream"
            " is read, or give it a group"
        )
    from sluice_feed.torch import ProcessGroup

    return ProcessGroup.of_all()


def _distributed() -> Any:
    """The module torch.distributed, if it is initialized; torch is not imported for it."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    is_ready = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if is_ready else None


def _number(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"the environment's {name}={text!r} is not a number") from None
