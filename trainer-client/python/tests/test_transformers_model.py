"""`SelectiveTrainer` computes the loss that a model would, and refuses what would be wrong without a sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import LaneStream, Rows, micro_batch, tiny_llama, token_losses
from sluice_feed import ConfigurationError, RankError, Selection
from sluice_feed.transformers import SelectiveTrainer, collate_rows
from sluice_feed.transformers.forward import ARGUMENT, install
from sluice_feed.transformers.micro_batch import MicroBatch
from torch import nn
from trainer_run import arguments, logged, run
from transformers import GraniteConfig, GraniteForCausalLM

LOSSES = 1e-5


# Models, and what they are called with.


def granite() -> GraniteForCausalLM:
    """It divides its logits, and its head is not tied."""
    torch.manual_seed(3)
    config = GraniteConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        logits_scaling=8.0,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return GraniteForCausalLM(config).to(torch.float64)


def test_logits_are_scaled_as_the_model_scales_them(tmp_path: Path) -> None:
    trainer = run(tmp_path, Selection(keep=1.0), LaneStream([2, 2], 1), model=granite(), max_steps=1)
    batch = micro_batch(0, 0)
    expected = token_losses(granite(), batch).sum() / (batch["labels"] != -100).sum()
    assert logged(trainer)[0]["loss"] == pytest.approx(expected.item(), abs=LOSSES)


def test_a_head_that_does_something_else_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 1.5)
    with pytest.raises(ConfigurationError, match="otherwise than by one matrix"):
        run(tmp_path, Selection(keep=0.5), LaneStream([2, 2], 1), model=model, max_steps=1)


def test_a_forward_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    trainer = SelectiveTrainer(tiny_llama(), arguments(tmp_path), train_dataset=LaneStream([2, 2], 1), keep=0.5)
    trainer._step = object()
    trainer.model.forward = lambda **_given: {"loss": torch.tensor(0.0)}
    batch = MicroBatch(micro_batch(0, 0), number=0, step=1)
    with pytest.raises(ConfigurationError, match="its forward was replaced"):
        trainer.compute_loss(trainer.model, {ARGUMENT: batch})


def test_the_model_still_does_what_it_did(tmp_path: Path) -> None:
    trainer = run(tmp_path, Selection(keep=0.5), LaneStream([4, 4], 1))
    trainer.save_model(str(tmp_path / "saved"))
    plain = type(trainer.model).from_pretrained(tmp_path / "saved", attn_implementation="eager", dtype=torch.float64)
    tokens = micro_batch(0, 0)["input_ids"]
    torch.testing.assert_close(trainer.model(tokens).logits, plain(tokens).logits)


class Called(Exception):
    """Ends a forward once it is known what the backbone is called with."""


def note_call(_module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
    raise Called(given)


@pytest.mark.parametrize("has_boundaries", [True, False])
def test_rows_become_one_for_flash_attention(has_boundaries: bool) -> None:
    """It reads documents' boundaries from position_ids in a batch of one row alone; in more rows all would attend."""
    model = tiny_llama()
    model.model.register_forward_pre_hook(note_call, with_kwargs=True)
    install(model)
    model.forward.is_checked = True
    model.config._attn_implementation = "flash_attention_2"
    given = micro_batch(0, 0)
    # Documents of 5 and 4 tokens, then 3 of padding, whose positions are 0; documents of 3 and 8, then 1.
    starts = [0, 5, 9, 10, 11, 12, 15, 23, 24]
    if has_boundaries:
        starts = [0, 5, 9, 12, 15, 23, 24]
        given.update(cu_seqlens=torch.tensor(starts, dtype=torch.int32), max_seqlen=8)
    batch = MicroBatch(given, number=0, step=1)
    batch.selection = Selection(keep=0.5)
    with pytest.raises(Called) as noted:
        model(**{ARGUMENT: batch})
    (called,) = noted.value.args
    assert called["input_ids"].shape == called["position_ids"].shape == (1, 24)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert called[name].tolist() == starts
        assert called[name].dtype == torch.int32
    assert called["max_length_q"] == called["max_length_k"] == 8
    assert called["use_cache"] is False
    assert "attention_mask" not in called


