"""`ScoredStream` over a real Kafka: what it gives, keeps, refuses and survives."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Make
from sluice_feed import ConfigurationError, RankError, ScoredStream, StateError, StreamError, merge_state_dicts
from sluice_feed import torch as feed_torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

PATIENCE_S = 120


def digests(batches: Any) -> list[str]:
    return [batch.digest if hasattr(batch, "digest") else batch["digest"] for batch in batches]


@pytest.fixture(scope="module")
def wanted(settings: dict[str, Any]) -> list[str]:
    """Digests of all micro-batches of an uninterrupted run."""
    with ScoredStream(rank=0, world_size=1, **settings) as stream:
        return digests(stream)


def test_a_batch_is_arrays_that_belong_together(make: Make) -> None:
    seen: Counter[str] = Counter()
    for batch in make():
        rows, length = batch.input_ids.shape
        assert batch.labels.shape == batch.reference_loss.shape == batch.position_ids.shape == (rows, length)
        assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == np.int64
        assert batch.reference_loss.dtype == batch.reference_entropy.dtype == np.float32
        # Labels are shifted already: each is the token after its position.
        has_label = batch.labels[:, :-1] != -100
        assert (batch.labels[:, :-1][has_label] == batch.input_ids[:, 1:][has_label]).all()
        assert (batch.labels[:, -1] == -100).all(), "nothing follows the last token of a row"
        is_within = batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:]
        assert is_within[has_label].all(), "a label lies in its position's own document"
        assert np.isnan(batch.reference_loss[batch.labels == -100]).all()
        # Segments, told by positions that begin anew and by cu_seqlens, are the same.
        starts = np.flatnonzero(batch.position_ids.reshape(-1)[: rows * length] == 0)
        assert set(batch.cu_seqlens[:-1]) <= set(starts.tolist())
        assert batch.cu_seqlens.dtype == np.int32 and batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == rows * length
        assert np.diff(batch.cu_seqlens).max() == batch.max_seqlen
        for row in range(rows):
            assert batch.segment_ids[row].max() == len(batch.document_ids[row]) == len(batch.sources[row])
            seen.update(batch.document_ids[row])
    assert len(seen) > 300 and not any(document.startswith("aborted") for document in seen)


def test_tensors_share_the_memory_of_the_arrays(make: Make) -> None:
    batch = next(iter(make()))
    tensors = feed_torch.tensors(batch)
    tensors["reference_loss"][0, 0] = 42.0
    assert batch.reference_loss[0, 0] == 42.0


def test_a_state_goes_on_at_any_micro_batch(make: Make, wanted: list[str]) -> None:
    stream = make()
    given = iter(stream)
    for number in range(20):
        state = stream.state_dict()
        resumed = make()
        resumed.load_state_dict(json_and_back(state))
        # Within a step it stands before the step: nothing has been learnt from it yet.
        begin = number // 8 * 8
        assert digests(islice(resumed, 9)) == wanted[begin : begin + 9], f"after {number}"
        resumed.close()
        assert digests([next(given)]) == [wanted[number]], "looking at the state changes nothing"


def json_and_back(state: dict[str, Any]) -> dict[str, Any]:
    """As a user would keep it who keeps JSON: lanes are numbers as text, and bytes are hexadecimal digits."""
    text = json.dumps({**state, "lanes": {lane: part.hex() for lane, part in state["lanes"].items()}})
    read = json.loads(text)
    return {**read, "lanes": {lane: bytes.fromhex(part) for lane, part in read["lanes"].items()}}


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


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.given: dict[int, list[int]] = {}

    def member(self, rank: int) -> Any:
        threads = self

        class Member:
            def minimum(self, values: list[int]) -> list[int]:
                threads.given[rank] = values
                threads.barrier.wait(PATIENCE_S)
                smallest = [min(place) for place in zip(*threads.given.values())]
                threads.barrier.wait(PATIENCE_S)
                return smallest

        return Member()


@pytest.mark.parametrize("change", ["seed", "micro_batches", "batch_size", "tokenizer", "reference_models"])
def test_a_state_of_another_run_is_refused_by_name(make: Make, change: str) -> None:
    stream = make()
    next(iter(stream))
    state = stream.state_dict()
    changed = {
        "seed": ({"seed": 77}, "the seed"),
        "micro_batches": ({"micro_batches": 4}, "micro-batches a step"),
        "batch_size": ({"batch_size": 4}, "rows"),
        "tokenizer": ({"tokenizer": "0" * 64}, "the tokenizer"),
        "reference_models": ({"reference_models": ["1" * 64]}, None),
    }
    changes, name = changed[change]
    other = make(**changes)
    other.load_state_dict(state)
    if name is None:
        # Which models are accepted is no part of the run, but the topic's records are of none of these.
        with pytest.raises(StreamError, match="none of those allowed"):
            list(other)
    else:
        with pytest.raises(StateError, match=name):
            next(iter(other))


def test_what_is_no_state_is_refused(make: Make) -> None:
    with pytest.raises(StateError, match='no "lanes"'):
        make().load_state_dict({"step": 3})
    with pytest.raises(StateError, match="format 9"):
        make().load_state_dict({"format": 9, "lanes": {}})
    for lanes in ({"x": b""}, {"0": None}, {"0": "text"}, {"0": 1 << 30}):
        with pytest.raises(StateError, match="its lanes are not bytes"):
            make().load_state_dict({"format": 1, "lanes": lanes})
    stream = make()
    stream.load_state_dict({"format": 1, "lanes": {"0": b"nonsense"}})
    with pytest.raises(StateError, match="not a whole file"):
        next(iter(stream))


def test_wrong_settings_are_refused_in_words(make: Make, tmp_path: Path) -> None:
    for changes, message in [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 1, "world_size": None}, "give rank and world_size"),
        ({"tokenizer": tmp_path / "absent.json"}, "cannot read the tokenizer"),
        ({"vocab_size": None}, "give vocab_size"),
        ({"vocab_size": -1}, "vocab_size must be at least 1"),
        ({"batch_size": "2"}, "batch_size must be a whole number, not '2'"),
        ({"micro_batches": 1 << 40}, "micro_batches must be at least 1 and at most"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"tokenizer": "HuggingFaceTB/SmolLM2-135M"}, "a name on the Hub is none of these"),
        ({"reference_models": "84b4"}, "a list of fingerprints"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            make(**changes)
    for changes, message in [
        ({"unequal_contexts": "maybe"}, "unknown variant `maybe`"),
        ({"properties": {"enable.auto.commit": "true"}}, "enable.auto.commit cannot be set"),
        ({"properties": {"no.such.setting": "secret"}}, "no.such.setting is unknown"),
        ({"rank": 3, "world_size": 3, "group": Threads(1).member(0)}, "rank 3 is none of 3"),
        ({"rank": 0, "world_size": 3, "group": Threads(1).member(0), "micro_batches": 9}, "use 1, 2, 4 or 8 ranks"),
    ]:
        with pytest.raises(ConfigurationError, match=message) as caught:
            next(iter(make(**changes)))
        assert "secret" not in str(caught.value)
    with pytest.raises(StreamError, match="does not exist"):
        next(iter(make(topic="no-such-topic")))
    with pytest.raises(StreamError, match="no Kafka broker answered"):
        next(iter(make(bootstrap_servers="127.0.0.1:9")))
    with pytest.raises(StreamError, match="tokenizer"):
        next(iter(make(tokenizer="0" * 64)))


def test_it_works_in_data_loaders(make: Make, wanted: list[str]) -> None:
    loader: Any = DataLoader(make(feed_torch.ScoredStream), batch_size=None)
    assert digests(loader) == wanted
    stateful: Any = StatefulDataLoader(make(feed_torch.ScoredStream), batch_size=None, num_workers=0)
    given = iter(stateful)
    first = digests(islice(given, 16))
    state = stateful.state_dict()
    resumed: Any = StatefulDataLoader(make(feed_torch.ScoredStream), batch_size=None, num_workers=0)
    resumed.load_state_dict(state)
    assert first + digests(resumed) == wanted


def test_worker_processes_are_refused(make: Make) -> None:
    loader: Any = DataLoader(make(feed_torch.ScoredStream), batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match="num_workers=0"):
        next(iter(loader))


def test_a_distributed_checkpoint_keeps_it(make: Make, wanted: list[str], tmp_path: Path) -> None:
    stream = make(feed_torch.ScoredStream)
    assert digests(islice(stream, 8)) == wanted[:8]
    dcp.save({"data": stream}, checkpoint_id=tmp_path / "step", no_dist=True)
    resumed = make(feed_torch.ScoredStream)
    dcp.load({"data": resumed}, checkpoint_id=tmp_path / "step", no_dist=True)
    assert digests(resumed) == wanted[8:]
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    again = make(feed_torch.ScoredStream)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert digests(islice(again, 3)) == wanted[8:11]


def test_a_forked_child_is_refused(make: Make) -> None:
    stream = make()
    next(iter(stream))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stream.state_dict()
        except BaseException as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert "do not survive a fork" in os.read(read, 4096).decode()
    assert stream.state_dict()["lanes"], "the parent's goes on"


def test_ctrl_c_ends_the_wait_for_more_and_the_stream_can_be_read_on() -> None:
    """In a process of its own, which follows the topic beyond its end."""
    script = """
