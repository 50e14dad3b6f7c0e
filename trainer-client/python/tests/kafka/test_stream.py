"""`ScoredStream` over a real Kafka: what it gives, keeps and refuses."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Make
from sluice_feed import ConfigurationError, StateError, StreamError
from sluice_feed import torch as feed_torch
from stream_support import Threads, digests
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader


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
    with make() as read:
        state = read.state_dict()
    # One bit of the numbers, which lie behind the names of the columns.
    damaged = bytearray(state["lanes"]["0"])
    damaged[-1] ^= 1
    stream = make()
    stream.load_state_dict({**state, "lanes": {**state["lanes"], "0": bytes(damaged)}})
    with pytest.raises(StateError, match="not those that were written"):
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
