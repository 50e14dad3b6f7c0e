"""`SelectiveTrainer` takes the steps of a plain loop, on one process and on several, and goes on where it stood."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import CLIP, RATE, LaneStream, Rows, micro_batch, plain_run, plain_step, tiny_llama, token_losses
from sluice_feed import Selection, StateError
from sluice_feed.torch.distributed import Ranks
from sluice_feed.transformers import SelectiveTrainer, collate_rows
from sluice_feed.transformers.forward import ARGUMENT, install
from sluice_feed.transformers.micro_batch import MicroBatch
from sluice_feed.transformers.step import SelectiveStep
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch_support import in_processes
from trainer_run import arguments, logged, run
from transformers import Trainer

#: Inside of the model some of its own code computes in float32.
WEIGHTS, LOSSES = 1e-6, 1e-5
SELECTIONS: dict[str, dict[str, Any]] = {
    "batch": {"keep": 0.5},
    "sequence": {"keep": 0.5, "scope": "sequence"},
    "threshold": {"threshold": 0.0},
    "adaptive": {"keep": "adaptive:0.1:0.6"},
    "adaptive over the step": {"keep": "adaptive:0.1:0.6", "scope": "batch"},
    "union": {"keep": 0.4, "entropy_keep": 0.3, "score": "union"},
    "schedule": {"keep": "linear:1.0:0.4", "steps": 4},
    "draws": {"keep": 0.5, "score": "random", "seed": 7},
    "draws of rows": {"keep": 0.5, "score": "random", "scope": "sequence", "seed": 7},
}


def selection(name: str) -> Selection:
    return Selection(**SELECTIONS[name])


def assert_same_logs(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(actual) == len(expected)
    for line, plain in zip(actual, expected):
        for name, value in plain.items():
            assert line[name] == pytest.approx(value, abs=LOSSES), (name, line["step"])


def assert_same_weights(actual: Any, expected: Any) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=0.0, atol=WEIGHTS, msg=name)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", SELECTIONS)
def test_steps_equal_those_of_a_plain_loop(tmp_path: Path, name: str, micro_batches: int) -> None:
    expected, model = plain_run(LaneStream([4, 4], micro_batches), selection(name), steps=3)
    trainer = run(tmp_path, selection(name), LaneStream([4, 4], micro_batches), gradient_accumulation_steps=micro_batches)
    assert_same_logs(logged(trainer), expected)
    assert_same_weights(trainer.model.state_dict(), model.state_dict())


def test_micro_batches_of_a_step_may_be_more_than_the_trainer_knows_of(tmp_path: Path) -> None:
    """As many as the stream says are in a step, whatever gradient_accumulation_steps is: a rank with long partitions."""
    expected, model = plain_run(LaneStream([4, 4], 3), selection("sequence"), steps=2)
    trainer = run(tmp_path, selection("sequence"), LaneStream([4, 4], 3), max_steps=2)
    assert_same_logs(logged(trainer), expected)
    assert_same_weights(trainer.model.state_dict(), model.state_dict())


def test_last_step_of_a_stream_is_taken_though_it_is_short(tmp_path: Path) -> None:
    """The Trainer takes a step after as many micro-batches as accumulate, and would never take this one."""
    expected, model = plain_run(LaneStream([3, 2], 2), selection("batch"), steps=9)
    trainer = run(tmp_path, selection("batch"), LaneStream([3, 2], 2), max_steps=1000, gradient_accumulation_steps=2)
    assert len(expected) == 3
    assert_same_logs(logged(trainer), expected)
    assert_same_weights(trainer.model.state_dict(), model.state_dict())


class Asked(LaneStream):
    """It counts how often it was asked for a step."""

    times = 0

    def next_step(self) -> list[dict[str, Any]] | None:
        self.times += 1
        return super().next_step()


def test_a_stream_is_not_asked_again_after_its_end(tmp_path: Path) -> None:
    """The Trainer would ask up to max_steps, and then begin another epoch."""
    stream = Asked([2, 1], 1)
    run(tmp_path, selection("batch"), stream, max_steps=1000)
    assert stream.times == 4


def test_rows_of_a_dataset_are_learnt_from(tmp_path: Path) -> None:
    """Their reference losses, which no forward takes, come through the Trainer's removal of columns."""
    trainer = run(
        tmp_path,
        selection("batch"),
        Rows(8),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    model = tiny_llama()
    expected = []
    for step in (1, 2):
        rows = range(4 * (step - 1), 4 * step)
        pairs = [[micro_batch(0, index, rows=1) for index in rows][start : start + 2] for start in (0, 2)]
        batches = [{name: torch.cat([row[name] for row in pair]) for name in pair[0] if name != "lane"} for pair in pairs]
        expected.append(plain_step(model, batches, selection("batch"), step))
    assert_same_logs(logged(trainer), expected)
    assert_same_weights(trainer.model.state_dict(), model.state_dict())


def test_evaluation_is_over_all_tokens(tmp_path: Path) -> None:
    rows = Rows(4)
    trainer = SelectiveTrainer(
        tiny_llama(), arguments(tmp_path, per_device_eval_batch_size=4), train_dataset=Rows(1), eval_dataset=rows, keep=0.5
    )
    batch = {name: torch.cat([row[name] for row in rows.batches]) for name in ("input_ids", "labels", "segment_ids")}
    expected = token_losses(tiny_llama(), batch).sum() / (batch["labels"] != -100).sum()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=LOSSES)


