"""The selective loss against the golden step, and against whole logits, cross entropy and a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sluice_feed._core import Selection
from sluice_feed.torch import SelectiveModel, masked_mean, masked_sum, select, selective_loss, token_losses
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch_support import GoldenStep

POSITIONS, WIDTH, VOCABULARY = 23, 5, 17
# Blocks that end in the midst of rows and columns.
BLOCK = 40
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"logit_softcap": 1.5},
    "all": {"bias": True, "logit_scale": 1.7, "logit_softcap": 2.0},
}


def drawn(dtype: torch.dtype = torch.float64, bias: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    labels[::6] = -100
    given = {"hidden": normal(POSITIONS, WIDTH), "head_weight": normal(VOCABULARY, WIDTH), "labels": labels}
    return {**given, "bias": normal(VOCABULARY) if bias else None}


def plain_losses(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Whole logits and cross entropy; 0 where there is no label."""
    logits = functional.linear(hidden, head_weight, bias) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def a_mask(labels: Tensor) -> Tensor:
    return (labels != -100) & (torch.arange(labels.numel()).view(labels.shape) % 3 > 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_the_golden_step(dtype: torch.dtype, tolerance: float) -> None:
    golden = GoldenStep(dtype)
    model = golden.model()
    result = model(golden.labels, golden.reference_loss, inputs=golden.inputs(slice(None)), keep=0.6, step=1)
    result.loss.backward()
    assert torch.equal(result.kept, golden.kept)
    assert result.kept_count == golden.kept.sum()
    assert result.loss.item() == pytest.approx(golden.record["loss"], abs=tolerance)
    torch.testing.assert_close(result.token_losses, golden.losses.to(dtype), rtol=tolerance, atol=tolerance, equal_nan=True)
    golden.assert_gradients({name: weight.grad for name, weight in model.named_parameters()}, tolerance)


def test_the_golden_step_row_by_row() -> None:
    golden = GoldenStep(torch.float64)
    model = golden.model()
    rows = [slice(0, 1), slice(1, 2)]
    with torch.no_grad():
        losses = [model(golden.labels[row], inputs=golden.inputs(row), only_token_losses=True) for row in rows]
    signals = [{"loss": own, "reference_loss": golden.reference_loss[row]} for own, row in zip(losses, rows)]
    kept = select(signals, Selection(keep=0.6), row_len=golden.labels.shape[1], step=1)
    assert torch.equal(torch.cat(kept), golden.kept)
    divisor = sum(mask.sum() for mask in kept)
    parts = []
    for row, mask in zip(rows, kept):
        result = model(golden.labels[row], inputs=golden.inputs(row), kept=mask, divisor=divisor)
        result.loss.backward()
        parts.append(result.loss.item())
    assert sum(parts) == pytest.approx(golden.record["loss"], abs=1e-8)
    golden.assert_gradients({name: weight.grad for name, weight in model.named_parameters()}, 1e-8)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_by_finite_differences(head: str) -> None:
    options = dict(HEADS[head])
    given = drawn(bias=options.pop("bias", False))
    kept = a_mask(given["labels"])

    def loss(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        head = {"bias": bias[0] if bias else None, "block_logits": BLOCK, **options}
        return selective_loss(hidden, weight, given["labels"], kept=kept, **head).loss

    inputs = [given[name] for name in ("hidden", "head_weight", "bias") if given[name] is not None]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("block", [1, BLOCK, None])
@pytest.mark.parametrize("head", HEADS)
def test_any_head_agrees_with_whole_logits(head: str, block: int | None) -> None:
    options = dict(HEADS[head])
    ours = drawn(bias=options.pop("bias", False))
    theirs: dict[str, Any] = {
        name: None if x is None else x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in ours.items()
    }
    reference = torch.linspace(0, 3, POSITIONS)
    losses = plain_losses(**theirs, **options)
    excess = (losses.detach() - reference).masked_fill(ours["labels"] == -100, -torch.inf)
    count = int(0.6 * (ours["labels"] != -100).sum().item() + 0.5)
    expected = torch.zeros(POSITIONS, dtype=torch.bool).index_fill_(0, excess.topk(count).indices, True)
    # A loss that is part of a larger one, so that the gradient from above is not 1.
    (3 * losses[expected].mean()).backward()

    result = selective_loss(**ours, reference_loss=reference, keep=0.6, block_logits=block, **options)
    (3 * result.loss).backward()
    assert torch.equal(result.kept, expected)
    assert result.loss.item() == pytest.approx(losses[expected].mean().item(), rel=1e-12)
    for name in ("hidden", "head_weight", "bias"):
        if ours[name] is not None:
            torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-10, atol=1e-12)


def test_a_tied_head_adds_both_gradients() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(VOCABULARY, (2, 9), generator=generator)
    labels = tokens.roll(-1, 1)
    kept = a_mask(labels)
    (gradient,) = torch.autograd.grad(selective_loss(weight[tokens], weight, labels, kept=kept).loss, weight)
    (expected,) = torch.autograd.grad(plain_losses(weight[tokens], weight, labels)[kept].mean(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_of_transformers_has_its_own_loss_when_all_is_kept(tied: bool) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **sizes)
    llama = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(VOCABULARY, (2, 9))
    expected = llama(input_ids=tokens, labels=tokens).loss
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in llama.named_parameters()}
    llama.zero_grad()

    labels = functional.pad(tokens[:, 1:], (0, 1), value=-100)
    model = SelectiveModel(llama.model, llama.lm_head)
    result = model(labels, torch.zeros(labels.shape), inputs={"input_ids": tokens}, keep=1.0)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected)
    for name, weight in llama.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name])


