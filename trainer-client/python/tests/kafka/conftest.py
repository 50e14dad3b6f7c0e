"""A topic on a real Kafka, which `tests/e2e/torch.rs` fills before it runs these tests.

SLUICE_TEST_STREAM holds the settings of a stream over it as JSON: 8 partitions (one of them empty), some 400 documents, two
reference models, two epochs, 8 micro-batches a step. SLUICE_TEST_TOKENIZER is the `tokenizer.json` of its records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from sluice_feed import ScoredStream
from stream_support import digests

Make = Callable[..., ScoredStream]


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    return dict(json.loads(os.environ["SLUICE_TEST_STREAM"]))


@pytest.fixture
def make(settings: dict[str, Any]) -> Iterator[Make]:
    """Makes streams, and closes them after the test."""
    made: list[ScoredStream] = []

    def stream(kind: type[ScoredStream] = ScoredStream, **changes: Any) -> ScoredStream:
        made.append(kind(**{"rank": 0, "world_size": 1, **settings, **changes}))
        return made[-1]

    yield stream
    for stream_made in made:
        stream_made.close()


@pytest.fixture(scope="session")
def wanted(settings: dict[str, Any]) -> list[str]:
    """Digests of all micro-batches of an uninterrupted run."""
    with ScoredStream(rank=0, world_size=1, **settings) as stream:
        return digests(stream)
