"""The stream's counts for Prometheus (`pip install sluice-feed[prometheus]`).

from prometheus_client import start_http_server
from sluice_feed.prometheus import StreamCollector

StreamCollector(stream).register()
start_http_server(9400)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

PREFIX = "sluice_feed_"
HELP = {
    "steps_total": "Steps whose micro-batches were given out since the start of the run.",
    "documents_total": "Documents that have left this rank's stream since the start of the run.",
    "documents_in_shuffle_buffer": "Documents that wait to be drawn from at random.",
    "pieces_in_packing": "Pieces of documents in rows that are not given out yet.",
    "records_fetched": "Records that have come from the brokers and wait to be decoded.",
    "documents_queued": "Documents that wait to be shuffled and packed.",
    "lag_records": "Records that the topic holds beyond those read, over this rank's partitions.",
    "tombstones_total": "Records without a value, which are passed over.",
    "records_removed_total": "Records that the topic has lost, by retention or compaction, before they were read.",
    "records_rejected_total": "Records that could not be used, by reason.",
}


class Source(Protocol):
    """What has counts: a `ScoredStream`."""

    def metrics(self) -> dict[str, Any]:
        """Counts by name; those that only grow end in `_total`, and those by reason are dictionaries."""
        ...  # pragma: no cover


class StreamCollector:
    """Reads a stream's counts whenever Prometheus asks. Names are those of `ScoredStream.metrics()` after `sluice_feed_`.

    Args:
        stream: a `ScoredStream`. Before it is first read it has no counts.
        labels: put on every sample, such as `{"rank": "0"}`.
    """

    def __init__(self, stream: Source, labels: Mapping[str, str] | None = None) -> None:
        self._stream = stream
        self._labels = dict(labels or {})

    def register(self, registry: CollectorRegistry = REGISTRY) -> StreamCollector:
        """Adds itself to a registry, by default that of the process."""
        # It has what is asked of one, without being derived from it.
        registry.register(cast(Any, self))
        return self

    def collect(self) -> Iterable[Metric]:
        """One family of samples for each count."""
        names, values = list(self._labels), list(self._labels.values())
        for name, value in self._stream.metrics().items():
            has_reasons = isinstance(value, Mapping)
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            help_text = HELP.get(name, name.replace("_", " "))
            metric = family(PREFIX + name, help_text, labels=names + ["reason"] * has_reasons)
            for reason, count in value.items() if has_reasons else [("", value)]:
                metric.add_metric(values + [reason] * has_reasons, float(count))
            yield metric

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is to count is known once the stream is read."""
        return []
