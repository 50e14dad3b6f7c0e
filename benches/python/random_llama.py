"""A Llama checkpoint of about 50M random weights, for measurements of speed: random_llama.py FOLDER"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 32_000, 512, 1408, 12, 8, 4
TOKENIZER = Path(__file__).resolve().parents[2] / "tests/golden/tiny-llama/tokenizer.json"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    ones = np.ones(WIDTH, dtype=np.float32)
    key_rows = WIDTH // HEADS * KV_HEADS
    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, WIDTH), "model.norm.weight": ones}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.input_layernorm.weight": ones,
            f"{at}.post_attention_layernorm.weight": ones,
            f"{at}.self_attn.q_proj.weight": matrix(WIDTH, WIDTH),
            f"{at}.self_attn.k_proj.weight": matrix(key_rows, WIDTH),
            f"{at}.self_attn.v_proj.weight": matrix(key_rows, WIDTH),
            f"{at}.self_attn.o_proj.weight": matrix(WIDTH, WIDTH),
            f"{at}.mlp.gate_proj.weight": matrix(INNER, WIDTH),
            f"{at}.mlp.up_proj.weight": matrix(INNER, WIDTH),
            f"{at}.mlp.down_proj.weight": matrix(WIDTH, INNER),
        }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    print(sum(values.size for values in weights.values()), file=sys.stderr)


if __name__ == "__main__":
    main()
