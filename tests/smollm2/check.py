"""What `check` runs: the programs on one side, transformers on the other."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
import transformers
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[2]
STEPS = 50
WINDOW, STRIDE = 256, 128
TOLERANCE = 1e-4
# By its published generation_config.json and tokenizer_config.json.
BOS, EOS = "<|im_start|>", "<|im_end|>"
QUESTION = f"{BOS}user\nWhat is the capital of France?{EOS}\n{BOS}assistant\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--programs", "--checkpoint", "--work"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    programs, work = arguments.programs.resolve(), arguments.work
    published = as_published(arguments.checkpoint, work / "published")
    learnt, held = documents(work)

    def run(program: str, *words: object) -> None:
        command = [str(programs / program), *map(str, words)]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}"

    with broker(programs) as servers:
        to_broker = ("--bootstrap-servers", servers)
        ingest = ("ingest", *to_broker, "--tokenizer", published / "tokenizer.json")
        run("sluiced", *ingest, "--topic", "text", "--end-with", "<|endoftext|>", learnt)
        run("sluiced", *ingest, "--topic", "held", held)

        run("sluice-train", "export", "--run", published, "--out", work / "reference")
        score(programs, servers, work / "reference", ("text", "text-scored"), lines(learnt))

        out = work / "run"
        run(
            *("sluice-train", "run", *to_broker, "--topic", "text-scored", "--tokenizer", published / "tokenizer.json"),
            *("--init", published, "--objective", "slm", "--keep", 0.6, "--steps", STEPS, "--epochs", 1000),
            *("--batch-size", 1, "--warmup-steps", 5, "--out", out, "--eval", f"held={held}"),
            *("--token-losses", "held", "--eval-every", 1000, "--checkpoint-every", 1000),
        )
        checkpoint = out / "checkpoints" / f"step-{STEPS:07}"
        # The trainer's own losses, of the weights as published and of those after the last step.
        before, after = trainer_losses(out, 0), trainer_losses(out, STEPS)
        compare("bf16 as published, trainer against transformers in f32", before, transformers_losses(published, held))
        compare("after 50 steps, trainer against transformers in f32", after, transformers_losses(checkpoint, held))
        moved = max(abs(one - other) for one, other in zip(before, after))
        assert moved > 0.05, f"50 steps have changed no loss by more than {moved}"

        for dtype in ("bf16", "f32"):
            folder = work / f"export-{dtype}"
            flags = ("--format", "safetensors", "--dtype", dtype, "--shard-bytes-max", 200_000_000)
            run("sluice-train", "export", "--run", out, "--out", folder, *flags)
            generate(folder, dtype)

        run("sluice-train", "export", "--run", out, "--out", work / "model")
        scored = score(programs, servers, work / "model", ("held", "held-scored"), lines(held))
        served = [
            loss for record in sorted(scored, key=lambda record: record["id"]) for loss in record["reference_loss"][1:]
        ]
        assert {(record["window"], record["stride"]) for record in scored} == {(WINDOW, STRIDE)}
        compare("after 50 steps, daemon against trainer", served, after)


def as_published(checkpoint: Path, folder: Path) -> Path:
    """The folder as the hub has it: in bfloat16, with the files that say which tokens begin and end a text. The weights are
    those of ops/smollm2, rounded."""
    folder.mkdir()
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    rounded = {name: weight.bfloat16() for name, weight in weights.items()}
    safetensors.torch.save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config["torch_dtype"] = "bfloat16"
    write_json(folder / "config.json", config)
    ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "pad_token_id": 2}
    write_json(folder / "generation_config.json", ids)
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    shutil.copy(checkpoint / "tokenizer.json", folder)
    return folder


def documents(work: Path) -> tuple[Path, Path]:
    """Paragraphs of the golden passage: to learn from, and held out."""
    text = (ROOT / "tests/golden/passage.txt").read_text()
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    paragraphs = [paragraph for paragraph in paragraphs if len(paragraph) > 80]
    cut = len(paragraphs) * 2 // 3
    files = []
    for name, part in (("learnt", paragraphs[:cut]), ("held", paragraphs[cut:])):
        path = work / f"{name}.jsonl"
        rows = [json.dumps({"id": f"{name}-{number:03}", "text": text}) for number, text in enumerate(part)]
        path.write_text("\n".join(rows) + "\n")
        files.append(path)
    return files[0], files[1]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@contextmanager
def broker(programs: Path) -> Iterator[str]:
    """Kafka in memory, for as long as it is needed."""
    topics = [word for name in ("text", "held", "text-scored", "held-scored", "dead") for word in ("--topic", f"{name}:1")]
    command = [str(programs / "sluiced"), "dev-broker", "--until-stdin-closes", *topics]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def score(programs: Path, servers: str, model: Path, topics: tuple[str, str], count: int) -> list[dict]:
    """Serves a model until it has scored so many documents, and reads them with nothing of Sluice's."""
    settings = {
        "--kafka-bootstrap-servers": servers,
        "--kafka-documents-topic": topics[0],
        "--kafka-scored-topic": topics[1],
        "--kafka-dead-letter-topic": "dead",
        "--kafka-group-id": topics[1],
        "--kafka-delivery": "at-least-once",
        "--model-path": model,
        "--score-window-tokens": WINDOW,
        "--score-stride-tokens": STRIDE,
        "--http-listen": "127.0.0.1:0",
    }
    command = [str(programs / "sluiced"), "serve", *(str(word) for setting in settings.items() for word in setting)]
    with subprocess.Popen(command, stdout=sys.stderr) as daemon:
        try:
            reader = [os.environ["SLUICE_TEST_PYTHON"], str(ROOT / "tests/python/read_scored.py")]
            reader += ["--bootstrap-servers", servers, "--topic", topics[1], "--count", str(count), "--patience", "300"]
            output = subprocess.run(reader, stdout=subprocess.PIPE, text=True, check=True).stdout
        finally:
            daemon.terminate()
    assert daemon.returncode == 0, f"the daemon ended with {daemon.returncode}"
    return [json.loads(line) for line in output.splitlines()]