def test_tokens_whose_loss_is_not_a_number_are_told_of(tmp_path: Path) -> None:
    """None is kept, and the loss of no token is 0: a model that has broken down looks like a perfect one."""
    model = granite()
    batch = micro_batch(0, 0)
    with torch.no_grad():
        model.model.embed_tokens.weight[batch["input_ids"][0, 0]] = torch.nan
    trainer = run(tmp_path, Selection(keep=1.0), LaneStream([2, 2], 1), model=model, max_steps=1)
    (line,) = logged(trainer)
    assert line["loss"] == 0.0
    assert line["lost_tokens"] == int((batch["labels"] != -100).sum())
    assert line["kept_share"] == 0.0


# What would be wrong without a sound is refused.


def test_unshifted_labels_are_refused(tmp_path: Path) -> None:
    rows = Rows(2)
    for batch in rows.batches:
        batch["labels"] = batch["input_ids"].clone()
    with pytest.raises(ConfigurationError, match="would learn to repeat its input"):
        run(tmp_path, Selection(keep=0.5), rows, max_steps=1)


def test_a_missing_reference_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs the signal 'reference_loss'"):
        run(tmp_path, Selection(keep=0.5), Rows(2, names=("input_ids", "labels")), max_steps=1)


def test_accumulation_that_the_stream_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="micro_batches=2, or leave gradient_accumulation_steps at 1"):
        run(tmp_path, Selection(keep=0.5), LaneStream([4, 4], 1), gradient_accumulation_steps=2)


def test_a_stream_of_other_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the stream is of 2 ranks and the trainer has 1"):
        run(tmp_path, Selection(keep=0.5), LaneStream([4, 4], 2, rank=0, world_size=2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"selection": Selection(keep=0.5, scope="running-quantile")}, "running-quantile has a threshold"),
        ({"selection": Selection(keep=0.5, score="improvement")}, "the losses of an earlier model"),
        ({"keep": 0.5, "compute_loss_func": lambda *_given: None}, "compute_loss_func would not be called"),
        ({"keep": 0.5, "compute_metrics": lambda _given: {}}, "compute_metrics needs logits"),
        ({}, "give one of selection= and keep="),
        ({"keep": 0.5, "selection": Selection(keep=0.5)}, "give one of selection= and keep="),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SelectiveTrainer(tiny_llama(), arguments(tmp_path), train_dataset=LaneStream([2], 1), **given)


def test_arguments_that_do_not_go_with_it_are_refused(tmp_path: Path) -> None:
    settings = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ConfigurationError, match="label smoothing"):
        SelectiveTrainer(tiny_llama(), settings, train_dataset=LaneStream([2], 1), keep=0.5)


def test_router_losses_are_refused() -> None:
    model = tiny_llama()
    model.config.output_router_logits = True
    with pytest.raises(ConfigurationError, match="the loss of its router"):
        install(model)


def test_rows_are_padded_to_the_longest() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [2, 3, -100], "reference_loss": [0.5, None, None]},
        {"input_ids": [4], "labels": [-100], "reference_loss": [None]},
    ]
    batch = collate_rows(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["labels"].tolist() == [[2, 3, -100], [-100, -100, -100]]
    assert batch["reference_loss"].isnan().tolist() == [[False, True, True], [True, True, True]]
    with pytest.raises(ConfigurationError, match="row 0 of the batch differ in length"):
        collate_rows([{"input_ids": [1, 2], "labels": [2]}])
    with pytest.raises(ConfigurationError, match="row 1 of the batch lacks"):
        collate_rows([rows[0], {"input_ids": [1], "labels": [-100]}])


def test_a_rank_without_anything_is_told_of(tmp_path: Path) -> None:
    trainer = SelectiveTrainer(tiny_llama(), arguments(tmp_path), train_dataset=LaneStream([2], 1), keep=0.5)

    class OneOfTwo:
        size, rank, group = 2, 1, None

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values + 1

    with pytest.raises(RankError, match="this one has none at all"):
        trainer._any_rank_has([], OneOfTwo(), torch.device("cpu"))
