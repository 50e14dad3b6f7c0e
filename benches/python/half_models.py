"""Models in float16 as a GPU runs them best: onnxruntime-genai's builder, with attention in one kernel.

    half_models.py FOLDER NAME=CHECKPOINT|NAME=random:SIZE ...

Each becomes FOLDER/NAME/onnx, which `sluiced` serves, and FOLDER/NAME/checkpoint, the same weights for PyTorch.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import random_llama


def main() -> None:
    folder = Path(sys.argv[1])
    for asked in sys.argv[2:]:
        name, source = asked.split("=", 1)
        checkpoint, onnx = folder / name / "checkpoint", folder / name / "onnx"
        if source.startswith("random:"):
            random_llama.write(checkpoint, random_llama.SIZES[source.removeprefix("random:")])
        else:
            shutil.copytree(source, checkpoint)
        onnx.mkdir(parents=True)
        build(checkpoint, onnx)
        for file in ("config.json", "tokenizer.json"):
            shutil.copy(checkpoint / file, onnx)


def build(checkpoint: Path, onnx: Path) -> None:
    with tempfile.TemporaryDirectory(dir=onnx.parent) as scratch:
        source = Path(scratch, "source")
        source.mkdir()
        for file in checkpoint.iterdir():
            (source / file.name).symlink_to(file.resolve())
        # The builder copies a tokenizer that it can load.
        (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", f"{scratch}/out"]
        command += ["-p", "fp16", "-e", "cuda", "-c", f"{scratch}/cache"]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
        for file in Path(scratch, "out").glob("model.onnx*"):
            shutil.move(file, onnx)


if __name__ == "__main__":
    main()
