"""Selection on tensors against the golden selections, and against the Rust function, on one rank and on three."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sluice_feed
import torch
from sluice_feed._core import ConfigurationError, Selection
from sluice_feed.torch import end_step, select
from torch_support import as_tensors, drawn_signals, golden_selections, in_processes

SCORES = [
    "excess",
    "reference-loss",
    "reference-entropy",
    "intersection",
    "union",
    "loss",
    "entropy",
    "improvement",
    "random",
    "attribute",
]
SCOPES = ("sequence", "micro-batch", "batch")
ROW_LEN = 7


def indices(masks: list[torch.Tensor]) -> list[list[int]]:
    return [mask.nonzero().view(-1).tolist() for mask in masks]


def second_share(score: str, trial: int) -> dict[str, Any]:
    """Two rankings have a share each, or one for both."""
    return {"entropy_keep": 0.7} if score in ("intersection", "union") and trial % 3 > 0 else {}


def test_every_golden_selection() -> None:
    golden = golden_selections()
    signals = [as_tensors(given) for given in golden["batch"]]
    for case in golden["cases"]:
        settings = {"score": case["score"]["name"], "entropy_keep": case["score"].get("entropy_keep")}
        settings["keep"] = "adaptive:{min}:{max}".format(**case["adaptive"]) if "adaptive" in case else case.get("keep")
        selection = Selection(threshold=case.get("threshold"), scope=case.get("scope"), **settings)
        if selection.scope == "running-quantile":
            # Two steps of half the micro-batches each.
            masks = select(signals[:2], selection, row_len=golden["row_len"], step=1)
            end_step(selection)
            masks += select(signals[2:], selection, row_len=golden["row_len"], step=2)
        else:
            masks = select(signals, selection, row_len=golden["row_len"], step=1)
        assert indices(masks) == case["kept"], case["score"]


@pytest.mark.parametrize("score", ["excess", "loss", "union", "intersection"])
def test_a_running_threshold_moves_as_that_of_the_rust_function(score: str) -> None:
    generator = np.random.default_rng(3)
    settings = {"score": score, "keep": 0.4, "scope": "running-quantile", "warmup_steps": 1, **second_share(score, 1)}
    one, other = Selection(**settings), Selection(**settings)
    for step in range(1, 12):
        sizes = generator.integers(0, 40, int(generator.integers(1, 5)))
        batch = [drawn_signals(generator, int(size), coarse=step % 2 == 0) for size in sizes]
        expected = one.select(batch, ROW_LEN, step)
        # Micro-batches one by one: none waits for another.
        found = [select([as_tensors(given)], other, row_len=ROW_LEN, step=step)[0] for given in batch]
        assert [mask.tolist() for mask in found] == [mask.tolist() for mask in expected], step
        one.end_step()
        end_step(other)
        assert one.state_dict() == other.state_dict(), step
    assert one.running_thresholds[0] is not None


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", SCORES)
def test_any_numbers_are_chosen_from_as_by_the_rust_function(score: str, scope: str) -> None:
    generator = np.random.default_rng(1)
    for trial in range(24):
        sizes = generator.integers(0, 40, int(generator.integers(1, 5)))
        batch = [drawn_signals(generator, int(size), coarse=trial % 2 == 0) for size in sizes]
        keep = float(generator.choice([0.01, 0.3, 0.5, 0.77, 1.0]))
        selection = Selection(score=score, keep=keep, scope=scope, warmup_steps=1, seed=trial, **second_share(score, trial))
        for step in (1, 2):
            expected = selection.select(batch, ROW_LEN, step)
            found = select([as_tensors(given) for given in batch], selection, row_len=ROW_LEN, step=step)
            assert [mask.tolist() for mask in found] == [mask.tolist() for mask in expected], (trial, step)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_adaptive_rule_keeps_within_its_bounds(scope: str) -> None:
    generator = np.random.default_rng(4)
    for trial in range(24):
        sizes = generator.integers(0, 40, int(generator.integers(1, 5)))
        batch = [drawn_signals(generator, int(size), coarse=trial % 2 == 0) for size in sizes]
        smallest = float(generator.choice([0.01, 0.3, 0.7]))
        bounds = f"adaptive:{smallest}:{float(generator.choice([0.7, 0.8, 1.0]))}"
        selection = Selection(keep=bounds, scope=scope)
        expected = selection.select(batch, ROW_LEN, 1)
        found = select([as_tensors(given) for given in batch], selection, row_len=ROW_LEN, step=1)
        assert [mask.tolist() for mask in found] == [mask.tolist() for mask in expected], (trial, bounds)


@pytest.mark.parametrize("score", ["excess", "entropy", "reference-loss"])
def test_a_threshold_keeps_what_reaches_it(score: str) -> None:
    generator = np.random.default_rng(2)
    batch = [drawn_signals(generator, 200, coarse=trial % 2 == 0) for trial in range(2)]
    # A tenth is not a number of float32, so it must be rounded as the scores are.
    for threshold in (0.0, 0.5, 0.1, -1e9):
        batch[0]["entropy"][0] = np.float32(threshold)
        selection = Selection(score=score, threshold=threshold)
        expected = selection.select(batch, ROW_LEN, 1)
        found = select([as_tensors(given) for given in batch], selection, row_len=ROW_LEN, step=1)
        assert [mask.tolist() for mask in found] == [mask.tolist() for mask in expected]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("side", ["above", "below"])
def test_either_side_of_an_attribute_is_kept_as_by_the_rust_function(side: str, scope: str) -> None:
    generator = np.random.default_rng(5)
    for trial in range(12):
        batch = [drawn_signals(generator, 40, coarse=trial % 2 == 0) for _ in range(3)]
        for rule in ({"keep": 0.3, "scope": scope}, {"threshold": 0.5}):
            selection = Selection(score="attribute", attribute_keep=side, **rule)
            assert (selection.attribute_keep, selection.needs_attribute) == (side, True)
            expected = selection.select(batch, ROW_LEN, 1)
            found = select([as_tensors(given) for given in batch], selection, row_len=ROW_LEN, step=1)
            assert [mask.tolist() for mask in found] == [mask.tolist() for mask in expected], (trial, rule)
            if "threshold" in rule:
                values = [np.where(np.isnan(given["loss"]), np.nan, given["attribute"]) for given in batch]
                reach = [value >= 0.5 if side == "above" else value <= 0.5 for value in values]
                assert [mask.tolist() for mask in found] == [mask.tolist() for mask in reach]
    with pytest.raises(ConfigurationError, match="attribute_keep is the side of attribute"):
        Selection(attribute_keep="below")


@pytest.mark.parametrize("rule", [{"keep": 0.5}, {"threshold": 0.5}, {"keep": 0.5, "scope": "running-quantile"}])
def test_a_topic_without_attributes_is_refused_in_words(rule: dict[str, Any]) -> None:
    nan = float("nan")
    # As a stream of losses gives them: the last position predicts nothing.
    losses = {"loss": torch.tensor([[1.0, 2.0, nan]]), "attribute": torch.full((1, 3), nan)}
    selection = Selection(score="attribute", **rule)
    words = "no token of these micro-batches has an attribute.*needs_attribute=True"
    with pytest.raises(ConfigurationError, match=words):
        select([losses, losses], selection, row_len=3, step=1)
    with pytest.raises(ConfigurationError, match=words):
        sluice_feed.select({name: values.numpy() for name, values in losses.items()}, selection)
    # One that predicts nothing has nothing to lack, and no more has one that only fills up a rank's share.
    empty = {"loss": torch.full((1, 3), nan), "attribute": torch.full((1, 3), nan)}
    assert not any(mask.any() for mask in select([empty], selection, row_len=3, step=1))
    assert not any(mask.any() for mask in select([losses], selection, row_len=3, step=1, numbers=[None]))
    found = {**losses, "attribute": torch.tensor([[nan, 0.75, nan]])}
    masks = select([losses, found], selection, row_len=3, step=1)
    assert [mask.tolist() for mask in masks] == [[[False] * 3], [[False, True, False]]]


def test_masks_have_the_shape_of_the_losses_and_ties_go_by_number() -> None:
    signals = [{"loss": torch.ones(2, 3), "reference_loss": torch.zeros(2, 3)} for _ in range(3)]
    masks = select(signals, Selection(keep=0.5), row_len=3, step=1, numbers=[2, None, 0])
    # Six of the twelve that are numbered: all of number 0, none of number 2.
    assert [mask.tolist() for mask in masks] == [[[False] * 3] * 2, [[False] * 3] * 2, [[True] * 3] * 2]


def test_losses_of_float64_are_compared_in_float32() -> None:
    loss = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    signals = {"loss": loss, "reference_loss": torch.zeros(2, dtype=torch.float64)}
    (mask,) = select([signals], Selection(keep=0.5), row_len=2, step=1)
    assert mask.tolist() == [True, False]


def test_what_does_not_fit_is_refused_by_name() -> None:
    loss = torch.zeros(4)
    plain = Selection()
    given: Any
    settings: Any
    for given, settings, message in [
        ({}, {}, "'loss'"),
        ({"loss": loss}, {}, "needs the signal 'reference_loss'"),
        ({"loss": loss, "reference_loss": torch.zeros(3)}, {}, r"shape \(3,\)"),
        ({"loss": loss, "reference_loss": loss.bfloat16()}, {}, "cast_forward_inputs=False"),
        ({"loss": loss, "reference_loss": loss}, {"row_len": 0}, "row_len"),
        ({"loss": loss, "reference_loss": loss}, {"numbers": [0, 1]}, "1 micro-batches, but 2 numbers"),
        ({"loss": loss, "reference_loss": loss}, {"numbers": [-1]}, "numbered from 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            select([given], plain, **{"row_len": 4, "step": 1, **settings})
    group: Any = "a group"
    with pytest.raises(ValueError, match="not initialised"):
        select([{"loss": loss, "reference_loss": loss}], plain, row_len=4, step=1, group=group)


def ranks_choose_as_one(rank: int, size: int) -> None:
    for score in SCORES:
        for scope in SCOPES:
            # All ranks draw the same batch, and each takes its part.
            generator = np.random.default_rng(3)
            for trial in range(6):
                count = int(generator.integers(0, 7))
                sizes = generator.integers(0, 30, count)
                batch = [drawn_signals(generator, int(length), coarse=trial % 2 == 0) for length in sizes]
                owners, order = generator.integers(0, size, count), generator.permutation(count)
                selection = Selection(score=score, keep=0.4, scope=scope, seed=trial, **second_share(score, trial))
                expected = selection.select(batch, ROW_LEN, 1)
                # Not in the order of their numbers, and some ranks may have none.
                own = [int(number) for number in order if owners[number] == rank]
                signals = [as_tensors(batch[number]) for number in own]
                found = select(signals, selection, row_len=ROW_LEN, step=1, numbers=own)
                assert [mask.tolist() for mask in found] == [expected[number].tolist() for number in own]

    ones: dict[str, torch.Tensor] = {"loss": torch.ones(4), "reference_loss": torch.zeros(4)}
    # By default numbers go round the ranks: 3 of 3 * 2 * 4 equal scores are of the first micro-batch of rank 0.
    masks = select([ones, ones], Selection(keep=0.125), row_len=4, step=1)
    assert [int(mask.sum()) for mask in masks] == [[3, 0], [0, 0], [0, 0]][rank]
    masks = select([ones, ones], Selection(keep=0.75), row_len=4, step=1)
    assert [int(mask.sum()) for mask in masks] == [[4, 4], [4, 2], [4, 0]][rank]
    with pytest.raises(ValueError, match="several ranks have a micro-batch of the same number"):
        select([ones], Selection(keep=0.5), row_len=4, step=1, numbers=[0])


def test_three_ranks_choose_as_one() -> None:
    in_processes(3, ranks_choose_as_one)
