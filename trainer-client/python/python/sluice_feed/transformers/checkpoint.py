"""The stream's state in a checkpoint of the Trainer: a file for each rank, from which any number of ranks can go on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sluice_feed import merge_state_dicts
from sluice_feed._core import StateError

FORMAT = 1
NAME = "sluice_feed_state_{rank}_of_{world_size}.pt"
_NAME = re.compile(r"sluice_feed_state_(\d+)_of_(\d+)\.pt")


def save_state(folder: Path, state: Mapping[str, Any], *, step: int, rank: int, world_size: int) -> None:
    """Writes the state of one rank. A file is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        # An earlier run, on another number of ranks, may have been killed at this very step.
        for path, (_, of) in _files(folder).items():
            if of != world_size:
                path.unlink(missing_ok=True)
    path = folder / NAME.format(rank=rank, world_size=world_size)
    unfinished = path.with_suffix(".unfinished")
    torch.save({"format": FORMAT, "step": step, "state": dict(state)}, unfinished)
    unfinished.replace(path)


def load_state(folder: Path, *, step: int, rank: int, world_size: int) -> dict[str, Any]:
    """The state for a rank of a run that goes on, perhaps on another number of ranks.

    Raises:
        StateError: there is none, or not one of every rank that wrote it, or they are of several steps.
    """
    files = _files(folder)
    writers = {of for _, of in files.values()}
    if not files:
        raise StateError(
            f"{folder} holds no state of the stream ({NAME}): it was not written by a SelectiveTrainer, or with"
            " save_only_model=True. Going on from it would read the topic from its beginning; if that is wanted, load the"
            " model from it, and train without resume_from_checkpoint"
        )
    if len(writers) > 1:
        raise StateError(f"{folder} holds states of runs on {sorted(writers)} ranks: go on from an earlier checkpoint")
    (of,) = writers
    own = folder / NAME.format(rank=rank, world_size=world_size)
    if len(files) == of:
        states = [_read(path, step) for path in sorted(files)]
        if all("lanes" in state for state in states):
            return merge_state_dicts(states)
    # Where each node has a disk of its own, a rank finds the states of its node alone, and needs no other.
    if own in files:
        return _read(own, step)
    if len(files) == of:
        raise StateError(
            f"{folder} was written by {of} ranks and there are {world_size} now, but the dataset's state has no lanes that"
            f" could be dealt out anew, as a ScoredStream's has: go on on {of} ranks"
        )
    missing = sorted(set(range(of)) - {rank for rank, _ in files.values()})
    raise StateError(
        f"{folder} lacks the states of ranks {missing} of {of}: it was not finished, or they are on disks of other nodes. Go"
        " on from an earlier checkpoint, or bring the files together"
    )


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Of each file of a rank that rank, and how many there were."""
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.iterdir()) if folder.is_dir() else ()
    return {path: (int(match[1]), int(match[2])) for path, match in found if match is not None}


def _read(path: Path, step: int) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if content.get("format") != FORMAT:
        raise StateError(f"{path} is of format {content.get('format')}, and this version reads format {FORMAT}")
    if content["step"] != step:
        raise StateError(f"{path} is of step {content['step']}, and its checkpoint of step {step}: go on from another one")
    state: dict[str, Any] = content["state"]
    return state
