"""What Prometheus reads of a stream."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from sluice_feed import ScoredStream
from sluice_feed.prometheus import StreamCollector


class Counted:
    """Counts as `ScoredStream.metrics()` gives them."""

    def __init__(self) -> None:
        self.counts: dict[str, Any] = {}

    def metrics(self) -> dict[str, Any]:
        return self.counts


def exposed(stream: Any, **labels: str) -> list[str]:
    registry = CollectorRegistry()
    StreamCollector(stream, labels).register(registry)
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("# HELP")]


def test_gauges_counters_and_reasons_have_their_names() -> None:
    stream = Counted()
    stream.counts = {
        "lag_records": 12,
        "documents_total": 34,
        "records_rejected_total": {"no_loss": 1, "other_tokenizer": 0},
    }
    assert exposed(stream, rank="3") == [
        "# TYPE sluice_feed_lag_records gauge",
        'sluice_feed_lag_records{rank="3"} 12.0',
        "# TYPE sluice_feed_documents_total counter",
        'sluice_feed_documents_total{rank="3"} 34.0',
        "# TYPE sluice_feed_records_rejected_total counter",
        'sluice_feed_records_rejected_total{rank="3",reason="no_loss"} 1.0',
        'sluice_feed_records_rejected_total{rank="3",reason="other_tokenizer"} 0.0',
    ]


def test_counts_are_read_when_they_are_asked_for() -> None:
    stream = Counted()
    registry = CollectorRegistry()
    StreamCollector(stream).register(registry)
    assert registry.get_sample_value("sluice_feed_documents_total") is None
    stream.counts = {"documents_total": 1}
    assert registry.get_sample_value("sluice_feed_documents_total") == 1.0
    stream.counts = {"documents_total": 5}
    assert registry.get_sample_value("sluice_feed_documents_total") == 5.0


def test_a_stream_that_was_not_read_has_none() -> None:
    """And is not connected for it."""
    stream = ScoredStream("nowhere", tokenizer="0" * 64, vocab_size=10, rank=0, world_size=1)
    assert exposed(stream) == []
