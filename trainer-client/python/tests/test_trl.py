"""`SFTTrainer` takes the steps of a plain loop too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import LaneStream, Rows, plain_run, tiny_llama
from datasets import Dataset
from sluice_feed import ConfigurationError, Selection
from sluice_feed.trl import SelectiveSFTTrainer
from tokenizers import Tokenizer, models
from trainer_run import arguments, logged
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig


def trainer(folder: Path, train_dataset: Any, **settings: Any) -> SelectiveSFTTrainer:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(40)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    given = {**arguments(folder).to_dict(), "bf16": False, "activation_checkpointing": False, **settings}
    return SelectiveSFTTrainer(
        tiny_llama(),
        SFTConfig(**given),
        train_dataset=train_dataset,
        processing_class=tokenizer,
        selection=Selection(keep=0.5),
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_steps_equal_those_of_a_plain_loop(tmp_path: Path, micro_batches: int) -> None:
    expected, model = plain_run(LaneStream([4, 4], micro_batches), Selection(keep=0.5), steps=3)
    selective = trainer(tmp_path, LaneStream([4, 4], micro_batches), gradient_accumulation_steps=micro_batches)
    selective.train()
    for line, plain in zip(logged(selective), expected):
        assert line["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert line["kept_share"] == pytest.approx(plain["kept_share"])
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(selective.model.state_dict()[name], weight, rtol=0.0, atol=1e-6, msg=name)


def test_rows_keep_their_reference_losses(tmp_path: Path) -> None:
    rows = Rows(4, names=("input_ids", "labels", "position_ids", "reference_loss"))
    selective = trainer(tmp_path, Dataset.from_list([rows[index] for index in range(4)]), max_steps=1)
    selective.train()
    assert logged(selective)[0]["kept_share"] == pytest.approx(0.5, abs=0.1)


def test_packing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="packing takes reference losses"):
        trainer(tmp_path, LaneStream([4], 1), packing=True)
