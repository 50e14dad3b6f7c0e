"""Settings of the Trainer that a selective step does not go with."""

from __future__ import annotations

from typing import Any

from sluice_feed._core import ConfigurationError
from sluice_feed.transformers.data import gives_steps


def check(trainer: Any) -> None:
    """Refuses, in words, what would be wrong without a sound.

    Raises:
        ConfigurationError: says which setting, and what to do.
    """
    arguments = trainer.args
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {name: getattr(parallelism, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")}
    sizes["tp"] = max(sizes["tp"], getattr(trainer.model, "tp_size", None) or 1)
    split = [f"{name}_size={size}" for name, size in sizes.items() if size > 1]
    refusals = [
        (
            trainer.selection.scope == "running-quantile",
            "scope running-quantile has a threshold that the Trainer does not keep in checkpoints: choose scope batch,"
            " micro-batch or sequence",
        ),
        (
            trainer.selection.needs_history_loss and gives_steps(trainer.train_dataset),
            f"score {trainer.selection.score} needs the losses of an earlier model, which a stream does not have: choose"
            " another score, or give a dataset of rows with a column history_loss",
        ),
        (trainer.compute_loss_func is not None, "compute_loss_func would not be called: leave it out"),
        (trainer.label_smoother is not None, "label smoothing is not part of the selective loss: set it to 0"),
        (
            trainer.compute_metrics is not None,
            "compute_metrics needs logits, which never exist as a whole: leave it out, and read eval_loss",
        ),
        (
            arguments.n_gpu > 1,
            f"this one process would use {arguments.n_gpu} GPUs by nn.DataParallel: start one for each, by torchrun"
            f" --nproc-per-node {arguments.n_gpu}, or set CUDA_VISIBLE_DEVICES to one of them",
        ),
        (
            trainer.is_deepspeed_enabled,
            "DeepSpeed keeps gradients where they cannot be corrected: use FSDP (version 2), which shards as much",
        ),
        (
            bool(split),
            f"a sequence or the head is split over ranks ({', '.join(split)}), so that none has what it must choose from:"
            " use FSDP alone, or the hooks of sluice_feed.megatron",
        ),
        (
            arguments.auto_find_batch_size,
            "auto_find_batch_size would try again after micro-batches were taken from the stream: set it to False",
        ),
        (
            getattr(trainer.train_dataset, "world_size", arguments.world_size) != arguments.world_size,
            f"the stream is of {getattr(trainer.train_dataset, 'world_size', None)} ranks and the trainer has"
            f" {arguments.world_size}: make the stream in every process that torchrun starts, without rank and world_size",
        ),
    ]
    for is_wrong, message in refusals:
        if is_wrong:
            raise ConfigurationError(message)
