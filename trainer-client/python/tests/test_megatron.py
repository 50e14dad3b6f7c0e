"""Megatron's `loss_func` with `--calculate-per-token-loss` makes the steps of a plain loop."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, Callable

import pytest
import torch
import torch.distributed as dist
from adapter_support import CLIP, RATE, LaneStream, plain_step, tiny_llama, token_losses
from megatron.core.pipeline_parallel import schedules
from sluice_feed import ConfigurationError, Selection
from sluice_feed.megatron import inputs, selective_loss_func
from torch_support import in_processes

Function = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
SEQUENCE = Selection(keep=0.5, scope="sequence")


def micro_batches() -> list[dict[str, Any]]:
    batches = LaneStream([4, 4], 3).next_step()
    assert batches is not None
    return batches


def test_micro_batches_have_megatrons_names() -> None:
    batch = micro_batches()[0]
    batch["cu_seqlens"] = torch.tensor([0, 5, 9, 12, 15, 23, 24], dtype=torch.int32)
    given = inputs(batch, "cpu")
    is_labelled = batch["labels"] != -100
    assert torch.equal(given["tokens"], batch["input_ids"])
    assert torch.equal(given["loss_mask"], is_labelled.float())
    assert torch.equal(given["labels"][is_labelled], batch["labels"][is_labelled])
    # A label below zero would be an index into the vocabulary.
    assert not given["labels"][~is_labelled].any()
    assert torch.equal(given["cu_seqlens"], batch["cu_seqlens"])


def own_schedule(function: Function, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total, count, _ = function(losses)
    return total, count


def megatrons_schedule(function: Function, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What Megatron makes of what a loss_func returns."""
    config = SimpleNamespace(calculate_per_token_loss=True, timers=None)
    total, count = schedules.forward_step_calc_loss(
        None, losses, function, config, None, False, 3, [], cp_group_size=1, is_last_stage=True
    )
    return total, count


@pytest.mark.parametrize("schedule", [own_schedule, megatrons_schedule])
def test_a_step_of_several_micro_batches_is_a_plain_loops(schedule: Any) -> None:
    plain = tiny_llama()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    expected = plain_step(plain, micro_batches(), SEQUENCE, step=1)

    model = tiny_llama()
    counts = torch.zeros((), dtype=torch.int)
    sums = torch.zeros(())
    for index, batch in enumerate(micro_batches()):
        given = inputs(batch, "cpu")
        function = partial(
            selective_loss_func,
            given["loss_mask"],
            given["reference_loss"],
            selection=SEQUENCE,
            step=1,
            number=index,
            micro_batches=3,
        )
        total, count = schedule(function, token_losses(model, batch))
        total.backward()
        sums += total.detach()
        # Megatron adds counts up in an int32 of its own.
        counts += count
    assert (sums / counts).item() == pytest.approx(expected["loss"], abs=1e-5)
    gradients = {name: parameter.grad / counts for name, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        change = (before[name] - plain.state_dict()[name]) / RATE
        torch.testing.assert_close(gradient * CLIP / norm, change, rtol=0.0, atol=1e-6, msg=name)


def test_the_report_is_of_the_kept_tokens() -> None:
    losses = torch.tensor([[3.0, 1.0, 5.0, 9.0]])
    mask, reference = torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    total, count, report = selective_loss_func(mask, reference, losses, selection=Selection(threshold=1.5), step=1)
    assert (total.item(), count.item(), count.dtype) == (8.0, 2, torch.int32)
    assert report["lm loss"].tolist() == [8.0, 2.0]


def test_losses_of_the_model_may_have_any_shape_of_as_many() -> None:
    mask = torch.ones(2, 3)
    losses = torch.arange(6.0)
    _, count, _ = selective_loss_func(mask, torch.zeros(2, 3), losses, selection=Selection(threshold=3.5), step=1)
    assert count.item() == 2


def test_scope_batch_over_several_micro_batches_is_refused() -> None:
    one = torch.ones(1, 2)
    with pytest.raises(ConfigurationError, match="all 4 micro-batches of a step, but Megatron runs them one"):
        selective_loss_func(one, one, one, selection=Selection(keep=0.5), step=1, micro_batches=4)


def _tensor_parallel(rank: int, size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    losses = torch.rand(4, 16, generator=generator)
    # As if sums had been added up in another order on the other rank: nearly every token ties.
    losses = (losses * 4).round() + (1e-6 * rank) * torch.rand(4, 16, generator=generator)
    mask = torch.ones(4, 16)
    losses.requires_grad_()
    group = dist.new_group(list(range(size)))
    total, _, _ = selective_loss_func(
        mask, torch.zeros(4, 16), losses, selection=SEQUENCE, step=1, tensor_parallel_group=group
    )
    total.backward()
    kept = losses.grad
    of_all = [torch.empty_like(kept) for _ in range(size)]
    dist.all_gather(of_all, kept)
    assert all(torch.equal(kept, other) for other in of_all)
    assert 0 < kept.sum() < kept.numel()


def test_tensor_parallel_ranks_keep_the_same_tokens() -> None:
    in_processes(2, _tensor_parallel)
