"""A Llama checkpoint of random weights, for measurements of speed.

    random_llama.py FOLDER [--size 50m]     tiny (for tests), 50m, 360m or 1b (the last two in float16)
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

TOKENIZER = Path(__file__).resolve().parents[2] / "tests/golden/tiny-llama/tokenizer.json"


class Size(NamedTuple):
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    dtype: str = "float32"
    vocabulary: int = 32_000


SIZES = {
    "tiny": Size(width=64, inner=160, layers=2, heads=4, kv_heads=2, vocabulary=512),
    "50m": Size(width=512, inner=1408, layers=12, heads=8, kv_heads=4),
    "360m": Size(width=960, inner=2560, layers=32, heads=15, kv_heads=5, dtype="float16", vocabulary=49_152),
    "1b": Size(width=2048, inner=5632, layers=22, heads=32, kv_heads=4, dtype="float16"),
}


def write(folder: Path, size: Size) -> int:
    """Writes the checkpoint; its number of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)
        return values.astype(size.dtype)

    ones = np.ones(size.width, dtype=size.dtype)
    key_rows = size.width // size.heads * size.kv_heads
    weights = {"model.embed_tokens.weight": matrix(size.vocabulary, size.width), "model.norm.weight": ones}
    for layer in range(size.layers):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.input_layernorm.weight": ones,
            f"{at}.post_attention_layernorm.weight": ones,
            f"{at}.self_attn.q_proj.weight": matrix(size.width, size.width),
            f"{at}.self_attn.k_proj.weight": matrix(key_rows, size.width),
            f"{at}.self_attn.v_proj.weight": matrix(key_rows, size.width),
            f"{at}.self_attn.o_proj.weight": matrix(size.width, size.width),
            f"{at}.mlp.gate_proj.weight": matrix(size.inner, size.width),
            f"{at}.mlp.up_proj.weight": matrix(size.inner, size.width),
            f"{at}.mlp.down_proj.weight": matrix(size.width, size.inner),
        }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": size.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return sum(values.size for values in weights.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="50m")
    arguments = parser.parse_args()
    print(write(arguments.folder, SIZES[arguments.size]), file=sys.stderr)


if __name__ == "__main__":
    main()
