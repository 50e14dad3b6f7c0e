"""Selective language modeling in PyTorch."""

from __future__ import annotations

from sluice_feed.torch.stream import ProcessGroup, ScoredStream, tensors

__all__ = ["ProcessGroup", "ScoredStream", "tensors"]