def test_evaluation_without_reference_losses_is_the_trainers_own(tmp_path: Path) -> None:
    """With labels that the model shifts."""
    tokens = [micro_batch(0, index, rows=1)["input_ids"][0] for index in range(2)]
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    given: dict[str, Any] = {"train_dataset": Rows(1), "eval_dataset": rows}
    ours = SelectiveTrainer(tiny_llama(), arguments(tmp_path), keep=0.5, **given)
    theirs = Trainer(tiny_llama(), arguments(tmp_path), data_collator=collate_rows, **given)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], abs=LOSSES)


def test_what_came_before_a_streams_end_is_in_a_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, selection("batch"), LaneStream([3, 2], 1), max_steps=50, save_strategy="steps", save_steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    over = run(tmp_path, selection("batch"), LaneStream([3, 2], 1), resume=str(tmp_path / "checkpoint-5"), max_steps=50)
    assert over.state.global_step == 5


# Several processes.


def torchrun(processes: int, cases: list[dict[str, Any]], folder: Path) -> list[Any]:
    """What runs left that torchrun started, each `{"logs", "weights"}`."""
    file = folder / f"cases-{processes}.json"
    file.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = Path(__file__).with_name("trainer_run.py")
    done = subprocess.run([*command, str(script), str(file)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(Path(case["folder"]) / "result.pt", weights_only=True) for case in cases]


def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    """Of batches that differ in how many labels they have, and at the end with one rank that has none."""
    cases = []
    for name, given in SELECTIONS.items():
        for micro_batches in (2, 4):
            folder = tmp_path / f"{name}-{micro_batches}"
            folder.mkdir()
            settings = {"gradient_accumulation_steps": micro_batches // 2, "max_steps": 9}
            case = {"selection": given, "micro_batches": micro_batches, "arguments": settings}
            cases.append({**case, "lengths": [4, 8], "folder": str(folder)})
    results = torchrun(2, cases, tmp_path)
    for case, result in zip(cases, results):
        expected, model = plain_run(LaneStream([4, 8], case["micro_batches"]), Selection(**case["selection"]), steps=9)
        assert_same_logs(result["logs"], expected)
        assert_same_weights(result["weights"], model.state_dict())


def test_two_ranks_of_accelerates_fsdp2_take_the_steps_of_one(tmp_path: Path) -> None:
    cases = []
    for name in ("batch", "sequence"):
        folder = tmp_path / name
        folder.mkdir()
        settings = {"gradient_accumulation_steps": 2, "max_steps": 9, "fsdp": True, "fsdp_config": {"version": 2}}
        case = {"selection": SELECTIONS[name], "micro_batches": 4, "arguments": settings}
        cases.append({**case, "lengths": [4, 8], "folder": str(folder)})
    for name, result in zip(("batch", "sequence"), torchrun(2, cases, tmp_path)):
        expected, model = plain_run(LaneStream([4, 8], 4), selection(name), steps=9)
        assert result["wrapped"] == "FSDPLlamaForCausalLM"
        assert_same_logs(result["logs"], expected)
        assert_same_weights(result["weights"], model.state_dict())


def test_resumes_on_more_ranks_and_on_fewer(tmp_path: Path) -> None:
    """2 steps on 2 ranks, the next 2 on 1, the rest on 2: as one run that was not interrupted."""
    expected, model = plain_run(LaneStream([6, 6], 2), selection("batch"), steps=6)
    case: dict[str, Any] = {"selection": SELECTIONS["batch"], "micro_batches": 2, "lengths": [6, 6], "folder": str(tmp_path)}
    saving = {"save_strategy": "steps", "save_steps": 2}

    (first,) = torchrun(2, [{**case, "arguments": {**saving, "max_steps": 2}}], tmp_path)
    second = run(
        tmp_path,
        selection("batch"),
        LaneStream([6, 6], 2),
        resume=str(tmp_path / "checkpoint-2"),
        **saving,
        max_steps=4,
        gradient_accumulation_steps=2,
    )
    resumed = {**case, "resume": str(tmp_path / "checkpoint-4"), "arguments": {**saving, "max_steps": 6}}
    (third,) = torchrun(2, [resumed], tmp_path)

    assert_same_logs(first["logs"], expected[:2])
    assert_same_logs(logged(second), expected[:4])
    assert_same_logs(third["logs"], expected)
    assert_same_weights(third["weights"], model.state_dict())


def _sharded_step(rank: int, size: int, name: str) -> None:
    """A step of two micro-batches on each of the ranks, with a model that FSDP2 has sharded as accelerate does."""
    model = tiny_llama()
    install(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    batches = LaneStream([4, 4], 4, rank, size).next_step()
    assert batches is not None
    given = [MicroBatch(batch, number=batch["number"], step=1) for batch in batches]
    ranks = Ranks()
    step = SelectiveStep(given, selection(name), ranks, ranks.sum(sum(batch.labelled for batch in given)))
    step.prepare(model)
    loss = torch.zeros((), dtype=torch.float64)
    for index, batch in enumerate(given):
        is_last = index + 1 == len(given)
        model.set_requires_gradient_sync(is_last)
        output = model(**{ARGUMENT: batch})
        step.add(output)
        output.loss.backward()
        loss += step.corrected(output.loss.detach(), is_last, model)

    plain = tiny_llama()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    whole = LaneStream([4, 4], 4).next_step()
    assert whole is not None
    expected = plain_step(plain, whole, selection(name), step=1)
    assert ranks.sum(loss).item() / size == pytest.approx(expected["loss"], abs=LOSSES)
    gradients = {key: parameter.grad.full_tensor() for key, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm.item() == pytest.approx(expected["grad_norm"], abs=LOSSES)
    for key, gradient in gradients.items():
        change = (before[key] - plain.state_dict()[key]) / RATE
        torch.testing.assert_close(gradient * CLIP / norm, change, rtol=0.0, atol=WEIGHTS, msg=key)


@pytest.mark.parametrize("name", ["batch", "sequence"])
def test_gradients_under_fsdp2_are_those_of_a_plain_loop(name: str) -> None:
    in_processes(2, _sharded_step, name)


def _half_precision_step(rank: int, size: int) -> None:
    """With inputs cast to bfloat16, as FSDP2 does unless told otherwise; `select` refuses reference losses in it."""
    model = tiny_llama(dtype=torch.float32)
    install(model)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True))
    batches = LaneStream([4, 4], 2, rank, size).next_step()
    assert batches is not None
    batch = MicroBatch(batches[0], number=rank, step=1)
    batch.selection = selection("batch")
    output = model(**{ARGUMENT: batch})
    assert Ranks().sum(output.loss.detach()).item() / size == pytest.approx(3.7, abs=0.2)
    assert batch.signals["reference_loss"].dtype == torch.float32


def test_reference_losses_are_not_rounded_by_fsdp2() -> None:
    in_processes(2, _half_precision_step)


# Checkpoints.


def checkpointed(folder: Path) -> Path:
    run(folder, selection("batch"), LaneStream([8, 8], 2), max_steps=2, save_strategy="steps", save_steps=2)
    return folder / "checkpoint-2"


def resumed(folder: Path, checkpoint: Path) -> SelectiveTrainer:
    return run(folder, selection("batch"), LaneStream([8, 8], 2), resume=str(checkpoint), max_steps=4)


def test_a_checkpoint_without_the_streams_state_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpointed(tmp_path)
    (checkpoint / "sluice_feed_state_0_of_1.pt").unlink()
    with pytest.raises(StateError, match="would read the topic from its beginning"):
        resumed(tmp_path, checkpoint)


def test_a_checkpoint_that_lacks_a_ranks_state_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpointed(tmp_path)
    (checkpoint / "sluice_feed_state_0_of_1.pt").rename(checkpoint / "sluice_feed_state_1_of_3.pt")
    with pytest.raises(StateError, match=r"lacks the states of ranks \[0, 2\] of 3"):
        resumed(tmp_path, checkpoint)


def test_a_state_of_another_step_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpointed(tmp_path)
    own = checkpoint / "sluice_feed_state_0_of_1.pt"
    torch.save({**torch.load(own, weights_only=True), "step": 1}, own)
    with pytest.raises(StateError, match="of step 1, and its checkpoint of step 2"):
        resumed(tmp_path, checkpoint)


def test_a_checkpoint_written_again_forgets_the_ranks_of_the_killed_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for rank in range(2):
        (checkpoint / f"sluice_feed_state_{rank}_of_2.pt").write_bytes(b"of a run that was killed")
    checkpointed(tmp_path)
    assert resumed(tmp_path, checkpoint).state.global_step == 4
