"""A scored topic as micro-batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sluice_feed import _core
from sluice_feed._core import Batch, ConfigurationError, RankError, StateError
from sluice_feed.group import Group, all_equal, default_group, rank_and_world_size
from sluice_feed.tokenizer import fingerprint_and_vocab_size

STATE_FORMAT = 1
_LOGGER = logging.getLogger(__name__)


class ScoredStream:
    """The micro-batches of one rank, step after step, from a topic that `sluiced` has scored.

    The order of documents, their packing, and which micro-batch belongs to which step depend on the topic, the settings and
    the seed, and not on the number of ranks: a run may be killed, and go on on another number of ranks, and learns from
    every document as often as one that was not interrupted. Ranks agree before each step, so none waits in a collective
    because another has no batch.

    It connects when it is first read. A thread reads ahead; give it to a DataLoader with num_workers=0.

    Args:
        topic: the scored topic. Its partitions must be a multiple of the ranks.
        tokenizer: the `tokenizer.json` that the documents were made with (or its folder, or its SHA-256). Records of another
            one are refused.
        bootstrap_servers: Kafka brokers, "host:port,...".
        batch_size: rows of a micro-batch.
        sequence_length: tokens of a row; by default the window of the reference model, as the first record says.
        micro_batches: micro-batches of a step, over all ranks: ranks times accumulation. By default one for each rank; give
            it where a run may go on on another number of ranks, for it belongs to the run.
        epochs: passes over what the topic holds when the run begins; None waits for more for ever.
        shuffle_buffer: documents that wait to be drawn from at random, over all partitions; 1 keeps each partition's order.
        seed: of those draws.
        rank, world_size: by default those of torch.distributed, else the environment's RANK and WORLD_SIZE. With tensor or
            pipeline parallelism: the rank and size of the data-parallel group.
        group: how ranks agree; by default torch.distributed.
        vocab_size: ids are below this; by default as the tokenizer says.
        properties: further librdkafka settings, such as {"security.protocol": "SASL_SSL", ...}; "NAME.from_file" reads the
            value of NAME from a file.
        reference_models: fingerprints of reference models whose losses are accepted; by default the first record's alone.
        needs_entropies: refuse records without reference entropies.
        unequal_contexts: where a row is shorter than the reference's window: "mask" the tokens that have less context than
            the reference had, "refuse" such documents, or "allow" them.
        attend_across_documents: positions run on over a whole row, and tokens look at the documents before theirs.
        first_token: "skip", or "predict" the first token of a document from the document before it in its row.
        digests: give each batch its SHA-256, to compare runs.

    Raises:
        ConfigurationError: a setting cannot be used; when the stream is made, or when it connects.
    """

    def __init__(
        self,
        topic: str,
        *,
        tokenizer: str | os.PathLike[str],
        bootstrap_servers: str = "localhost:9092",
        batch_size: int = 8,
        sequence_length: int | None = None,
        micro_batches: int | None = None,
        epochs: int | None = 1,
        shuffle_buffer: int = 1,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        group: Group | None = None,
        vocab_size: int | None = None,
        properties: Mapping[str, str] | None = None,
        reference_models: Iterable[str] = (),
        needs_entropies: bool = False,
        unequal_contexts: str = "mask",
        attend_across_documents: bool = False,
        first_token: str = "skip",
        digests: bool = False,
    ) -> None:
        _check(batch_size, sequence_length, micro_batches, epochs, shuffle_buffer)
        self.rank, self.world_size = rank_and_world_size(rank, world_size)
        self._group = group
        self._digests = digests
        self._feed: _core.Feed | None = None
        self._state: Mapping[str, Any] | None = None
        # Whether micro-batches of the last step are still to be given.
        self._is_within_step = False
        self._stop_asked = False
        self._told: set[str] = set()
        fingerprint, vocab_size = fingerprint_and_vocab_size(tokenizer, vocab_size)
        self._settings: dict[str, Any] = {
            "bootstrap_servers": bootstrap_servers,
            "properties": _with_certificates(dict(properties or {})),
            "topic": topic,
            "tokenizer": fingerprint,
            "vocab_size": vocab_size,
            "rows": batch_size,
            "sequence_length": sequence_length,
            "micro_batches": self.world_size if micro_batches is None else micro_batches,
            "rank": self.rank,
            "world_size": self.world_size,
            "epochs": epochs,
            "shuffle_buffer": shuffle_buffer,
            "seed": seed,
            "attend_across_documents": attend_across_documents,
            "first_token": first_token,
            "unequal_contexts": unequal_contexts,
            "needs_entropies": needs_entropies,
            "reference_models": list(reference_models),
        }

    def __iter__(self) -> Iterator[Any]:
        """Micro-batches of this rank, `Batch` after `Batch`; every rank is given as many as any other."""
        for batches in self.steps():
            for number, batch in enumerate(batches, start=1):
                self._is_within_step = number < len(batches)
                yield batch

    def steps(self) -> Iterator[list[Any]]:
        """For each step the micro-batches of this rank, of which all ranks have as many.

        Raises:
            StreamError: the topic cannot be read on, or holds what this run cannot use.
            RankError: another rank has failed, or reads another run; every rank raises one.
        """
        feed = self._opened()
        while not self._stop_asked and self._agrees_on_step(feed):
            batches = feed.take(with_digests=self._digests)
            self._is_within_step = False
            self._tell(feed.notices())
            yield [self._convert(batch) for batch in batches]

    def state_dict(self) -> dict[str, Any]:
        """What this rank must keep to go on from here: the bytes of each of its lanes (partitions), by number.

        It stands after the last step all of whose micro-batches were given. The states of all ranks of one step make the
        state of the run: `merge_state_dicts`, or a distributed checkpoint, which keeps lanes under names of their own.
        """
        return {"format": STATE_FORMAT, "lanes": self._opened().snapshot(self._is_within_step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where a state stands, which holds this rank's lanes and perhaps others'.

        Raises:
            StateError: it is no state, or, once the stream is read, it is of a run with another tokenizer, reference model
                or plan, which is named, or lacks lanes of this rank.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("lanes"), Mapping):
            raise StateError('this is no state of a ScoredStream: it has no "lanes"')
        if state.get("format") != STATE_FORMAT:
            raise StateError(f"this state is of format {state.get('format')}, and this version reads format {STATE_FORMAT}")
        self.close()
        self._state = state

    def stop(self) -> None:
        """Ends the iteration on all ranks before the next step; a signal handler may call it."""
        self._stop_asked = True
        if self._feed is not None:
            self._feed.stop()

    def close(self) -> None:
        """Ends the reading and gives back its memory. What is read afterwards begins anew, or from a loaded state."""
        if self._feed is not None:
            self._feed.close()
        self._feed, self._is_within_step = None, False

    def metrics(self) -> dict[str, Any]:
        """Counts of this rank's stream by name; empty before it is first read. Those that only grow end in `_total`."""
        return {} if self._feed is None else self._feed.metrics()

    @property
    def lanes(self) -> int:
        """Partitions of the topic. Connects if it must."""
        return self._opened().lanes

    @property
    def sequence_length(self) -> int:
        """Tokens of a row. Connects if it must."""
        return self._opened().shape[1]

    @property
    def reference_model(self) -> str | None:
        """SHA-256 of the model that made the reference losses, once a document has shown it."""
        return None if self._feed is None else self._feed.reference_model

    def __enter__(self) -> ScoredStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        if self._feed is not None:
            raise TypeError("a stream that is being read cannot be handed to another process; give num_workers=0")
        return self.__dict__

    def _convert(self, batch: Batch) -> Any:
        """What is given for a micro-batch."""
        return batch

    def _opened(self) -> _core.Feed:
        if self._feed is None:
            group = self._group = self._group or default_group(self.world_size)
            try:
                feed = _core.Feed(**self._settings, state=self._own_state())
            except BaseException:
                # The others must hear of it, or they would wait for ever.
                group.minimum([0])
                raise
            if group.minimum([1]) != [1]:
                raise RankError("another rank could not open the stream; see what it says")
            if not all_equal(group, feed.identity()):
                raise RankError(
                    "the ranks of the group do not read the same run: the topic, tokenizer, settings or state differ"
                )
            self._feed = feed
        return self._feed

    def _own_state(self) -> list[bytes] | None:
        """The parts of the loaded state that are of this rank's lanes."""
        if self._state is None:
            return None
        own = [bytes(part) for lane, part in self._state["lanes"].items() if int(lane) % self.world_size == self.rank]
        if not own:
            raise StateError(
                f"the state holds no lane of rank {self.rank} of {self.world_size}: give the states of all ranks, merged"
                " (merge_state_dicts)"
            )
        return own

    def _agrees_on_step(self, feed: _core.Feed) -> bool:
        """Whether all ranks have what the next step takes of them."""
        assert self._group is not None
        while True:
            try:
                values = feed.fill()
            except BaseException:
                # The others must hear of it, or they would wait for ever.
                self._group.minimum(feed.failed())
                raise
            agreed = feed.agree(self._group.minimum(values))
            if agreed != "again":
                return agreed == "ready"

    def _tell(self, notices: list[str]) -> None:
        for notice in notices:
            if notice not in self._told:
                self._told.add(notice)
                _LOGGER.warning("%s", notice)


