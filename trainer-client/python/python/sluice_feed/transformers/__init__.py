"""Selective language modeling in Hugging Face's `Trainer`.

    from sluice_feed.transformers import SelectiveTrainer

    trainer = SelectiveTrainer(model, arguments, train_dataset=stream, keep=0.6)
    trainer.train()

* :class:`SelectiveTrainer`: a `Trainer` that learns from the chosen tokens of a scored stream, or of rows with losses.
* :class:`SelectiveMixin`: the same before another subclass, such as TRL's `SFTTrainer` (see `sluice_feed.trl`).
* :func:`collate_rows`: rows of a dataset as a micro-batch.

LABELS ARE ALREADY SHIFTED: `labels[i]` is the token that position `i` predicts. Models of transformers take unshifted ones.
"""

from __future__ import annotations

from sluice_feed.transformers.data import collate_rows
from sluice_feed.transformers.trainer import SelectiveMixin, SelectiveTrainer

__all__ = ["SelectiveMixin", "SelectiveTrainer", "collate_rows"]