def test_losses_and_entropies_of_every_token() -> None:
    given = drawn()
    losses, entropies = token_losses(**given, return_entropy=True, block_logits=BLOCK)
    log = functional.log_softmax(functional.linear(given["hidden"], given["head_weight"]), dim=-1).detach()
    none = given["labels"] == -100
    torch.testing.assert_close(entropies, -(log.exp() * log).sum(-1).masked_fill(none, torch.nan), equal_nan=True)
    torch.testing.assert_close(losses, plain_losses(**given).detach().masked_fill(none, torch.nan), equal_nan=True)
    assert torch.equal(token_losses(**given, block_logits=BLOCK).isnan(), none)
    assert not losses.requires_grad


@pytest.mark.parametrize("score", ["excess", "entropy", "improvement", "union", "loss", "random"])
def test_scores_are_of_the_signals_that_were_given(score: str) -> None:
    given = drawn(torch.float32)
    generator = torch.Generator().manual_seed(3)
    names = ("reference_loss", "reference_entropy", "history_loss")
    signals: dict[str, Any] = {name: torch.rand(POSITIONS, generator=generator) * 4 for name in names}
    selection = Selection(score=score, keep=0.4, seed=5)
    result = selective_loss(**given, **signals, selection=selection, step=9)
    losses, entropies = token_losses(**given, return_entropy=True)
    every = {"loss": losses, "entropy": entropies, **signals}
    (expected,) = selection.select([{name: x.numpy() for name, x in every.items()}], POSITIONS, 9)
    assert result.kept.tolist() == expected.tolist()
    assert result.kept_count == expected.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_single(dtype: torch.dtype) -> None:
    half = drawn(dtype)
    single: dict[str, Any] = {
        name: None if x is None else (x.float() if x.is_floating_point() else x).detach() for name, x in half.items()
    }
    for name in ("hidden", "head_weight"):
        single[name].requires_grad_()
    kept = a_mask(half["labels"])
    # As a loss scaler has it: so small that float16 would lose the parts, were they not added up first.
    factor = 2.0**-16
    result = selective_loss(**half, kept=kept, block_logits=BLOCK)
    (factor * result.loss).backward()
    expected = selective_loss(**single, kept=kept)
    (factor * expected.loss).backward()
    assert result.token_losses.dtype == torch.float32
    # Products of half precision are exact in single, and so only the order of additions differs.
    torch.testing.assert_close(result.token_losses, expected.token_losses, rtol=1e-6, atol=1e-6, equal_nan=True)
    for name in ("hidden", "head_weight"):
        assert half[name].grad.dtype == dtype
        # Rounded once, at the end.
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(
            half[name].grad.float(), single[name].grad, rtol=torch.finfo(dtype).eps, atol=smallest + 1e-12
        )