def trainer_losses(run: Path, step: int) -> list[float]:
    path = run / "token-losses" / f"step-{step:07}-set-0.safetensors"
    return safetensors.torch.load_file(path)["losses"].tolist()


def transformers_losses(folder: Path, held: Path) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    losses: list[float] = []
    with torch.no_grad():
        for row in held.read_text().splitlines():
            tokens = tokenizer(json.loads(row)["text"], return_tensors="pt", add_special_tokens=False).input_ids
            assert tokens.shape[1] <= WINDOW, "a paragraph is longer than a window"
            logits = model(tokens).logits[0, :-1]
            losses += functional.cross_entropy(logits, tokens[0, 1:], reduction="none").tolist()
    return losses


def compare(what: str, ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs), f"{what}: {len(ours)} losses and {len(theirs)}"
    worst = max(abs(one - other) for one, other in zip(ours, theirs))
    mean = sum(theirs) / len(theirs)
    print(json.dumps({"compared": what, "tokens": len(ours), "mean_loss": round(mean, 4), "worst_difference": worst}))
    assert worst < TOLERANCE, f"{what}: {worst}"


def generate(folder: Path, dtype: str) -> None:
    """The folder loads as it is, in the type that it is in, and what is generated ends where the model says."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    assert not wrong, f"{folder.name} does not load as it is: {wrong}"
    assert model.dtype == {"bf16": torch.bfloat16, "f32": torch.float32}[dtype], model.dtype
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == EOS and model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer(QUESTION, return_tensors="pt").input_ids
    made = model.generate(prompt, max_new_tokens=100, do_sample=False)[0, prompt.shape[1] :].tolist()
    files = sorted(path.name for path in folder.glob("*.safetensors*"))
    text = tokenizer.decode(made)
    print(json.dumps({"generated": text, "tokens": len(made), "dtype": str(model.dtype), "files": files}))
    assert made[-1] == tokenizer.eos_token_id and len(made) < 100, f"it does not end: {text}"


if __name__ == "__main__":
    main()
