"""A `Trainer` that learns from chosen tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sluice_feed import ScoredStream
from sluice_feed._core import ConfigurationError, RankError, Selection
from sluice_feed.torch import SelectiveLoss
from sluice_feed.torch.distributed import Ranks
from sluice_feed.transformers.checkpoint import load_state, save_state
from sluice_feed.transformers.data import StepLoader, collate_rows, gives_steps
from sluice_feed.transformers.forward import ARGUMENT, install, is_installed
from sluice_feed.transformers.meter import Meter
from sluice_feed.transformers.micro_batch import SIGNALS, MicroBatch
from sluice_feed.transformers.settings import check
from sluice_feed.transformers.step import SelectiveStep


class SelectiveMixin:
    """Selective language modeling (Rho-1, arXiv 2404.07965, equation 4) for a subclass of transformers' `Trainer`.

    Put it before the trainer: `class Mine(SelectiveMixin, Trainer)`. All arguments go to the trainer but those below.

    LABELS ARE ALREADY SHIFTED in everything that this trainer learns from: `labels[i]` is the token that position `i`
    predicts, -100 none. (Models of transformers shift labels themselves; here they never see them.) Batches for evaluation
    that have no `reference_loss` go the trainer's own way, with labels as transformers wants them.

    `train_dataset` is one of

    * a stream: `sluice_feed.torch.ScoredStream`, or what has a method `steps()` that gives, for each step of the optimizer,
      the list of this rank's micro-batches (dictionaries as `sluice_feed.torch.tensors` makes them). Its own settings say
      how many there are in a step; leave `gradient_accumulation_steps` at 1, or at what they say. `max_steps` must be set;
      the training ends earlier if the stream does. Its state is in every checkpoint, a file for each rank, and
      `resume_from_checkpoint` goes on from it, on any number of ranks.
    * a dataset of rows: dictionaries of `input_ids`, shifted `labels`, `reference_loss`, `position_ids`..., which the
      trainer samples, deals out and skips as always. `collate_rows` puts them together, unless `data_collator` is given.

    A model's log has `kept_share` (of the labelled tokens) beside `loss`, which is the mean over the kept tokens of all
    ranks and micro-batches of a step, in nats, and `all_tokens_loss` where all losses are known.

    Args:
        selection: how tokens are chosen. Scope `batch` is over all micro-batches of all ranks in a step; with several
            micro-batches in a step it costs a second forward pass.
        keep: in its place the share to keep by excess loss, such as 0.6.

    Raises:
        ConfigurationError: a setting that a selective step does not go with; it says which, and what to do.
    """

    # Names of the trainer that the mixin stands before.
    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    control: Any
    state: Any
    train_dataset: Any
    #: For transformers: losses are divided for a whole step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, selection: Selection | None = None, keep: float | str | None = None, **kwargs: Any
    ) -> None:
        if (selection is None) == (keep is None):
            raise ConfigurationError("give one of selection= and keep=: how tokens are chosen, or the share to keep")
        self.selection = Selection(keep=keep) if selection is None else selection
        if len(args) < 3 and kwargs.get("data_collator") is None:
            # Collators of others leave reference losses out.
            kwargs["data_collator"] = collate_rows
        super().__init__(*args, **kwargs)
        # Before version 5.15 the Trainer goes by this one: losses are not divided by accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self._step: SelectiveStep | None = None
        self._saved_at = 0
        self._meter = Meter(Ranks())
        check(self)

    def _reads_steps(self) -> bool:
        return gives_steps(self.train_dataset)

    # What is read.

    def get_train_dataloader(self) -> Any:
        """A loader of the stream's steps; the trainer's own for a dataset of rows."""
        if self._reads_steps():
            return StepLoader(self.train_dataset)
        return super().get_train_dataloader()  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        # Otherwise the Trainer removes these columns, for no forward takes them.
        self._signature_columns: list[str] = list(
            dict.fromkeys([*self._signature_columns, "input_ids", "labels", "position_ids", *SIGNALS])
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of the next step, each with what its forward will need.

        The Trainer would count labels here, and divide by them; but only the kept tokens are learnt from.
        """
        batches = self._next_batches(epoch_iterator, num_batches)
        ranks = Ranks()
        if not self._any_rank_has(batches, ranks, device):
            # The Trainer would ask for every step up to max_steps, and then begin another epoch.
            self.control.should_training_stop = True
            # The last steps before a stream's end belong to a checkpoint too.
            has_news = self._step is not None and self._saved_at != self.state.global_step
            self.control.should_save |= has_news and self.args.save_strategy in ("steps", "epoch")
            return [], None
        batches = self._filled(batches, num_batches)
        for batch in batches:
            batch.to(device)
        labelled = ranks.sum(torch.stack([batch.labelled for batch in batches]).sum())
        self._step = SelectiveStep(batches, self.selection, ranks, labelled)
        self.model_wrapped.train()
        self._step.prepare(self.model_wrapped)
        # The Trainer counts as many micro-batches in a step as it was told of; the last carries what is more.
        dealt = [batches[index : index + 1] for index in range(num_batches - 1)] + [batches[num_batches - 1 :]]
        return [{"input_ids": own[0].input_ids, ARGUMENT: tuple(own)} for own in dealt], labelled

    def _next_batches(self, iterator: Iterator[Any], num_batches: int) -> list[MicroBatch]:
        if self._reads_steps():
            read: list[Mapping[str, Any]] = list(next(iterator, []))
        else:
            read = list(islice(iterator, num_batches))
        step = self.state.global_step + 1
        ranks = Ranks()
        batches = []
        for index, batch in enumerate(read):
            # None is a number too: of a micro-batch of padding.
            number = batch["number"] if "number" in batch else ranks.rank + index * ranks.size
            batches.append(MicroBatch(batch, number=number, step=batch.get("step", step)))
        if self._step is None and batches:
            self._check_first(batches, num_batches)
        return batches

    def _check_first(self, batches: list[MicroBatch], num_batches: int) -> None:
        if batches[0].is_unshifted():
            raise ConfigurationError(
                "each label is the token at its own position, as models of transformers take them; here labels must be"
                " shifted: labels[i] is the token that position i predicts (input_ids[i + 1]), and reference_loss[i] its"
                " loss. The model would learn to repeat its input"
            )
        if self._reads_steps() and num_batches > 1 and len(batches) != num_batches:
            raise ConfigurationError(
                f"a step of the stream has {len(batches)} micro-batches for this rank, but gradient_accumulation_steps is"
                f" {num_batches}. The stream decides (ScoredStream's micro_batches, over all ranks): give it"
                f" micro_batches={num_batches * Ranks().size}, or leave gradient_accumulation_steps at 1"
            )

    def _any_rank_has(self, batches: list[MicroBatch], ranks: Ranks, device: torch.device) -> bool:
        """Whether a step is to be taken. Ranks of a ScoredStream have agreed on it; others could differ at the end."""
        if ranks.size == 1 or isinstance(self.train_dataset, ScoredStream):
            return bool(batches)
        having = int(ranks.sum(torch.tensor(int(bool(batches)), device=device)).item())
        if having > 0 and not batches and self._step is None:
            raise RankError("another rank has micro-batches and this one has none at all: give each rank some")
        return having > 0

    def _filled(self, batches: list[MicroBatch], num_batches: int) -> list[MicroBatch]:
        """With micro-batches to learn nothing from, so that no rank lacks one in a collective, and no step is half done.

        The Trainer takes a step after as many micro-batches as accumulate, and would never take that of the last few.
        """
        example = batches[0] if batches else self._step.batches[0] if self._step is not None else None
        assert example is not None
        return batches + [example.filler() for _ in range(num_batches - len(batches))]

    # What is learnt.

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one of the Trainer's micro-batches; after a step's last, gradients are corrected."""
        step, batches = self._step, inputs[ARGUMENT]
        assert step is not None
        losses = []
        for batch in batches:
            is_last = batch is step.batches[-1]
            given = {"input_ids": batch.input_ids, ARGUMENT: batch}
            if batch is batches[-1]:
                loss = super().training_step(model, given, num_items_in_batch)  # type: ignore[misc]
            else:
                with self.accelerator.no_sync(model):
                    loss = super().training_step(model, given, num_items_in_batch)  # type: ignore[misc]
            losses.append(step.corrected(loss, is_last, model))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the kept tokens, in nats. See `SelectiveMixin` for evaluation."""
        batch = inputs.get(ARGUMENT)
        if batch is None:
            if "reference_loss" in inputs:
                return self._evaluated(model, inputs, return_outputs)
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        output = model(**{ARGUMENT: batch})
        if not isinstance(output, SelectiveLoss):
            raise ConfigurationError(
                "the model did not return a selective loss: its forward was replaced after the training began"
                f" (it returned {type(output).__name__})"
            )
        assert self._step is not None
        self._step.add(output)
        self._meter.add(batch, output)
        return (output.loss, {"loss": output.loss}) if return_outputs else output.loss

    def _evaluated(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        """The mean loss of all labelled tokens of a batch, shifted as those in training."""
        batch = MicroBatch(inputs, number=None, step=1)
        batch.only_token_losses = True
        (losses,) = model(**{ARGUMENT: batch})
        loss = losses.nansum() / batch.labelled.clamp(min=1)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, with what was kept since the last time. All ranks call it."""
        if "loss" in logs:
            logs.update(self._meter.take())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # Where it goes on.

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Here, and not before: `model_init` has made the model, and Liger has replaced its forward.
        self._install()
        self._step = None
        if self._reads_steps():
            # The stream's state says where it goes on; the Trainer would read and throw away what came before.
            self.args.ignore_data_skip = True
            checkpoint = kwargs.get("resume_from_checkpoint")
            if checkpoint is not None and hasattr(self.train_dataset, "load_state_dict"):
                self._load_stream(Path(checkpoint))
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own."""
        self._install()
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _install(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not is_installed(model):
            install(model)

    def _save_rng_state(self, output_dir: str) -> None:
        # Every rank comes here for each checkpoint that can be gone on from, before trainer_state.json makes it one.
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        self._saved_at = self.state.global_step
        if self._reads_steps() and hasattr(self.train_dataset, "state_dict"):
            save_state(
                Path(output_dir),
                self.train_dataset.state_dict(),
                step=self.state.global_step,
                rank=self.args.process_index,
                world_size=self.args.world_size,
            )

    def _load_stream(self, checkpoint: Path) -> None:
        from transformers import TrainerState

        step = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
        state = load_state(checkpoint, step=step, rank=self.args.process_index, world_size=self.args.world_size)
        self.train_dataset.load_state_dict(state)


class SelectiveTrainer(SelectiveMixin, Trainer):  # type: ignore[misc]
    """transformers' `Trainer` with `SelectiveMixin`."""