def test_autocast_casts_what_the_head_would_see() -> None:
    given = drawn(torch.float32)
    kept = a_mask(given["labels"])
    expected = selective_loss(given["hidden"].bfloat16(), given["head_weight"], given["labels"], kept=kept)
    with torch.autocast("cpu", torch.bfloat16):
        result = selective_loss(**given, kept=kept)
    assert torch.equal(result.loss, expected.loss)
    assert not torch.equal(result.loss, selective_loss(**given, kept=kept).loss)
    with torch.autocast("cpu", torch.bfloat16):
        result.loss.backward()
    gradient, given["head_weight"].grad = given["head_weight"].grad, None
    expected.loss.backward()
    assert torch.equal(gradient, given["head_weight"].grad)


@pytest.mark.parametrize("positions", [0, 4])
@pytest.mark.parametrize("way", [{"keep": 0.6}, {"kept": True}])
def test_a_batch_without_labels_gives_zeros(positions: int, way: dict[str, Any]) -> None:
    hidden = torch.randn(positions, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    bias = torch.randn(VOCABULARY, requires_grad=True)
    labels = torch.full((positions,), -100)
    if "kept" in way:
        way = {"kept": torch.ones(positions, dtype=torch.bool)}
    result = selective_loss(hidden, weight, labels, torch.zeros(positions), bias=bias, **way)
    result.loss.backward()
    assert (result.loss.item(), result.kept_count.item()) == (0.0, 0)
    for given in (hidden, weight, bias):
        assert given.grad is not None and not given.grad.any()


def test_a_frozen_head_needs_no_gradient() -> None:
    given = drawn()
    given["head_weight"].requires_grad_(False)
    kept = a_mask(given["labels"])
    (gradient,) = torch.autograd.grad(selective_loss(**given, kept=kept).loss, given["hidden"])
    (expected,) = torch.autograd.grad(plain_losses(**given)[kept].mean(), given["hidden"])
    torch.testing.assert_close(gradient, expected)


def test_a_model_that_has_broken_down_shows() -> None:
    given = drawn(torch.float32)
    with torch.no_grad():
        given["hidden"][1:3] = torch.nan
    result = selective_loss(**given, reference_loss=torch.zeros(POSITIONS), keep=0.6)
    assert result.lost_count == 2 and not result.kept[1:3].any()
    result = selective_loss(**given, kept=torch.ones(POSITIONS, dtype=torch.bool))
    assert result.lost_count == 2 and result.loss.isnan()


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        returned = function(*given, **(options or {}))
        for tensor in returned if isinstance(returned, (tuple, list)) else [returned]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return returned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_is_made(dtype: torch.dtype) -> None:
    positions, width, vocabulary, block = 600, 8, 500, 3000
    hidden = torch.randn(positions, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (positions,))
    options: dict[str, Any] = {"logit_softcap": 5.0, "block_logits": block}
    selection = Selection(score="entropy", keep=0.6, scope="micro-batch")
    with LargestTensor() as largest:
        selective_loss(hidden, weight, labels, selection=selection, **options).loss.backward()
    assert largest.elements == max(block, positions * width, vocabulary * width)
    with LargestTensor() as largest:
        plain_losses(hidden, weight, labels).sum().backward()
    assert largest.elements == positions * vocabulary


def test_a_mask_and_a_divisor() -> None:
    losses = torch.tensor([[1.0, 2.0], [3.0, torch.nan]], requires_grad=True)
    kept = torch.tensor([[True, False], [True, False]])
    total, count = masked_sum(losses, kept)
    assert (total.item(), count.item()) == (4.0, 2)
    assert masked_mean(losses, kept).item() == 2.0
    assert masked_mean(losses, kept, divisor=8).item() == 0.5
    assert masked_mean(losses, torch.zeros_like(kept)).item() == 0.0
    (gradient,) = torch.autograd.grad(masked_mean(losses, kept, averaged_over=4), losses)
    assert torch.equal(gradient, 2.0 * kept)
    with pytest.raises(ValueError, match="one shape"):
        masked_mean(losses, kept[0])
    for divisor in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no number of tokens"):
            masked_mean(losses, kept, divisor=divisor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give one of selection=, keep= and kept="),
        ({"keep": 0.6, "selection": Selection()}, "give one of"),
        ({"keep": 0.6}, "needs the signal 'reference_loss'"),
        ({"keep": "0.6x", "reference_loss": torch.zeros(POSITIONS)}, "not a number"),
        ({"keep": "linear:0.8:0.6", "reference_loss": torch.zeros(POSITIONS)}, "needs steps"),
        ({"kept": torch.ones(POSITIONS)}, "kept must be a bool"),
        ({"keep": 0.6, "labels": torch.zeros(3, dtype=torch.int64)}, "already shifted"),
        ({"keep": 0.6, "labels": torch.zeros(POSITIONS)}, "must be int64"),
        ({"keep": 0.6, "labels": torch.full((POSITIONS,), VOCABULARY)}, "go from 17 to 17, but the head has 17"),
        ({"keep": 0.6, "labels": torch.full((POSITIONS,), -1)}, "go from -1 to -1"),
        ({"keep": 0.6, "hidden": torch.zeros(POSITIONS, WIDTH + 1)}, "do not fit"),
        ({"keep": 0.6, "hidden": torch.zeros(POSITIONS, WIDTH, dtype=torch.int32)}, "must be bfloat16"),
        ({"keep": 0.6, "bias": torch.zeros(3)}, "one for each of the 17 tokens"),
        ({"keep": 0.6, "labels": torch.zeros(POSITIONS, dtype=torch.int64, device="meta")}, "labels on meta"),
        ({"keep": 0.6, "logit_softcap": 0.0}, "logit_softcap must be above 0"),
        ({"keep": 0.6, "block_logits": 0}, "block_logits must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_loss(**{**drawn(torch.float32), **change})


@pytest.mark.parametrize("side", ["above", "below"])
def test_the_loss_of_tokens_on_one_side_of_an_attribute(side: str) -> None:
    given = drawn()
    # Of its own making: every third token has 0.25, the next 0.5, the next 0.75, and one has none.
    attribute = (torch.arange(POSITIONS) % 3 + 1).float() / 4
    attribute[1] = torch.nan
    labelled = given["labels"] != -100
    is_kept = attribute >= 0.5 if side == "above" else attribute <= 0.5
    wanted = labelled & is_kept
    assert 0 < int(wanted.sum()) < int(labelled.sum())
    selection = Selection(score="attribute", attribute_keep=side, threshold=0.5)
    found = selective_loss(**given, attribute=attribute, selection=selection, block_logits=BLOCK)
    found.loss.backward()
    gradients = [given["hidden"].grad.clone(), given["head_weight"].grad.clone()]
    assert found.kept.tolist() == wanted.tolist()
    assert int(found.kept_count) == int(wanted.sum())

    plain = drawn()
    expected = plain_losses(plain["hidden"], plain["head_weight"], plain["labels"])[wanted].mean()
    expected.backward()
    torch.testing.assert_close(found.loss, expected, rtol=1e-8, atol=1e-8)
    for gradient, name in zip(gradients, ("hidden", "head_weight")):
        torch.testing.assert_close(gradient, plain[name].grad, rtol=1e-8, atol=1e-8)