import json, os, signal, sys, threading
from sluice_feed import ScoredStream
settings = {**json.loads(os.environ["SLUICE_TEST_STREAM"]), "topic": "long", "epochs": None}
stream = ScoredStream(rank=0, world_size=1, **settings)
given = 0
try:
    for batch in stream:
        given += 1
        print(given, flush=True)
except KeyboardInterrupt:
    print("interrupted", stream.metrics()["steps_total"], len(stream.state_dict()["lanes"]), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")))
    reader.start()
    deadline = time.monotonic() + PATIENCE_S
    # Nothing more comes once it has waited for long: every micro-batch of whole steps was given.
    seen = -1
    while time.monotonic() < deadline and (len(lines) != seen or seen <= 0):
        seen = len(lines)
        time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0
    reader.join(PATIENCE_S)
    assert lines[-1] == f"interrupted {seen // 8} 8\n", lines[-1]


def test_another_thread_ends_it(make: Make, wanted: list[str]) -> None:
    stream = make()
    given = []
    for batches in stream.steps():
        given += digests(batches)
        if batches[0].step == 3:
            stream.stop()
    assert given == wanted[:24], "after the step that was given, and before the next"


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


def run_all(works: list[Any]) -> None:
    """Runs each in a thread; all must end by themselves, and well."""
    failures: list[BaseException] = []

    def run(work: Any) -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE_S
    while any(thread.is_alive() for thread in threads) and not failures and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not failures, failures
    assert not any(thread.is_alive() for thread in threads), "none waits for ever"


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


def test_a_closed_stream_has_no_state(make: Make, wanted: list[str]) -> None:
    with make() as stream:
        assert digests(islice(stream, 8)) == wanted[:8]
        state = stream.state_dict()
    with pytest.raises(StateError, match="take its state before"):
        stream.state_dict()
    assert digests(islice(stream, 3)) == wanted[:3], "what is read afterwards begins anew"
    stream.load_state_dict(state)
    assert digests(islice(stream, 3)) == wanted[8:11]


def test_an_iteration_that_is_left_within_a_step_gives_it_again(make: Make, wanted: list[str]) -> None:
    stream = make()
    assert digests(islice(stream, 11)) == wanted[:11]
    assert digests(islice(stream, 9)) == wanted[8:17]
    one, other = iter(stream), iter(stream)
    next(one)
    next(other)
    with pytest.raises(RuntimeError, match="another iteration"):
        next(one)


def test_an_interrupted_step_is_not_lost(make: Make, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make()
    given = digests(islice(stream, 8))

    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(iter(stream))
    monkeypatch.undo()
    resumed = make()
    resumed.load_state_dict(stream.state_dict())
    assert given + digests(resumed) == wanted
    assert given + digests(stream) == wanted


def test_metrics_count(make: Make) -> None:
    stream = make()
    assert stream.metrics() == {}
    given = list(stream)
    metrics = stream.metrics()
    assert metrics["steps_total"] == max(batch.step for batch in given)
    assert metrics["documents_total"] > 700 and metrics["tombstones_total"] > 0
    assert metrics["documents_in_shuffle_buffer"] == metrics["pieces_in_packing"] == metrics["lag_records"] == 0
    assert set(metrics["records_rejected_total"].values()) == {0}


def test_a_record_that_is_refused_is_counted(make: Make) -> None:
    stream = make(reference_models=["1" * 64])
    with pytest.raises(StreamError, match="offset"):
        list(stream)
    assert stream.metrics()["records_rejected_total"]["reference_model_not_allowed"] > 0


def test_memory_does_not_grow(make: Make) -> None:
    """Over 10,000 micro-batches of one pass over a long topic. One of them is 6 kB, so a leak would be 60 MB."""
    libc = ctypes.CDLL("libc.so.6")
    resident: list[int] = []
    for number, _ in zip(range(12_001), make(topic="long", epochs=1)):
        if number % 2000 == 0:
            gc.collect()
            # What is free is given back, so that what is seen is in use.
            libc.malloc_trim(0)
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert len(resident) == 7
    grown = resident[-1] - resident[1]
    assert grown < 4 << 20, f"{resident} bytes after each 2,000 micro-batches"
