"""Runs of SelectiveTrainer. Tests start them by torchrun too: a JSON file says which, and each leaves a `result.pt`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from adapter_support import CLIP, RATE, LaneStream, tiny_llama
from sluice_feed import Selection
from sluice_feed.transformers import SelectiveTrainer
from torch_support import end_process
from transformers import TrainingArguments


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return TrainingArguments(**given)


def run(
    folder: Path,
    selection: Selection,
    stream: Any,
    resume: str | None = None,
    model: Any = None,
    **settings: Any,
) -> SelectiveTrainer:
    trainer = SelectiveTrainer(
        tiny_llama() if model is None else model, arguments(folder, **settings), train_dataset=stream, selection=selection
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def allow_fsdp_on_cpus() -> None:
    """accelerate has FSDP where there are GPUs, and takes DDP elsewhere, although its code for FSDP2 runs there as well."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    made = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **given: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **given)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def main(cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if any("fsdp" in case.get("arguments", {}) for case in cases):
        allow_fsdp_on_cpus()
    for case in cases:
        stream = LaneStream(case["lengths"], case["micro_batches"], rank, world_size)
        folder, settings = Path(case["folder"]), case.get("arguments", {})
        trainer = run(folder, Selection(**case["selection"]), stream, case.get("resume"), **settings)
        held = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        weights = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in held.items()}
        if rank == 0:
            result = {"logs": logged(trainer), "weights": weights, "wrapped": type(trainer.model_wrapped).__name__}
            torch.save(result, folder / "result.pt")
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    end_process()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
