"""`ScoredStream` on several ranks, which are threads here."""

from __future__ import annotations

import threading
import time
from itertools import islice
from typing import Any

import pytest
from conftest import Make
from sluice_feed import RankError, ScoredStream, StateError, merge_state_dicts
from stream_support import PATIENCE_S, Threads, digests, run_all


def test_two_ranks_as_threads_give_what_one_gives_and_one_goes_on_from_them(make: Make, wanted: list[str]) -> None:
    """Ranks with a group of the user's own: here threads and a barrier."""
    group = Threads(2)
    streams = [make(rank=rank, world_size=2, group=group.member(rank)) for rank in range(2)]
    found: dict[tuple[int, int], str] = {}
    states: list[dict[str, Any]] = [{}, {}]

    sizes: list[list[int]] = [[], []]

    def read(rank: int) -> None:
        for batches in islice(streams[rank].steps(), 5):
            sizes[rank].append(len(batches))
            found.update({(batch.step, batch.number): batch.digest for batch in batches if batch.number is not None})
        states[rank] = streams[rank].state_dict()

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [found[place] for place in sorted(found)] == wanted[:40]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 5, "no rank has one more in any step"

    whole = make()
    whole.load_state_dict(merge_state_dicts(states))
    assert digests(whole) == wanted[40:]
    with pytest.raises(StateError, match="two states hold lane 0"):
        merge_state_dicts([states[0], states[0]])
    alone = make()
    alone.load_state_dict(states[0])
    with pytest.raises(StateError, match="lane 1 is held by 0 parts"):
        next(iter(alone))


def test_a_stop_on_one_rank_stops_all_before_the_same_step(make: Make) -> None:
    group = Threads(2)
    streams = [make(rank=rank, world_size=2, group=group.member(rank)) for rank in range(2)]
    steps: list[list[int]] = [[], []]

    def read(rank: int) -> None:
        for batches in streams[rank].steps():
            steps[rank].append(batches[0].step)
            if rank == 0 and len(steps[0]) == 3:
                streams[0].stop()

    run_all([lambda rank=rank: read(rank) for rank in range(2)])
    assert steps == [[1, 2, 3], [1, 2, 3]]


def test_a_rank_that_waits_for_documents_hears_that_another_has_stopped(make: Make) -> None:
    """The topic is followed beyond its end: every rank waits, and only one is asked to stop."""
    group = Threads(2)
    streams = [make(rank=rank, world_size=2, group=group.member(rank), epochs=None) for rank in range(2)]
    given = [0, 0]

    def read(rank: int) -> None:
        for _ in streams[rank].steps():
            given[rank] += 1

    def stop() -> None:
        # A partition is empty, so ranks wait before the first step.
        while not streams[0].metrics():
            time.sleep(0.1)
        time.sleep(2)
        # What is known of a stream is to be had while it waits.
        assert streams[0].metrics()["steps_total"] == given[0] == 0
        streams[0].stop()

    run_all([lambda: read(0), lambda: read(1), stop])
    assert given == [0, 0]


def test_two_streams_of_one_rank_are_refused(make: Make) -> None:
    group = Threads(2)
    streams = [make(rank=0, world_size=2, group=group.member(member)) for member in range(2)]
    refused: list[str] = []

    def read(stream: ScoredStream) -> None:
        try:
            next(iter(stream))
        except RankError as error:
            refused.append(str(error))

    run_all([lambda stream=stream: read(stream) for stream in streams])
    assert len(refused) == 2 and all("no stream has rank 1 of 2" in message for message in refused)
