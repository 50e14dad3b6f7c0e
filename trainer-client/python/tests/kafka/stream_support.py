"""What the tests of streams share."""

from __future__ import annotations

import threading
import time
from typing import Any

PATIENCE_S = 120


def digests(batches: Any) -> list[str]:
    return [batch.digest if hasattr(batch, "digest") else batch["digest"] for batch in batches]


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
