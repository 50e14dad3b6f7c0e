"""What the tests of ``sluice_feed.torch`` share: the golden files, signals, and processes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

GOLDEN = Path(__file__).resolve().parents[3] / "tests/golden"
sys.path.insert(0, str(GOLDEN))
SIGNALS = ("loss", "entropy", "history_loss", "reference_loss", "reference_entropy")


def as_tensors(signals: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in signals.items()}


def golden_selections() -> Any:
    """``selection.json``, its signals as float32 arrays with NaN where there is none."""
    golden = json.loads((GOLDEN / "selection.json").read_text())
    golden["batch"] = [{name: np.array(given[name], np.float32) for name in SIGNALS} for given in golden["batch"]]
    return golden


def drawn_signals(generator: np.random.Generator, size: int, coarse: bool) -> dict[str, np.ndarray]:
    """One micro-batch: numbers of all kinds, or on a coarse grid, so that nearly all tie."""
    given = {}
    for name in (*SIGNALS, "attribute"):
        if coarse:
            values = generator.integers(0, 4, size).astype(np.float32) / np.float32(2)
        else:
            values = generator.normal(0, 3, size).astype(np.float32)
            odd = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38], np.float32)
            is_odd = generator.random(size) < 0.3
            values[is_odd] = generator.choice(odd, int(is_odd.sum()))
        values[generator.random(size) < 0.2] = np.nan
        given[name] = values
    labelled = ~np.isnan(given["loss"])
    if labelled.any() and np.isnan(given["attribute"][labelled]).all():
        # A micro-batch whose tokens all lack an attribute is refused.
        given["attribute"][labelled] = np.float32(0.5)
    return given


class GoldenStep:
    """``slm_step.json``: one selective step on a packed batch of two rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.record = json.loads((GOLDEN / "slm_step.json").read_text())
        self.dtype = dtype
        self.labels = torch.tensor(self.record["targets"])
        self.labels[self.labels == -1] = -100
        none = float("nan")
        rows = [[none if value is None else value for value in row] for row in self.record["reference"]]
        self.reference_loss = torch.tensor(rows, dtype=torch.float32)
        rows = [[none if value is None else value for value in row] for row in self.record["losses"]]
        self.losses = torch.tensor(rows, dtype=torch.float64)
        self.kept = torch.zeros(self.labels.numel(), dtype=torch.bool)
        self.kept[self.record["kept"]] = True
        self.kept = self.kept.view(self.labels.shape)

    def inputs(self, rows: slice) -> dict[str, Tensor]:
        names = {"tokens": "tokens", "positions": "positions", "segments": "segments"}
        return {name: torch.tensor(self.record[of])[rows] for name, of in names.items()}

    def model(self) -> Any:
        """A ``SelectiveModel`` with the golden weights; its parameters are named ``backbone.*`` and ``head.*``."""
        from llama import Config, Llama
        from sluice_feed.torch import SelectiveModel

        given = self.record["config"]
        llama = Llama(
            Config(
                vocab_size=given["vocab_size"],
                hidden_size=given["hidden_size"],
                intermediate_size=given["intermediate_size"],
                layers=given["num_hidden_layers"],
                heads=given["num_attention_heads"],
                kv_heads=given["num_key_value_heads"],
            )
        ).to(self.dtype)
        llama.load_state_dict({name: self.tensor(given) for name, given in self.record["weights"].items()})
        return SelectiveModel(Backbone(llama.model), llama.lm_head)

    def tensor(self, given: Mapping[str, Any]) -> Tensor:
        return torch.tensor(given["values"], dtype=self.dtype).view(given["shape"])

    def assert_gradients(self, gradients: Mapping[str, Tensor], tolerance: float) -> None:
        expected = {
            name.replace("lm_head.", "head.").replace("model.", "backbone.", 1): self.tensor(given)
            for name, given in self.record["gradients"].items()
        }
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance, msg=name)


class Backbone(nn.Module):
    """The body of the golden Llama, which its own file runs together with the head."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.embed_tokens: nn.Module = body.embed_tokens
        self.layers: nn.ModuleList = body.layers
        self.norm: nn.Module = body.norm

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        index = torch.arange(tokens.shape[1])
        allowed = (index[None, :] <= index[:, None]) & (segments[:, :, None] == segments[:, None, :])
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden, positions, allowed[:, None])
        normed: Tensor = self.norm(hidden)
        return normed


def in_processes(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs ``work(rank, size, *arguments)`` in ``size`` processes of a gloo group; a failure of one fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_in_process, (size, f"file://{folder}/meeting", work, arguments), nprocs=size)


def _in_process(rank: int, size: int, meeting: str, work: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    try:
        work(rank, size, *arguments)
        # A rank that leaves early would take the connection from the others.
        dist.barrier()
    finally:
        dist.destroy_process_group()
    end_process()


def end_process() -> NoReturn:
    """Ends a rank that is done, at once.

    While Python winds down, a thread of gloo that lets go of a tensor only then asks for the GIL, and the process aborts
    (PyTorch's issue 190489). FSDP2's caches keep the group and its threads, so destroying the group does not end them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
