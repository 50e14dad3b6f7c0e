"""Tiny random checkpoints of the families that the trainer reads, as transformers publishes them, and what transformers says of
them in float64: the loss of every token of some documents, and the gradient of the mean loss over a few tokens of them.

Run by tests/golden/checkpoints/remake. Writes a folder a checkpoint and `losses.json`.
"""

import copy
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import transformers
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 64
CONTEXT = 64
LENGTHS = (2, 3, 17, 32, 64)
# Of the documents' predicted tokens, in their order, those whose gradient is written down.
KEPT = slice(1, None, 3)

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
THETA = 1000.0


@dataclass
class Made:
    """A model, and how it is published."""

    model: transformers.PreTrainedModel
    dtype: torch.dtype = torch.bfloat16
    shard_size: str = "1GB"
    prefix: str = ""
    gradients: bool = False
    # Keys of config.json as transformers 4 wrote them.
    old_keys: dict[str, object] = field(default_factory=dict)
    side_files: dict[str, str] = field(default_factory=dict)


def rope(**scaling: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": THETA, "rope_type": "default", **scaling}}


def llama(**changes: object) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, **rope(), **changes}))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}


def families() -> dict[str, Made]:
    wide = {"num_attention_heads": 2, "num_key_value_heads": 1}
    side_files = {
        "generation_config.json": json.dumps({"bos_token_id": 2, "eos_token_id": [3, 5], "max_length": 64}),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "x"}),
        "chat_template.jinja": "{{ messages }}",
    }
    # Heads of 16 dimensions, as a fused kernel wants them, and of 8, as it does not.
    return {
        "llama": Made(llama(**wide), side_files=side_files, old_keys={"a_key_of_tomorrow": [1, 2]}),
        "llama-tied": Made(llama(tie_word_embeddings=True), torch.float32),
        "llama3-shards": Made(
            llama(**rope(**LLAMA3)),
            torch.float16,
            shard_size="16KB",
            prefix="_orig_mod.module.",
            old_keys={"rope_theta": THETA, "rope_scaling": LLAMA3},
        ),
        "llama-linear": Made(
            llama(**wide, **rope(rope_type="linear", factor=4.0)),
            old_keys={"rope_theta": THETA, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        "llama-yarn": Made(llama(**wide, **rope(**YARN))),
        "mistral": Made(
            transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON, **rope(), sliding_window=32, head_dim=8)),
        ),
        "qwen2": Made(
            transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON, **rope(), tie_word_embeddings=True)),
            gradients=True,
        ),
        "qwen3": Made(
            transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**COMMON, **wide, **rope(), "head_dim": 32})),
            gradients=True,
        ),
        "granite": Made(
            transformers.GraniteForCausalLM(
                transformers.GraniteConfig(
                    **{**COMMON, **wide},
                    **rope(),
                    embedding_multiplier=3.0,
                    attention_multiplier=0.3,
                    residual_multiplier=0.5,
                    logits_scaling=2.0,
                )
            ),
            gradients=True,
        ),
    }


def randomize(model: transformers.PreTrainedModel) -> None:
    """Every weight at random, norms and biases too, on a grid that 16 bits hold."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                drawn = 1 + 0.3 * drawn
            elif not name.endswith("bias"):
                drawn = 0.2 * drawn
            weight.copy_((drawn * 64).round() / 64)


def publish(made: Made, folder: Path) -> None:
    # A copy, for a rotary table that was rounded would stay so.
    copy.deepcopy(made.model).to(made.dtype).save_pretrained(folder, max_shard_size=made.shard_size)
    if made.prefix:
        add_prefix(folder, made.prefix)
    if made.old_keys:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        if "rope_scaling" in made.old_keys:
            del config["rope_parameters"]
        path.write_text(json.dumps({**config, **made.old_keys}, indent=2) + "\n")
    if not made.side_files:
        (folder / "generation_config.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
    for name, text in made.side_files.items():
        (folder / name).write_text(text + "\n")


def add_prefix(folder: Path, prefix: str) -> None:
    """As somebody saves it who hands the state of a wrapped model over as it is."""
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        renamed = {prefix + name: tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(renamed, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {prefix + name: file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content, indent=2) + "\n")


def losses(model: transformers.PreTrainedModel, document: Tensor) -> Tensor:
    logits = model(document[None]).logits[0]
    return functional.cross_entropy(logits[:-1], document[1:], reduction="none")


def main() -> None:
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    about = f"transformers {transformers.__version__}, torch {torch.__version__}, float64; loss of each token but the first"
    result: dict[str, object] = {"about": about, "documents": [document.tolist() for document in documents]}
    by_name: dict[str, list[list[float]]] = {}
    for name, made in families().items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        randomize(made.model)
        publish(made, folder)
        model = made.model.double().eval()
        longest = getattr(model.config, "sliding_window", None) or CONTEXT
        fitting = [document for document in documents if len(document) <= longest]
        of_documents = [losses(model, document) for document in fitting]
        by_name[name] = [[round(value, 9) for value in values.tolist()] for values in of_documents]
        if made.gradients:
            torch.cat(of_documents)[KEPT].mean().backward()
            gradients = {
                name: weight.grad.float().contiguous()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
            safetensors.torch.save_file(gradients, folder / "gradients.safetensors")
        print(f"{name}: {sum(values.mean().item() for values in of_documents) / len(fitting):.4f} nats", file=sys.stderr)
    (HERE / "losses.json").write_text(json.dumps({**result, "losses": by_name}) + "\n")


if __name__ == "__main__":
    main()
