"""Selective language modeling in TRL's `SFTTrainer`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from sluice_feed._core import ConfigurationError
from sluice_feed.transformers.data import gives_steps
from sluice_feed.transformers.settings import check
from sluice_feed.transformers.trainer import SelectiveMixin


class SelectiveSFTTrainer(SelectiveMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's `SFTTrainer` with `SelectiveMixin`, whose docstring says what `train_dataset` may be, and how labels are.

    A stream, which SFTTrainer would refuse for not being of `datasets`, is read as it is. TRL's preparation of datasets is
    skipped: rows must have `input_ids`, SHIFTED `labels` and `reference_loss`. Its token accuracy and entropy, and its own
    losses (`loss_type`), are not computed.
    """

    def __init__(self, *args: Any, train_dataset: Any = None, **kwargs: Any) -> None:
        settings = args[1] if len(args) > 1 else kwargs.get("args")
        if not isinstance(settings, SFTConfig):
            raise ConfigurationError("give args=SFTConfig(...): preparation of the dataset is switched off in it")
        if getattr(settings, "packing", False):
            raise ConfigurationError("packing takes reference losses from their tokens; a stream's rows are packed already")
        given: Any = settings.dataset_kwargs
        settings.dataset_kwargs = {**(given or {}), "skip_prepare_dataset": True}
        # TRL looks at a first row before anything is read.
        stand_in = Dataset.from_list([{"input_ids": [0], "labels": [-100]}])
        super().__init__(*args, train_dataset=stand_in if gives_steps(train_dataset) else train_dataset, **kwargs)
        self.train_dataset = train_dataset
        check(self)
