"""`examples/hf_trainer.py` on a real Kafka: killed on two ranks and gone on with on one, as if it had not been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/hf_trainer.py"
PATIENCE_S = 300


def command(settings: dict[str, Any], ranks: int, out: Path) -> list[str]:
    flags = {
        "--topic": settings["topic"],
        "--bootstrap-servers": settings["bootstrap_servers"],
        "--tokenizer": settings["tokenizer"],
        "--vocab-size": settings["vocab_size"],
        "--batch-size": settings["batch_size"],
        "--sequence-length": settings["sequence_length"],
        "--micro-batches": settings["micro_batches"],
        "--shuffle-buffer": settings["shuffle_buffer"],
        "--epochs": settings["epochs"],
        "--steps": 1000,
        "--checkpoint-every": 2,
        "--out": out,
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(EXAMPLE)]
    models = [flag for model in settings.get("reference_models", []) for flag in ("--reference-model", model)]
    given = [str(part) for flag in flags.items() for part in flag]
    return [*torchrun, "--tiny", "--resume", "--log-documents", *given, *models]


def finish(settings: dict[str, Any], ranks: int, out: Path) -> list[dict[str, float]]:
    """A run to the topic's end, from where it stands; what it logged."""
    done = subprocess.run(
        command(settings, ranks, out), capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=environment()
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return list(json.loads((out / "log.json").read_text()))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def learnt_from(out: Path) -> dict[tuple[int, int], set[str]]:
    """Digests of micro-batches by step and number."""
    seen: dict[tuple[int, int], set[str]] = {}
    for path in out.glob("documents-*.jsonl"):
        for text in path.read_text().splitlines():
            # A killed rank may have left half a line.
            line = json.loads(text) if text.endswith("}") else {"number": None}
            if line["number"] is not None:
                seen.setdefault((line["step"], line["number"]), set()).add(line["digest"])
    return seen


def test_a_killed_run_goes_on_on_another_number_of_ranks(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = finish(settings, 1, whole)
    assert len(expected) > 8, "steps enough to be killed among"

    torchrun = psutil.Popen(
        command(settings, 2, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (killed / "checkpoint-4/trainer_state.json").exists():
        assert torchrun.poll() is None and time.monotonic() < deadline, "it ended, or took too long, before step 4"
        time.sleep(0.01)
    # Ranks have sessions of their own, and would go on without torchrun.
    processes = [torchrun, *torchrun.children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)

    steps = finish(settings, 1, killed)
    assert learnt_from(killed) == learnt_from(whole)
    assert [line["step"] for line in steps] == [line["step"] for line in expected]
    for line, plain in zip(steps, expected):
        assert line["loss"] == pytest.approx(plain["loss"], abs=1e-4)
        assert line["kept_share"] == pytest.approx(plain["kept_share"])
