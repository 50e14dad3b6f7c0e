"""A scored topic as micro-batches."""

from __future__ import annotations

import logging
import operator
import os
import threading
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
        needs_attribute: the topic is one that a token classifier has scored, for the score "attribute": refuse records of
            losses. Without it records that carry no losses are refused.
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
        needs_attribute: bool = False,
        unequal_contexts: str = "mask",
        attend_across_documents: bool = False,
        first_token: str = "skip",
        digests: bool = False,
    ) -> None:
        self.rank, self.world_size = rank_and_world_size(rank, world_size)
        if isinstance(reference_models, str):
            raise ConfigurationError("reference_models is a list of fingerprints, not one text")
        if needs_entropies and needs_attribute:
            raise ConfigurationError(
                "needs_entropies and needs_attribute: a record is of a language model, which gives losses and entropies, or"
                " of a token classifier, which gives an attribute; ask for one of them"
            )
        self._group = group
        self._digests = digests
        self._feed: _core.Feed | None = None
        # One thread opens it, and another that asks meanwhile for its state or its lanes waits for that.
        self._opening = threading.Lock()
        self._state: Mapping[str, Any] | None = None
        # Whether micro-batches of the last step are still to be given.
        self._is_within_step = False
        self._stop_asked = False
        self._is_closed = False
        # The iteration that is given micro-batches: the last one begun.
        self._iteration: object = None
        self._told: set[str] = set()
        fingerprint, vocab_size = fingerprint_and_vocab_size(tokenizer, vocab_size)
        self._settings: dict[str, Any] = {
            "bootstrap_servers": bootstrap_servers,
            "properties": _with_certificates(dict(properties or {})),
            "topic": topic,
            "tokenizer": fingerprint,
            "vocab_size": _whole("vocab_size", vocab_size, 1, (1 << 32) - 1),
            "rows": _whole("batch_size", batch_size, 1, 1 << 20),
            "sequence_length": _whole_or_none("sequence_length", sequence_length, 2, 1 << 24),
            "micro_batches": _whole(
                "micro_batches", self.world_size if micro_batches is None else micro_batches, 1, 1 << 20
            ),
            "rank": self.rank,
            "world_size": self.world_size,
            "epochs": _whole_or_none("epochs", epochs, 1, 1 << 63),
            "shuffle_buffer": _whole("shuffle_buffer", shuffle_buffer, 1, 1 << 40),
            "seed": _whole("seed", seed, 0, (1 << 64) - 1),
            "attend_across_documents": attend_across_documents,
            "first_token": first_token,
            "unequal_contexts": unequal_contexts,
            "needs_entropies": needs_entropies,
            "needs_attribute": needs_attribute,
            "reference_models": list(reference_models),
        }

    def __iter__(self) -> Iterator[Any]:
        """Micro-batches of this rank, `Batch` after `Batch`; every rank is given as many as any other.

        An iteration that is left in the middle of a step gives that step again when the next one begins. All ranks iterate
        alike.
        """
        for batches in self.steps():
            iteration = self._iteration
            for number, batch in enumerate(batches, start=1):
                self._is_within_step = number < len(batches)
                yield batch
                self._check_iteration(iteration)

    def steps(self) -> Iterator[list[Any]]:
        """For each step the micro-batches of this rank, of which all ranks have as many.

        Raises:
            StreamError: the topic cannot be read on, or holds what this run cannot use.
            RankError: another rank has failed, or reads another run; every rank raises one.
        """
        iteration = self._iteration = object()
        feed = self._opened()
        if self._is_within_step:
            feed.put_back()
            self._is_within_step = False
        while self._agrees_on_step(feed):
            # Whatever interrupts this, the state stands before a step that was not given.
            self._is_within_step = True
            batches = [self._convert(batch) for batch in feed.take(with_digests=self._digests)]
            self._tell(feed.notices())
            self._is_within_step = False
            yield batches
            self._check_iteration(iteration)

    def state_dict(self) -> dict[str, Any]:
        """What this rank must keep to go on from here: the bytes of each of its lanes (partitions), by number.

        The bytes carry a checksum. JSON has no bytes: write each lane as `part.hex()`, and read it by `bytes.fromhex`.

        It stands after the last step all of whose micro-batches were given. The states of all ranks of one step make the
        state of the run: `merge_state_dicts`, or a distributed checkpoint, which keeps lanes under names of their own. In
        the middle of a step it stands before that step. Connects if it must, which all ranks do together.

        Raises:
            StateError: the stream is closed: its state was to be taken before.
        """
        if self._is_closed:
            raise StateError("the stream is closed and does not know any more where it stood: take its state before")
        return {"format": STATE_FORMAT, "lanes": self._opened().snapshot(self._is_within_step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where a state stands, which holds this rank's lanes and perhaps others'.

        Raises:
            StateError: it is no state, or, once the stream is read, it is of a run with another tokenizer, reference model
                or plan, which is named, or lacks lanes of this rank.
        """
        lanes = state.get("lanes") if isinstance(state, Mapping) else None
        if not isinstance(lanes, Mapping):
            raise StateError('this is no state of a ScoredStream: it has no "lanes"')
        if any(not str(lane).isdigit() or part is None or isinstance(part, (int, str)) for lane, part in lanes.items()):
            raise StateError("this is no state of a ScoredStream: its lanes are not bytes by the number of a lane")
        if state.get("format") != STATE_FORMAT:
            raise StateError(f"this state is of format {state.get('format')}, and this version reads format {STATE_FORMAT}")
        self.close()
        self._state, self._is_closed = state, False

    def stop(self) -> None:
        """Ends the iteration on all ranks before the next step; a signal handler or another thread may call it."""
        self._stop_asked = True
        if self._feed is not None:
            self._feed.stop()

    def close(self) -> None:
        """Ends the reading and gives back its memory. What is read afterwards begins anew, or from a loaded state."""
        if self._feed is not None:
            self._feed.close()
            self._is_closed = True
        self._feed, self._is_within_step, self._stop_asked = None, False, False

    def metrics(self) -> dict[str, Any]:
        """Counts of this rank's stream by name; empty before it is first read. Those that only grow end in `_total`."""
        return {} if self._feed is None else self._feed.metrics()

    @property
    def lanes(self) -> int:
        """Partitions of the topic. Connects if it must, which all ranks do together."""
        return self._opened().lanes

    @property
    def sequence_length(self) -> int:
        """Tokens of a row. Connects if it must, which all ranks do together."""
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
        return {name: value for name, value in self.__dict__.items() if name != "_opening"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opening=threading.Lock())

    def _convert(self, batch: Batch) -> Any:
        """What is given for a micro-batch."""
        return batch

    def _opened(self) -> _core.Feed:
        with self._opening:
            if self._feed is None:
                self._feed, self._is_closed = self._open(), False
            return self._feed

    def _open(self) -> _core.Feed:
        group = self._group = self._group or default_group(self.world_size)
        try:
            feed = _core.Feed(**self._settings, state=self._own_state())
        except BaseException:
            # The others must hear of it, or they would wait for ever.
            group.minimum([0] + [1] * self.world_size)
            raise
        is_opened, *missing = group.minimum([1] + [int(rank != self.rank) for rank in range(self.world_size)])
        if not is_opened:
            raise RankError("another rank could not open the stream; see what it says")
        if any(missing):
            raise RankError(
                f"no stream has rank {missing.index(1)} of {self.world_size}: each rank has a number of its own, from 0"
            )
        if not all_equal(group, feed.identity()):
            raise RankError(
                "the ranks of the group do not read the same run: the topic, tokenizer, settings or state differ"
            )
        return feed

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
                values = feed.stopped() if self._stop_asked else feed.fill()
            except BaseException:
                # The others must hear of it, or they would wait for ever.
                self._group.minimum(feed.failed())
                raise
            agreed = feed.agree(self._group.minimum(values))
            if agreed != "again":
                return agreed == "ready"

    def _check_iteration(self, iteration: object) -> None:
        if self._iteration is not iteration:
            raise RuntimeError("another iteration of this stream has begun, and micro-batches go there: use one at a time")

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


def _whole(name: str, value: Any, least: int, most: int) -> int:
    """A setting that is a whole number, whatever type of number it is."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigurationError(f"{name} must be a whole number, not {value!r}") from None
    if not least <= number <= most:
        raise ConfigurationError(f"{name} must be at least {least} and at most {most}, not {number}")
    return number


def _whole_or_none(name: str, value: Any, least: int, most: int) -> int | None:
    return None if value is None else _whole(name, value, least, most)


def _with_certificates(properties: dict[str, str]) -> dict[str, str]:
    """OpenSSL comes with the wheel, and does not know where this machine keeps its certificates: librdkafka looks."""
    uses_tls = "ssl" in properties.get("security.protocol", "").lower()
    says_where = any(name.startswith("ssl.ca.") for name in properties)
    return {**properties, "ssl.ca.location": "probe"} if uses_tls and not says_where else properties
