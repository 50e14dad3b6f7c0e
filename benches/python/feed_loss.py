"""One step of the loss: `sluice_feed.torch.selective_loss` beside whole logits, Liger and Cut Cross Entropy.

    python=$(ops/feed-python)
    $python -m pip install --no-deps --require-hashes --target target/peers -r benches/python/requirements-peers.txt
    $python benches/python/feed_loss.py --peers target/peers --out benches/results/feed-loss.json

Times: one process a case, all systems one after the other in each round, on the same inputs. Peak memory: a process for each
system, the most that a step holds beyond inputs and weights, gradients included. Liger's and Cut Cross Entropy's kernels are
Triton's, for GPUs. On a CPU they run in Triton's interpreter, if they run: their times there say nothing of their speed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

KEEP = 0.6
# Positions, width, vocabulary; the last is small enough for Triton's interpreter.
CASES = [(2048, 576, 32_768), (1024, 576, 131_072), (512, 64, 8_192)]
INTERPRETED = CASES[2]
SYSTEMS = {
    "sluice": "selective_loss",
    "whole": "whole logits, cross entropy, mask",
    "whole-kept": "whole logits without a graph, then those of the kept tokens with one",
    "cce-compiled": "Cut Cross Entropy, impl torch_compile (whole logits), mask",
    "liger": "Liger, reduction none, mask",
    "cce": "Cut Cross Entropy, impl cce, reduction none, mask",
}
TRITON = ("liger", "cce")


def inputs(case: tuple[int, int, int]) -> dict[str, Any]:
    import torch

    positions, width, vocabulary = case
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "labels": torch.randint(vocabulary, (positions,), generator=generator),
        "reference": torch.rand(positions, generator=generator) * 20,
    }


def step(system: str) -> Callable[..., Any]:
    """A function that takes hidden states, weight, labels and reference losses, and leaves gradients: loss and mask."""
    from sluice_feed import Selection
    from sluice_feed.torch import masked_mean, select, selective_loss
    from torch import no_grad
    from torch.nn.functional import cross_entropy, linear

    selection = Selection(keep=KEEP)

    def chosen(losses: Any, reference: Any) -> Any:
        signals = [{"loss": losses.detach(), "reference_loss": reference}]
        return select(signals, selection, row_len=len(losses), step=1)[0]

    def sluice(hidden: Any, weight: Any, labels: Any, reference: Any) -> Any:
        result = selective_loss(hidden, weight, labels, reference, selection=selection)
        result.loss.backward()
        return result.loss, result.kept

    def whole_kept(hidden: Any, weight: Any, labels: Any, reference: Any) -> Any:
        with no_grad():
            kept = chosen(cross_entropy(linear(hidden, weight), labels, reduction="none"), reference)
        loss = cross_entropy(linear(hidden[kept], weight), labels[kept])
        loss.backward()
        return loss, kept

    def masked(token_losses: Callable[..., Any]) -> Callable[..., Any]:
        def masked_step(hidden: Any, weight: Any, labels: Any, reference: Any) -> Any:
            losses = token_losses(hidden, weight, labels)
            kept = chosen(losses, reference)
            loss = masked_mean(losses, kept)
            loss.backward()
            return loss, kept

        return masked_step

    if system == "sluice":
        return sluice
    if system == "whole-kept":
        return whole_kept
    if system == "whole":
        return masked(lambda hidden, weight, labels: cross_entropy(linear(hidden, weight), labels, reduction="none"))
    if system == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return masked(lambda *given: liger_fused_linear_cross_entropy(*given, reduction="none"))
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if system == "cce" else "torch_compile"
    return masked(lambda *given: linear_cross_entropy(*given, reduction="none", impl=implementation))


def forget(given: dict[str, Any]) -> None:
    given["hidden"].grad = given["weight"].grad = None


def times(threads: int, case: tuple[int, int, int], systems: list[str], rounds: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    given, steps = inputs(case), {system: step(system) for system in systems}
    told: dict[str, Any] = {system: {"seconds": [], "cpu_seconds": []} for system in systems}
    exact: Any = None
    # The first round warms up and compares: "whole" comes before its peers.
    for number in range(rounds + 1):
        for system in sorted(systems, key=lambda system: system != "whole") if number == 0 else systems:
            forget(given)
            started, cpu = time.perf_counter(), time.process_time()
            loss, kept = steps[system](*given.values())
            if number > 0:
                told[system]["seconds"].append(time.perf_counter() - started)
                told[system]["cpu_seconds"].append(time.process_time() - cpu)
                continue
            found = kept, given["hidden"].grad, given["weight"].grad
            exact = exact or found
            differences = [((own - theirs).norm() / theirs.norm()).item() for own, theirs in zip(found[1:], exact[1:])]
            told[system]["loss"] = loss.item()
            told[system]["keeps_the_same"] = torch.equal(kept, exact[0])
            told[system]["gradients_differ_by"] = max(differences)
    return told


def status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_bytes(threads: int, case: tuple[int, int, int], system: str) -> int:
    import torch

    torch.set_num_threads(threads)
    given, one_step = inputs(case), step(system)
    # A few rows first: threads, compiled code and buffers that stay are none of the step's.
    few = {name: value if name == "weight" else value.detach()[: case[0] // 8] for name, value in given.items()}
    few["hidden"].requires_grad_()
    one_step(*few.values())
    forget(given)
    forget(few)
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")
    one_step(*given.values())
    return max(status("VmHWM:") - before, 0)


def attempt(system: str) -> str:
    """What becomes of a small step: "ran", or the last line of what went wrong."""
    try:
        step(system)(*inputs((64, 32, 512)).values())
    except Exception as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return "ran"


def in_process(peers: str, interprets: bool, role: str, *arguments: Any) -> Any:
    """What a role of this program says in a process of its own."""
    environment = os.environ | {"PYTHONPATH": peers, "PYTHONDONTWRITEBYTECODE": "1"}
    if interprets:
        environment["TRITON_INTERPRET"] = "1"
    if role == "memory":
        # What is freed goes back at once, so that it can be counted.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, __file__, "--role", role, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(peers: str, threads: int, rounds: int) -> dict[str, Any]:
    from blas import peer

    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "sluice-feed", "numpy")
    sys.path.append(peers)
    multiplies = peer()
    result: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "blas": multiplies["blas"],
        "processor": multiplies["processor"],
        "threads": threads,
        "load_average_before": os.getloadavg()[0],
        "keep": KEEP,
        "dtype": "float32",
        "attempts": [
            {"system": system, "interpreted": interprets, "said": in_process(peers, interprets, "attempt", system)}
            for system in (*TRITON, "cce-compiled")
            for interprets in (False, True)
        ],
        "cases": [],
    }
    ran = {told["system"] for told in result["attempts"] if told["said"] == "ran"}
    for case in CASES:
        interprets = case == INTERPRETED
        systems = [
            system
            for system in SYSTEMS
            if (system in ran or not system.startswith(("liger", "cce"))) and (interprets or system not in TRITON)
        ]
        told = in_process(peers, interprets, "times", threads, case, systems, rounds)
        for system in systems:
            for unit in ("seconds", "cpu_seconds"):
                told[system][f"median_{unit}"] = statistics.median(told[system][unit])
            told[system]["peak_bytes"] = in_process(peers, interprets, "memory", threads, case, system)
            told[system]["is"] = SYSTEMS[system]
        result["cases"].append(dict(zip(("positions", "width", "vocabulary"), case)) | {"systems": told})
        print(json.dumps(result["cases"][-1], indent=1), file=sys.stderr)
    return result | {"load_average_after": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="folder with the wheels of requirements-peers.txt")
    parser.add_argument("--out", type=Path, help="where the results go")
    # More threads than one wait for each other, and on a machine that others use too they wait long.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        role, arguments = given.role[0], json.loads(given.role[1])
        print(json.dumps({"times": times, "memory": peak_bytes, "attempt": attempt}[role](*arguments)))
        return
    if not given.peers or not given.out:
        parser.error("--peers and --out are needed; see above")
    result = measure(given.peers, given.threads, given.rounds)
    options = f"--threads {given.threads} --rounds {given.rounds}"
    command = f"$(ops/feed-python) benches/python/feed_loss.py --peers target/peers {options} --out {given.out}"
    given.out.write_text(json.dumps({"command": command, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
