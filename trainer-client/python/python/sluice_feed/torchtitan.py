"""Selective language modeling in torchtitan 0.3: a dataloader, a loss, and the few lines of a trainer that join them.

    Trainer.Config -> sluice_feed.torchtitan.SelectiveTrainer.Config(
        dataloader=ScoredDataLoader.Config(topic="sluice.scored", tokenizer_file="tokenizer.json", micro_batches=64),
        loss=SelectiveCrossEntropy.Config(keep=0.6, scope="sequence"), ...)

torchtitan hands its losses no more of a batch than positions, and everything else to the model's forward; so a subclass of
its trainer takes the reference losses out before. torchtitan divides by all labelled tokens, which it counts before any loss
is known, and not by the kept ones; so after a step's last micro-batch the subclass corrects the gradients.

Whole logits exist here, as they do in torchtitan's own `CrossEntropyLoss`. Not for pipeline, tensor or context parallelism,
nor for CUDA graphs: each is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss
from torchtitan.trainer import Trainer

from sluice_feed._core import ConfigurationError, Selection, StateError
from sluice_feed.per_token import KeptSum, kept_sum, multiply_gradients
from sluice_feed.torch import ScoredStream

IGNORE_INDEX = -100
SIGNALS = ("reference_loss", "reference_entropy")
_LOGGER = logging.getLogger(__name__)


class ScoredDataLoader(BaseDataLoader):  # type: ignore[misc]
    """A scored topic for torchtitan, whose state any number of data-parallel ranks can load.

    Gives `({"input", "positions", "reference_loss", "reference_entropy", "number"}, labels)`, tensors `[rows, length]`;
    labels are shifted already, as torchtitan's are. Positions begin anew with each document: choose varlen or flex
    attention, which keep documents apart by them.

    Its steps are the optimizer's: `micro_batches` must be the data-parallel ranks times the accumulation steps. Where
    partitions end at different places, the last steps of the data cannot be dealt out to ranks in equal parts, and the
    loader ends before them, with a warning.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        """See `sluice_feed.ScoredStream`, which the settings are of."""

        topic: str = ""
        bootstrap_servers: str = "localhost:9092"
        tokenizer_file: str = ""
        """`tokenizer.json`, its folder, or its SHA-256."""
        micro_batches: int = 1
        """Of a step, over all data-parallel ranks."""
        vocab_size: int | None = None
        epochs: int | None = 1
        shuffle_buffer: int = 1
        seed: int = 0

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_given: Any
    ) -> None:
        self.stream: Any = ScoredStream(
            config.topic,
            bootstrap_servers=config.bootstrap_servers,
            tokenizer=config.tokenizer_file,
            vocab_size=config.vocab_size,
            batch_size=local_batch_size,
            sequence_length=seq_len,
            micro_batches=config.micro_batches,
            epochs=config.epochs,
            shuffle_buffer=config.shuffle_buffer,
            seed=config.seed,
            rank=dp_rank,
            world_size=dp_world_size,
        )
        if config.micro_batches % dp_world_size != 0:
            raise ConfigurationError(
                f"micro_batches={config.micro_batches} cannot be dealt out to {dp_world_size} data-parallel ranks: give a"
                " multiple of them"
            )
        self.of_rank = config.micro_batches // dp_world_size
        self._left = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for batches in self.stream.steps():
            if len(batches) > self.of_rank:
                _LOGGER.warning(
                    "the last steps of the data have more than %d micro-batches for a rank, and torchtitan takes as many"
                    " in each: ending before step %d; some documents of the longest partitions are not learnt from",
                    self.of_rank,
                    batches[0]["step"],
                )
                return
            empty = {**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORE_INDEX), "number": None}
            filled = batches + [empty] * (self.of_rank - len(batches))
            for given_before, batch in enumerate(filled):
                self._left = self.of_rank - given_before - 1
                given = {"input": batch["input_ids"], "positions": batch["position_ids"], "number": batch["number"]}
                yield {**given, **{name: batch[name] for name in SIGNALS}}, batch["labels"]

    def state_dict(self) -> dict[str, Any]:
        """The stream's, of this rank's partitions under names of their own, as DCP needs them."""
        if self._left > 0:
            raise StateError(
                f"{self._left} micro-batches of a step were not given yet: let torchtitan's gradient accumulation be the"
                f" {self.of_rank} that micro_batches makes for each rank"
            )
        state: dict[str, Any] = self.stream.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there; nothing if it is empty."""
        if state_dict:
            self.stream.load_state_dict(state_dict)


class SelectiveCrossEntropy(BaseLoss):  # type: ignore[misc]
    """The cross entropy of the chosen tokens, divided by `global_valid_tokens`; `SelectiveTrainer` corrects the rest.

    Called without gradients and without reference losses (validation), it is that of all tokens.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        """See `sluice_feed.Selection`, which the settings are of."""

        keep: str | None = "0.6"
        """Share, schedule such as linear:0.9:0.6, or adaptive."""
        threshold: float | None = None
        score: str = "excess"
        scope: str = "sequence"
        warmup_steps: int = 0
        entropy_keep: float | None = None
        steps: int | None = None
        seed: int = 0

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.selection = Selection(
            keep=config.keep if config.threshold is None else None,
            threshold=config.threshold,
            score=config.score,
            scope=config.scope,
            warmup_steps=config.warmup_steps,
            entropy_keep=config.entropy_keep,
            steps=config.steps,
            seed=config.seed,
        )
        self.fn = _token_losses
        self._maybe_compile(compile_config)
        #: For the next call: signals, step, number and group, from `SelectiveTrainer`.
        self.given: dict[str, Any] = {}
        #: Of the last call.
        self.chosen: KeptSum | None = None

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class. `pred`: logits `[rows, length, vocabulary]`; `labels`: `[rows, length]`."""
        if hasattr(pred, "placements") or hasattr(labels, "placements"):
            raise ConfigurationError("logits are split over tensor-parallel ranks: the selective loss needs them whole")
        losses = self.fn(pred, labels).view(labels.shape)
        is_labelled = labels != IGNORE_INDEX
        given, self.given = self.given, {}
        if not given and pred.requires_grad:
            raise ConfigurationError(
                "the loss was not given reference losses: use sluice_feed.torchtitan.SelectiveTrainer, and ScoredDataLoader"
            )
        if given:
            self.chosen = kept_sum(losses, is_labelled, selection=self.selection, **given)
            total = self.chosen.total
        else:
            total = losses.masked_fill(~is_labelled, 0.0).sum()
        return (total if global_valid_tokens is None else total / global_valid_tokens), {}


class SelectiveTrainer(Trainer):  # type: ignore[misc]
    """torchtitan's trainer, for `ScoredDataLoader` and `SelectiveCrossEntropy`."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        """torchtitan's own."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.check()

    def check(self) -> None:
        """Refuses what would be wrong without a sound.

        Raises:
            ConfigurationError: says which setting, and what to do.
        """
        selection = self.loss_fn.selection
        dimensions, accumulation = self.parallel_dims, self.gradient_accumulation_steps
        refusals = [
            (dimensions.pp_enabled, "pipeline parallelism: the loss is of one stage, which has no reference losses"),
            (dimensions.tp_enabled, "tensor parallelism: logits are split over ranks"),
            (dimensions.cp_enabled, "context parallelism: sequences are split over ranks"),
            (
                not self.config.training.disable_cuda_graphs,
                "CUDA graphs: they would go on with the first reference losses. Set training.disable_cuda_graphs",
            ),
            (
                selection.scope == "batch" and selection.threshold is None and accumulation > 1,
                "scope batch with gradient accumulation: micro-batches are run one after the other. Choose scope sequence or"
                " micro-batch, or a threshold",
            ),
            (
                getattr(self.dataloader, "of_rank", accumulation) != accumulation,
                f"{accumulation} micro-batches for a rank in a step, of which the loader's micro_batches makes"
                f" {getattr(self.dataloader, 'of_rank', None)}: give it the data-parallel ranks times {accumulation}",
            ),
        ]
        for is_wrong, message in refusals:
            if is_wrong:
                raise ConfigurationError(f"selective training in torchtitan does not go with {message}")
        self._micro_batch = 0
        self._kept: Tensor | None = None
        self._loss: Tensor | None = None

    def forward_backward_step(self, *, input_dict: dict[str, Any], labels: Tensor, global_valid_tokens: Tensor) -> Tensor:
        """torchtitan's, of the chosen tokens. What a step's calls return adds up to this rank's part of the mean loss."""
        signals = {name: input_dict.pop(name) for name in SIGNALS if name in input_dict}
        group = self.parallel_dims.get_mesh("batch").get_group() if self.parallel_dims.dp_enabled else None
        number = input_dict.pop("number", None)
        self.loss_fn.given = {"signals": signals, "step": self.step, "number": number, "group": group}
        loss = super().forward_backward_step(input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens)
        loss, kept = loss.detach(), self.loss_fn.chosen.kept_count
        self._loss = loss if self._loss is None else self._loss + loss
        self._kept = kept.clone() if self._kept is None else self._kept + kept
        self._micro_batch += 1
        if self._micro_batch < self.gradient_accumulation_steps:
            return torch.zeros_like(loss)
        if group is not None:
            dist.all_reduce(self._kept, group=group)
        factor = global_valid_tokens.clamp(min=1).to(loss.dtype) / self._kept.clamp(min=1)
        multiply_gradients((parameter for part in self.model_parts for parameter in part.parameters()), factor)
        total = self._loss * factor
        self._micro_batch, self._kept, self._loss = 0, None, None
        return total


def _token_losses(pred: Tensor, labels: Tensor) -> Tensor:
    """`[rows * length]`, in nats; 0 where there is no label."""
    return torch.nn.functional.cross_entropy(
        pred.flatten(0, 1).float(), labels.flatten(0, 1), reduction="none", ignore_index=IGNORE_INDEX
    )
