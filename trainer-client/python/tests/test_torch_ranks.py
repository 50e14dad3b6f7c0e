"""The golden step under DDP and FSDP2: its two rows on two ranks, one choice and one loss over both."""

from __future__ import annotations

import copy
from typing import Any, Callable

import pytest
import torch
import torch.distributed as dist
from sluice_feed._core import Selection
from sluice_feed.torch import SelectiveLoss, SelectiveModel, masked_mean, select, selective_loss
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch_support import GoldenStep, in_processes

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}


def ddp(model: SelectiveModel) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(reshards: bool, **options: Any) -> Callable[[SelectiveModel], nn.Module]:
    def shard(model: SelectiveModel) -> nn.Module:
        layers: Any = model.backbone.layers
        for layer in layers:
            fully_shard(layer, **options)
        fully_shard(model, reshard_after_forward=reshards, **options)
        return model

    return shard


ENGINES = {"ddp": ddp, "fsdp2": fsdp(reshards=False), "fsdp2, made whole again": fsdp(reshards=True)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by the parameters' own names."""
    whole = {}
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        gradient = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
        whole[name.removeprefix("module.")] = gradient
    return whole


def mean_over_ranks(value: Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def check_step(golden: GoldenStep, wrap: Callable[[SelectiveModel], nn.Module], rank: int) -> None:
    model, row = wrap(golden.model()), slice(rank, rank + 1)
    result: SelectiveLoss = model(golden.labels[row], golden.reference_loss[row], inputs=golden.inputs(row), keep=0.6)
    result.loss.backward()
    tolerance = TOLERANCE[golden.dtype]
    assert torch.equal(result.kept, golden.kept[row])
    assert result.kept_count == golden.kept.sum()
    assert mean_over_ranks(result.loss) == pytest.approx(golden.record["loss"], abs=tolerance)
    losses = golden.losses[row].to(golden.dtype)
    torch.testing.assert_close(result.token_losses, losses, rtol=tolerance, atol=tolerance, equal_nan=True)
    golden.assert_gradients(gradients(model), tolerance)


def check_accumulation(golden: GoldenStep, wrap: Callable[[SelectiveModel], nn.Module], rank: int) -> None:
    """Each rank has its row and an empty one, which has nothing to choose from: two micro-batches a rank."""
    model = wrap(golden.model())
    row = slice(rank, rank + 1)
    nothing = torch.full_like(golden.labels[row], -100)
    # The ranks take their rows at different moments.
    parts = [golden.labels[row], nothing] if rank == 0 else [nothing, golden.labels[row]]
    numbers = [0, 2] if rank == 0 else [3, 1]
    with torch.no_grad():
        losses = [model(part, inputs=golden.inputs(row), only_token_losses=True) for part in parts]
    signals = [{"loss": own, "reference_loss": golden.reference_loss[row]} for own in losses]
    kept = select(signals, Selection(keep=0.6), row_len=golden.labels.shape[1], step=1, numbers=numbers)
    divisor = torch.stack([mask.sum() for mask in kept]).sum()
    dist.all_reduce(divisor)
    loss = torch.zeros((), dtype=golden.dtype)
    for part, mask in zip(parts, kept):
        result = model(part, inputs=golden.inputs(row), kept=mask, divisor=divisor)
        result.loss.backward()
        loss += result.loss.detach()
    assert mean_over_ranks(loss) == pytest.approx(golden.record["loss"], abs=1e-8)
    golden.assert_gradients(gradients(model), 1e-8)


def check_no_labels(golden: GoldenStep, wrap: Callable[[SelectiveModel], nn.Module], rank: int) -> None:
    """A rank without a label waits for nobody and nobody for it; nor is there trouble where no rank has one."""
    for ranks_with_labels in ([0], []):
        model, row = wrap(golden.model()), slice(0, 1)
        labels = golden.labels[row] if rank in ranks_with_labels else torch.full_like(golden.labels[row], -100)
        result = model(labels, golden.reference_loss[row], inputs=golden.inputs(row), keep=0.6)
        result.loss.backward()
        found = gradients(model)
        alone = golden.model()
        if ranks_with_labels:
            expected = selective_loss(
                alone.backbone(**golden.inputs(row)),
                alone.head.weight,
                golden.labels[row],
                kept=result.kept if rank == 0 else expected_kept(golden),
                averaged_over=1,
                divisor=result.kept_count,
            )
            expected.loss.backward()
            for name, weight in alone.named_parameters():
                torch.testing.assert_close(found[name], weight.grad)
        else:
            assert result.loss == 0 and result.kept_count == 0
            assert not any(gradient.any() for gradient in found.values())


def expected_kept(golden: GoldenStep) -> Tensor:
    """What one rank alone keeps of the first row."""
    signals = {"loss": golden.losses[:1].float().flatten(), "reference_loss": golden.reference_loss[:1].flatten()}
    given = {name: values.numpy() for name, values in signals.items()}
    return torch.from_numpy(Selection(keep=0.6).select([given], golden.labels.shape[1], 1)[0]).view(1, -1)


def check_tied(rank: int, wrap: Callable[[SelectiveModel], nn.Module]) -> None:
    """A head that is the embedding, with rows of several lengths' worth of labels on each rank."""
    golden = GoldenStep(torch.float64)
    tied = golden.model()
    tied.head.weight = tied.backbone.embed_tokens.weight
    alone, both = copy.deepcopy(tied), slice(None)
    alone.head.weight = alone.backbone.embed_tokens.weight
    kept = golden.labels != -100
    selective_loss(
        alone.backbone(**golden.inputs(both)),
        alone.head.weight,
        golden.labels,
        kept=kept,
        averaged_over=1,
        divisor=kept.sum(),
    ).loss.backward()
    model, row = wrap(tied), slice(rank, rank + 1)
    model(golden.labels[row], inputs=golden.inputs(row), kept=kept[row]).loss.backward()
    found = gradients(model)
    expected = {name: weight.grad for name, weight in alone.named_parameters()}
    assert found.keys() == expected.keys() and "head.weight" not in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def check_half_precision(rank: int) -> None:
    """FSDP2 casts what a module is given, unless told not to; losses that it has rounded are refused."""
    golden, row = GoldenStep(torch.float32), slice(rank, rank + 1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    given = golden.labels[row], golden.reference_loss[row]
    model = fsdp(reshards=True, mp_policy=policy)(golden.model())
    with pytest.raises(ValueError, match="cast_forward_inputs=False"):
        model(*given, inputs=golden.inputs(row), keep=0.6)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model = fsdp(reshards=True, mp_policy=policy)(golden.model())
    result = model(*given, inputs=golden.inputs(row), kept=golden.kept[row])
    result.loss.backward()
    # Two layers of eight bits each: a hundredth of a nat.
    assert mean_over_ranks(result.loss) == pytest.approx(golden.record["loss"], abs=0.03)
    golden.assert_gradients(gradients(model), 0.05)


def check_sharded_head(rank: int) -> None:
    golden, row = GoldenStep(torch.float64), slice(rank, rank + 1)
    model = golden.model()
    fully_shard(model.head)
    with pytest.raises(ValueError, match="head_weight is a DTensor"):
        model(golden.labels[row], golden.reference_loss[row], inputs=golden.inputs(row), keep=0.6)


def check_masked_mean(rank: int) -> None:
    losses = torch.tensor([1.0, 2.0, 6.0]) * (rank + 1)
    losses.requires_grad_()
    kept = torch.tensor([True, False, True]) if rank == 0 else torch.tensor([False, True, False])
    mean = masked_mean(losses, kept)
    # 1 and 6 of one rank, 4 of the other.
    assert mean_over_ranks(mean) == pytest.approx(11 / 3)
    (gradient,) = torch.autograd.grad(mean, losses)
    torch.testing.assert_close(gradient, kept * 2 / 3)


def check_groups(rank: int) -> None:
    """A group of one rank chooses and divides by itself; a group of others is refused."""
    groups: list[Any] = [dist.new_group([member]) for member in range(2)]
    losses, kept = torch.tensor([1.0, 3.0]), torch.tensor([True, rank == 1])
    assert masked_mean(losses, kept, group=groups[rank]).item() == 1.0 + rank
    signals = {"loss": torch.tensor([1.0, 2.0]) * (rank + 1), "reference_loss": torch.zeros(2)}
    (mask,) = select([signals], Selection(keep=0.5), row_len=2, step=1, group=groups[rank])
    assert mask.tolist() == [False, True]
    with pytest.raises(ValueError, match=f"rank {rank} is not in the process group"):
        select([signals], Selection(keep=0.5), row_len=2, step=1, group=groups[1 - rank])


def check_ties(rank: int) -> None:
    """Of equal losses those of the lower number win, which is the rank unless another is given."""
    hidden, weight, labels = torch.zeros(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
    for number, winner in ((None, 0), (1 - rank, 1)):
        result = selective_loss(hidden, weight, labels, torch.zeros(4), keep=0.5, number=number)
        assert result.kept.tolist() == [rank == winner] * 4


def on_each_rank(rank: int, size: int) -> None:
    assert size == 2
    for wrap in ENGINES.values():
        for dtype in TOLERANCE:
            check_step(GoldenStep(dtype), wrap, rank)
        check_accumulation(GoldenStep(torch.float64), wrap, rank)
        check_no_labels(GoldenStep(torch.float64), wrap, rank)
        check_tied(rank, wrap)
    check_half_precision(rank)
    check_sharded_head(rank)
    check_masked_mean(rank)
    check_ties(rank)
    check_groups(rank)


def test_two_ranks() -> None:
    in_processes(2, on_each_rank)
