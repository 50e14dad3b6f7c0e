"""A Llama model in GGUF to a Hugging Face style folder: model.safetensors, config.json, tokenizer.json.

    convert.py MODEL.gguf FOLDER

GGUF stores the query and key projections with the rows of each head interleaved, for a rotary embedding that turns
neighbours; Hugging Face's turns halves. Quantised tensors are read as what they stand for, in float32.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN = 3


def main() -> None:
    reader = GGUFReader(sys.argv[1])
    folder = Path(sys.argv[2])
    field = {name: value for name, value in reader.fields.items()}
    get = lambda name: field[name].contents()  # noqa: E731
    heads, kv_heads = get("llama.attention.head_count"), get("llama.attention.head_count_kv")

    weights = {}
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        values = values.reshape(tensor.shape[::-1])
        of_heads = {"attn_q": heads, "attn_k": kv_heads}.get(tensor.name.split(".")[-2])
        if of_heads:
            values = halves_from_pairs(values, of_heads)
        weights[hugging_face_name(tensor.name)] = values
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": get("llama.vocab_size"),
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": round(float(get("llama.attention.layer_norm_rms_epsilon")), 9),
        "rope_theta": float(get("llama.rope.freq_base")),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer(get("tokenizer.ggml.tokens"), get("tokenizer.ggml.merges"), get("tokenizer.ggml.token_type")).save(
        str(folder / "tokenizer.json")
    )


def hugging_face_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
    return f"{OUTSIDE[parts[0]]}.{parts[1]}"


def halves_from_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """[heads * width, n], where rows 2i and 2i + 1 of a head turn together, to rows i and i + width / 2."""
    width = values.shape[0] // heads
    return values.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def tokenizer(tokens: list[str], merges: list[str], types: list[int]) -> Tokenizer:
    """As SmolLM2's own tokenizer.json: byte-level BPE, digits one by one."""
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types) if kind == CONTROL_TOKEN]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


if __name__ == "__main__":
    main()
