"""A Llama checkpoint as an ONNX model folder whose attention is spelled out, as optimum exports it.

    spelled_out.py CHECKPOINT FOLDER     with the Python that `ops/setup-torch-python` prints
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from optimum.exporters.onnx import onnx_export_from_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a checkpoint with its attention spelled out.")
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("folder", type=Path, help="folder of the model; made if it is not there")
    arguments = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as out:
        onnx_export_from_model(model, out, task="text-generation", do_validation=False)
        for file in Path(out).glob("model.onnx*"):
            shutil.copy(file, arguments.folder)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(arguments.checkpoint / name, arguments.folder)
    print(arguments.folder, file=sys.stderr)


if __name__ == "__main__":
    main()
