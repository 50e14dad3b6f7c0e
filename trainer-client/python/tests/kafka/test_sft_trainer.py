"""`examples/sft_trainer.py` on a real Kafka: what goes on from a checkpoint ends with the weights of a whole run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/sft_trainer.py"
PATIENCE_S = 300


def run(settings: dict[str, Any], out: Path, *more: str) -> dict[str, torch.Tensor]:
    """Weights after four steps, with a checkpoint after two."""
    flags = {
        "--topic": settings["topic"],
        "--bootstrap-servers": settings["bootstrap_servers"],
        "--tokenizer": os.environ["SLUICE_TEST_TOKENIZER"],
        "--batch-size": settings["batch_size"],
        "--sequence-length": settings["sequence_length"],
        "--micro-batches": 2,
        "--steps": 4,
        "--checkpoint-every": 2,
        "--out": out,
    }
    models = [flag for model in settings["reference_models"] for flag in ("--reference-model", model)]
    given = [str(part) for flag in flags.items() for part in flag]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *given, *models, *more],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return load_file(out / "model/model.safetensors")


def test_what_goes_on_ends_as_what_was_not_interrupted(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = run(settings, tmp_path)
    assert (tmp_path / "checkpoint-2/sluice_feed_state_0_of_1.pt").exists()
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "model")
    resumed = run(settings, tmp_path, "--resume")
    assert resumed.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0.0, atol=1e-6, msg=name)
