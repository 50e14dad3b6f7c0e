"""`ScoredStream` left, stopped, closed, forked and interrupted; and what it leaves in memory."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import Make
from sluice_feed import StateError
from stream_support import PATIENCE_S, digests, run_all


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
# A shell that starts tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
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
    try:
        deadline = time.monotonic() + PATIENCE_S
        # Nothing more comes once it has waited for long: every micro-batch of whole steps was given.
        seen = -1
        while time.monotonic() < deadline and (len(lines) != seen or seen <= 0):
            seen = len(lines)
            time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    finally:
        # A process that goes on would keep the reader, and so all tests, from ending.
        process.kill()
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


def test_threads_that_open_it_at_the_same_moment_share_one(make: Make, wanted: list[str]) -> None:
    stream = make()
    lanes: list[int] = []
    run_all([lambda: lanes.append(stream.lanes) for _ in range(4)])
    assert lanes == [8] * 4
    assert digests(islice(pickle.loads(pickle.dumps(make())), 3)) == wanted[:3], "it is handed on before it is read"
    assert digests(islice(stream, 3)) == wanted[:3]
