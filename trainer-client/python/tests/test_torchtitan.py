"""torchtitan's own classes, with our loader and loss in them."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_support import CLIP, RATE, LaneStream, plain_step, tiny_llama
from sluice_feed import ConfigurationError, Selection, StateError
from sluice_feed.torchtitan import ScoredDataLoader, SelectiveCrossEntropy, SelectiveTrainer
from torch import nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss
from torchtitan.trainer import Trainer


def loader(stream: LaneStream, ranks: int = 1) -> ScoredDataLoader:
    """Built as torchtitan builds one, and then given micro-batches without Kafka."""
    config = ScoredDataLoader.Config(topic="t", tokenizer_file="0" * 64, vocab_size=40, micro_batches=stream.micro_batches)
    built = config.build(
        dp_world_size=ranks, dp_rank=stream.rank, tokenizer=None, seq_len=12, local_batch_size=2, snapshot_every_n_steps=1
    )
    assert isinstance(built, BaseDataLoader)
    built.stream = stream
    return built


def test_the_loader_gives_what_torchtitan_takes() -> None:
    given, labels = next(iter(loader(LaneStream([2, 2], 1))))
    assert given["input"].shape == given["positions"].shape == given["reference_loss"].shape == labels.shape == (2, 12)
    assert (given["input"].dtype, labels.dtype, given["reference_loss"].dtype) == (torch.int64, torch.int64, torch.float32)
    # Shifted already.
    assert labels[0, 0] == given["input"][0, 1]


def test_the_loader_goes_on_on_another_number_of_ranks() -> None:
    whole = LaneStream([4, 4], 2)
    expected = [whole.next_step() for _ in range(3)][2]
    assert expected is not None
    first = loader(LaneStream([4, 4], 2))
    batches = iter(first)
    for _ in range(4):
        next(batches)
    for rank in range(2):
        second = loader(LaneStream([4, 4], 2, rank, 2), ranks=2)
        second.load_state_dict(first.state_dict())
        given, _ = next(iter(second))
        assert torch.equal(given["input"], expected[rank]["input_ids"])


def test_a_state_within_a_step_is_refused() -> None:
    within = loader(LaneStream([4, 4], 2))
    next(iter(within))
    with pytest.raises(StateError, match="1 micro-batches of a step were not given yet"):
        within.state_dict()


def test_a_short_last_step_is_filled_up() -> None:
    labels = [labels for _, labels in loader(LaneStream([2, 1], 2))]
    assert [bool((own != -100).any()) for own in labels] == [True, True, True, False]


def test_steps_that_cannot_be_dealt_out_end_the_data(caplog: pytest.LogCaptureFixture) -> None:
    """Of lanes of 1 and 5, rank 1 of 2 would have both micro-batches of every step but the first."""
    own = [loader(LaneStream([1, 5], 2, rank, 2), ranks=2) for rank in range(2)]
    assert [len(list(one)) for one in own] == [1, 1]
    assert "ending before step 2" in caplog.text


def test_micro_batches_must_divide_among_ranks() -> None:
    with pytest.raises(ConfigurationError, match="micro_batches=3 cannot be dealt out to 2"):
        loader(LaneStream([4, 4], 3), ranks=2)


# The loss, in torchtitan's own forward and backward.


class Decoder(nn.Module):
    """A tiny Llama that is called as torchtitan's models are."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = tiny_llama()

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.llama(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return logits


def trainer(accumulation: int, **settings: Any) -> SelectiveTrainer:
    """With what the methods that are run look at; the rest of torchtitan's needs a GPU."""
    made = SelectiveTrainer.__new__(SelectiveTrainer)
    made.model_parts = [Decoder()]
    made.model_config = None
    made.loss_fn = SelectiveCrossEntropy.Config(**settings).build(compile_config=None)
    assert isinstance(made.loss_fn, BaseLoss)
    made.parallel_dims = SimpleNamespace(
        pp_enabled=False, tp_enabled=False, cp_enabled=False, dp_enabled=False, get_mesh=lambda _name: None
    )
    made.config = SimpleNamespace(
        training=SimpleNamespace(disable_cuda_graphs=True), parallelism=SimpleNamespace(spmd_backend="default")
    )
    made.gradient_accumulation_steps = accumulation
    made.dataloader = SimpleNamespace(of_rank=accumulation)
    made.train_context = contextlib.nullcontext
    made.fwd_bwd_fn = made._forward_backward_body
    made.step, made.ntokens_seen = 1, 0
    made.check()
    return made


@pytest.mark.parametrize(
    ("accumulation", "settings"),
    [(1, {"keep": "0.5", "scope": "batch"}), (2, {"keep": "0.5"}), (2, {"threshold": 0.0, "scope": "micro-batch"})],
)
def test_a_step_is_a_plain_loops(accumulation: int, settings: dict[str, Any]) -> None:
    plain = tiny_llama()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    batches = LaneStream([4, 4], accumulation).next_step()
    assert batches is not None
    made = trainer(accumulation, **settings)
    expected = plain_step(plain, batches, made.loss_fn.selection, step=1)

    data = list(zip(range(accumulation), loader(LaneStream([4, 4], accumulation))))
    valid = torch.stack([(labels != -100).sum() for _, (_, labels) in data]).sum()
    losses = [
        made.forward_backward_step(input_dict=given, labels=labels, global_valid_tokens=valid) for _, (given, labels) in data
    ]
    assert sum(loss.item() for loss in losses) == pytest.approx(expected["loss"], abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in made.model_parts[0].llama.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm.item() == pytest.approx(expected["grad_norm"], abs=1e-4)
    for name, gradient in gradients.items():
        change = (before[name] - plain.state_dict()[name]) / RATE
        # torchtitan's losses, and so its gradients' rounding, are in float32.
        torch.testing.assert_close(gradient * CLIP / norm, change, rtol=0.0, atol=1e-5, msg=name)


def test_validation_is_of_all_tokens() -> None:
    loss = SelectiveCrossEntropy.Config().build(compile_config=None)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [3, -100, -100]])
    value, metrics = loss(logits, labels, torch.tensor(3))
    torch.testing.assert_close(value, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert metrics == {}


def test_a_loss_without_reference_losses_is_refused() -> None:
    loss = SelectiveCrossEntropy.Config().build(compile_config=None)
    with pytest.raises(ConfigurationError, match="was not given reference losses"):
        loss(torch.randn(1, 2, 5, requires_grad=True), torch.tensor([[1, 2]]))


def test_a_schedule_and_a_share_are_read_from_text() -> None:
    def selection(keep: str, **given: Any) -> Selection:
        built: Selection = SelectiveCrossEntropy.Config(keep=keep, **given).build(compile_config=None).selection
        return built

    assert selection("0.25").keep_at(1) == pytest.approx(0.25)
    assert selection("linear:1.0:0.5", steps=3).keep_at(3) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: setattr(made.parallel_dims, "pp_enabled", True), "pipeline parallelism"),
        (lambda made: setattr(made.parallel_dims, "tp_enabled", True), "tensor parallelism"),
        (lambda made: setattr(made.parallel_dims, "cp_enabled", True), "context parallelism"),
        (lambda made: setattr(made.config.training, "disable_cuda_graphs", False), "CUDA graphs"),
        (lambda made: setattr(made, "gradient_accumulation_steps", 2), "scope batch with gradient accumulation"),
        (lambda made: setattr(made.dataloader, "of_rank", 3), "of which the loader's micro_batches makes 3"),
    ],
)
def test_what_it_does_not_go_with_is_refused(change: Any, message: str) -> None:
    made = trainer(1, keep="0.5", scope="batch")
    change(made)
    with pytest.raises(ConfigurationError, match=message):
        made.check()


def test_torchtitan_still_has_what_is_replaced() -> None:
    """Its trainer calls these with these arguments."""
    theirs = inspect.signature(Trainer.forward_backward_step).parameters
    assert list(theirs) == list(inspect.signature(SelectiveTrainer.forward_backward_step).parameters)
    assert SelectiveTrainer.Config._owner is SelectiveTrainer
    assert list(inspect.signature(BaseLoss.__call__).parameters)[:4] == ["self", "pred", "labels", "global_valid_tokens"]
