"""What the tests of the adapters share: micro-batches without Kafka, a tiny Llama, and the plain loop they must equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sluice_feed import Selection, select
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH, ROWS = 40, 12, 2
#: Lengths of the documents in each row; what is left is padding.
DOCUMENTS = ((5, 4), (3, 8))
CLIP, RATE = 0.05, 0.5


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """With two layers and a tied head; without dropout."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype)


def micro_batch(lane: int, index: int, rows: int = ROWS) -> dict[str, Any]:
    """A micro-batch as `sluice_feed.torch.tensors` makes them, drawn by its lane and its number within it."""
    generator = np.random.default_rng([lane, index])
    shape = (rows, LENGTH)
    tokens, labels = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    reference = np.full(shape, np.nan, np.float32)
    for row in range(rows):
        start = 0
        for segment, length in enumerate(DOCUMENTS[(row + index) % len(DOCUMENTS)], start=1):
            inside = slice(start, start + length)
            tokens[row, inside] = generator.integers(1, VOCABULARY, length)
            labels[row, start : start + length - 1] = tokens[row, start + 1 : start + length]
            positions[row, inside], segments[row, inside] = np.arange(length), segment
            reference[row, start : start + length - 1] = generator.normal(3.7, 0.5, length - 1)
            start += length
    # Micro-batches differ in how many labels they have, so that a mean of means is not the mean.
    if (lane + index) % 2 == 1:
        labels[:, 2:7], reference[:, 2:7] = -100, np.nan
    arrays = {"input_ids": tokens, "labels": labels, "position_ids": positions, "segment_ids": segments}
    batch: dict[str, Any] = {name: torch.from_numpy(values) for name, values in arrays.items()}
    batch["reference_loss"] = torch.from_numpy(reference)
    batch["reference_entropy"] = torch.from_numpy(reference * 0.5)
    return {**batch, "lane": lane}


class LaneStream:
    """Steps of micro-batches by lanes, as a ScoredStream's are, without Kafka.

    Micro-batches are taken from lanes in turn; a rank has the lanes that are its number modulo the ranks, and the others'
    steps are filled up with micro-batches without labels. A lane ends after `lengths[lane]` micro-batches.
    """

    def __init__(self, lengths: Sequence[int], micro_batches: int, rank: int = 0, world_size: int = 1) -> None:
        self.lengths, self.micro_batches, self.rank, self.world_size = list(lengths), micro_batches, rank, world_size
        self.taken = [0] * len(self.lengths)
        self.turn, self.step = 0, 0

    def __iter__(self) -> Iterator[Any]:
        for step in self.steps():
            yield from step

    def steps(self) -> Iterator[list[dict[str, Any]]]:
        while (step := self.next_step()) is not None:
            yield step

    def next_step(self) -> list[dict[str, Any]] | None:
        own: list[dict[str, Any]] = []
        of_ranks = [0] * self.world_size
        for number in range(self.micro_batches):
            lane = next((lane for lane in self._in_turn() if self.taken[lane] < self.lengths[lane]), None)
            if lane is None:
                break
            if number == 0:
                self.step += 1
            of_ranks[lane % self.world_size] += 1
            if lane % self.world_size == self.rank:
                own.append({**micro_batch(lane, self.taken[lane]), "number": number, "step": self.step})
            self.taken[lane] += 1
            self.turn = (lane + 1) % len(self.lengths)
        if max(of_ranks) == 0:
            return None
        while len(own) < max(of_ranks):
            empty = micro_batch(0, 0)
            empty["labels"][:], empty["reference_loss"][:] = -100, torch.nan
            own.append({**empty, "number": None, "step": self.step})
        return own

    def _in_turn(self) -> list[int]:
        lanes = len(self.lengths)
        return [(self.turn + offset) % lanes for offset in range(lanes)]

    def state_dict(self) -> dict[str, Any]:
        # Each rank knows of its own lanes; of the others no more than that they had their turns.
        shared = [self.turn, self.step, *self.taken]
        own = range(self.rank, len(self.lengths), self.world_size)
        return {"format": 1, "lanes": {str(lane): bytes(shared) for lane in own}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = [bytes(part) for lane, part in state["lanes"].items() if int(lane) % self.world_size == self.rank]
        self.turn, self.step, *self.taken = own[0]


class Rows(Dataset[dict[str, Any]]):
    """Rows of micro-batches without their padding, as lists."""

    NAMES = ("input_ids", "labels", "position_ids", "reference_loss", "reference_entropy", "segment_ids")

    def __init__(self, rows: int, names: Sequence[str] = NAMES) -> None:
        self.batches = [micro_batch(0, index, rows=1) for index in range(rows)]
        self.names = names

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.batches[index]
        length = int((batch["segment_ids"] != 0).sum())
        return {name: batch[name][0, :length].tolist() for name in self.names}


def token_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Losses in nats with their graph, each document run by itself; 0 where there is no label. `[rows, length]`."""
    losses = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in segments.unique():
            (inside,) = torch.where(segments == segment)
            labels = batch["labels"][row, inside]
            if segment == 0 or not (labels != -100).any():
                continue
            logits = model(input_ids=batch["input_ids"][row, inside][None], use_cache=False).logits[0]
            losses[row, inside] = nn.functional.cross_entropy(logits, labels, reduction="none").to(torch.float64)
    return losses


def plain_step(model: nn.Module, batches: Sequence[Mapping[str, Any]], selection: Selection, step: int) -> dict[str, float]:
    """A selective step on all ranks' micro-batches, in the order of their numbers, with plain SGD and clipping."""
    losses = [token_losses(model, batch) for batch in batches]
    signals = []
    for own, batch in zip(losses, batches):
        seen = own.detach().float().masked_fill(batch["labels"] == -100, torch.nan)
        names = ("reference_loss", "reference_entropy")
        signals.append({"loss": seen.numpy(), **{name: batch[name].numpy() for name in names}})
    masks = [torch.from_numpy(mask) for mask in select(signals, selection, step=step)]
    kept = sum(int(mask.sum()) for mask in masks)
    loss = torch.stack([own[mask].sum() for own, mask in zip(losses, masks)]).sum() / kept
    model.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(RATE * parameter.grad)
    labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    return {"loss": loss.item(), "grad_norm": norm.item(), "kept_share": kept / labelled}


def plain_run(stream: LaneStream, selection: Selection, steps: int) -> tuple[list[dict[str, float]], LlamaForCausalLM]:
    """What a run of a tiny Llama logs, and the model after it."""
    model = tiny_llama()
    logs = []
    for step in range(1, steps + 1):
        batches = stream.next_step()
        if batches is None:
            break
        logs.append(plain_step(model, batches, selection, step))
    return logs, model
