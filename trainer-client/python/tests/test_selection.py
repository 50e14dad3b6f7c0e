"""The Rust selection over numpy arrays: the golden selections, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sluice_feed import ConfigurationError, Selection, StateError, select

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[3] / "tests/golden/selection.json").read_text(encoding="utf-8"))
ROW = GOLDEN["row_len"]
# The golden values are of a step after the warm-up.
STEP = 50


def batches() -> list[dict[str, Any]]:
    def array(values: list[Any]) -> Any:
        return np.array([np.nan if value is None else value for value in values], dtype=np.float32).reshape(-1, ROW)

    return [{name: array(values) for name, values in batch.items()} for batch in GOLDEN["batch"]]


def adaptive(case: dict[str, Any]) -> str:
    return "adaptive:{min}:{max}".format(**case["adaptive"])


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_it_agrees_with_numpy(case: dict[str, Any]) -> None:
    settings = {"score": case["score"]["name"], "entropy_keep": case["score"].get("entropy_keep")}
    settings |= {name: case[name] for name in ("keep", "threshold", "scope") if name in case}
    settings |= {"keep": adaptive(case)} if "adaptive" in case else {}
    selection = Selection(**settings)
    if case.get("scope") == "running-quantile":
        # Two steps of half the micro-batches each.
        masks = select(batches()[:2], selection, step=STEP)
        selection.end_step()
        resumed = Selection(**settings)
        resumed.load_state_dict(selection.state_dict())
        masks += select(batches()[2:], resumed, step=STEP + 1)
    else:
        masks = select(batches(), selection, step=STEP)
    assert [np.flatnonzero(mask).tolist() for mask in masks] == case["kept"]


@pytest.mark.parametrize("text", GOLDEN["schedules"])
def test_schedules_agree_with_numpy(text: str) -> None:
    selection = Selection(keep=text, steps=GOLDEN["steps"], warmup_steps=GOLDEN["warmup_steps"])
    found = [selection.keep_at(step) for step in range(1, GOLDEN["steps"] + 1)]
    assert found == pytest.approx(GOLDEN["schedules"][text], abs=1e-12)


def test_random_keeps_the_share_and_depends_on_seed_and_step() -> None:
    def kept(seed: int, step: int) -> list[list[int]]:
        masks = select(batches(), Selection(score="random", keep=0.3, seed=seed), step=step)
        return [np.flatnonzero(mask).tolist() for mask in masks]

    eligible = sum(int((~np.isnan(batch["loss"] - batch["reference_loss"])).sum()) for batch in batches())
    assert sum(map(len, kept(1, 1))) == int(0.3 * eligible + 0.5)
    assert kept(1, 1) == kept(1, 1) != kept(2, 1)
    assert kept(1, 1) != kept(1, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "best"}, "unknown variant `best`"),
        ({"scope": "world"}, "unknown variant `world`"),
        ({"keep": 0.0}, "keep must be above 0"),
        ({"keep": 1.5}, "keep must be above 0"),
        ({"keep": float("nan")}, "keep must be above 0"),
        ({"keep": "linear:0.8"}, "linear"),
        ({"keep": "linear:0.8:0.6"}, "needs steps"),
        ({"keep": 0.5, "threshold": 1.0}, "not both"),
        ({"threshold": float("inf")}, "finite"),
        ({"threshold": 1.0, "score": "union"}, "no single score"),
        ({"keep": "adaptive:0.5"}, "adaptive:MIN:MAX"),
        ({"keep": "adaptive:0.8:0.5"}, "MIN at most MAX"),
        ({"keep": "adaptive", "score": "loss"}, "one model is better than another"),
        ({"keep": "adaptive", "scope": "running-quantile"}, "follows a share"),
        ({"entropy_keep": 0.5}, "second share"),
        ({"warmup_steps": 10, "steps": 10}, "nothing would ever be left out"),
        ({"score": "random", "scope": "running-quantile"}, "random has none"),
    ],
)
def test_wrong_settings_are_refused_in_words(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Selection(**settings)


def test_arrays_that_do_not_fit_are_refused() -> None:
    loss = np.zeros((2, 4), np.float32)
    with pytest.raises(ConfigurationError, match="reference_loss has 0 values and loss has 8"):
        select({"loss": loss}, Selection())
    for other in (loss[:1], loss.T, loss.reshape(-1)):
        with pytest.raises(ConfigurationError, match=r"reference_loss is \(.*\), and loss \(2, 4\)"):
            select({"loss": loss, "reference_loss": other}, Selection())
    with pytest.raises(ConfigurationError, match=r"\[rows, length\]"):
        select({"loss": loss[0], "reference_loss": loss[0]}, Selection())
    with pytest.raises(ConfigurationError, match="entropy has 0 values"):
        select({"loss": loss}, Selection(score="entropy"))
    assert select([], Selection()) == []


def test_a_selection_that_needs_no_reference_needs_none() -> None:
    loss = np.array([[3.0, 1.0, np.nan, 2.0]], np.float32)
    (mask,) = select({"loss": loss}, Selection(score="loss", keep=0.5))
    assert mask.tolist() == [[True, False, False, True]]


def test_no_state_is_refused() -> None:
    with pytest.raises(StateError, match="no state of a selection"):
        Selection().load_state_dict("nonsense")
