"""Selective language modeling (Rho-1, arXiv 2404.07965) for PyTorch and other trainers in Python.

`ScoredStream` gives the micro-batches of a topic that the daemon `sluiced` has scored, and `Selection` chooses which of
their tokens to learn from. Both are the code of Sluice's own trainer, in Rust. What needs PyTorch is in `sluice_feed.torch`.
"""

from __future__ import annotations

from sluice_feed._core import Batch, ConfigurationError, RankError, Selection, SluiceError, StateError, StreamError
from sluice_feed.group import Alone, Group
from sluice_feed.selection import select
from sluice_feed.stream import ScoredStream, merge_state_dicts

__all__ = [
    "Alone",
    "Batch",
    "ConfigurationError",
    "Group",
    "RankError",
    "ScoredStream",
    "Selection",
    "SluiceError",
    "StateError",
    "StreamError",
    "merge_state_dicts",
    "select",
]
