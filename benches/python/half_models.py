"""Models in 16 bits as a GPU runs them best: onnxruntime-genai's builder, with attention in one kernel.

    half_models.py FOLDER [--precisions f16,bf16] NAME=CHECKPOINT|NAME=random:SIZE ...

Each becomes FOLDER/NAME/f16 and FOLDER/NAME/bf16, which `sluiced` serves, and FOLDER/NAME/checkpoint, the same weights for
PyTorch.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import random_llama


# What the builder calls them.
BUILDER = {"f16": "fp16", "bf16": "bf16"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precisions", default="f16,bf16")
    parser.add_argument("models", nargs="+", metavar="NAME=SOURCE")
    arguments = parser.parse_args()
    for asked in arguments.models:
        name, source = asked.split("=", 1)
        checkpoint = arguments.folder / name / "checkpoint"
        if source.startswith("random:"):
            random_llama.write(checkpoint, random_llama.SIZES[source.removeprefix("random:")])
        else:
            shutil.copytree(source, checkpoint)
        for precision in arguments.precisions.split(","):
            onnx = arguments.folder / name / precision
            onnx.mkdir(parents=True)
            build(checkpoint, onnx, BUILDER[precision])
            for file in ("config.json", "tokenizer.json"):
                shutil.copy(checkpoint / file, onnx)


def build(checkpoint: Path, onnx: Path, precision: str) -> None:
    with tempfile.TemporaryDirectory(dir=onnx.parent) as scratch:
        source = Path(scratch, "source")
        source.mkdir()
        for file in checkpoint.iterdir():
            (source / file.name).symlink_to(file.resolve())
        # The builder copies a tokenizer that it can load.
        (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", f"{scratch}/out"]
        command += ["-p", precision, "-e", "cuda", "-c", f"{scratch}/cache"]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
        for file in Path(scratch, "out").glob("model.onnx*"):
            shutil.move(file, onnx)


if __name__ == "__main__":
    main()