def merge_state_dicts(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a run out of the states of its ranks, from which any number of ranks can go on.

    Raises:
        StateError: two of them hold the same lane: they are not of different ranks of one step.
    """
    lanes: dict[str, Any] = {}
    for state in states:
        if state.get("format") != STATE_FORMAT:
            raise StateError(f"a state of format {state.get('format')} among them; this version reads {STATE_FORMAT}")
        for lane, part in state["lanes"].items():
            if lane in lanes:
                raise StateError(f"two states hold lane {lane}: give the state of each rank once, all of one step")
            lanes[lane] = part
    return {"format": STATE_FORMAT, "lanes": lanes}


def _check(
    batch_size: int,
    sequence_length: int | None,
    micro_batches: int | None,
    epochs: int | None,
    shuffle_buffer: int,
) -> None:
    lowest = [
        ("batch_size", batch_size, 1),
        ("sequence_length", sequence_length, 2),
        ("micro_batches", micro_batches, 1),
        ("epochs", epochs, 1),
        ("shuffle_buffer", shuffle_buffer, 1),
    ]
    for name, value, least in lowest:
        if value is not None and value < least:
            raise ConfigurationError(f"{name} must be at least {least}, not {value}")


def _with_certificates(properties: dict[str, str]) -> dict[str, str]:
    """OpenSSL comes with the wheel, and does not know where this machine keeps its certificates: librdkafka looks."""
    uses_tls = "ssl" in properties.get("security.protocol", "").lower()
    says_where = any(name.startswith("ssl.ca.") for name in properties)
    return {**properties, "ssl.ca.location": "probe"} if uses_tls and not says_where else properties
