"""Tiny models out of the exporters that people use, and their per-token losses from Hugging Face in float64.

Run by tests/golden/exports/remake. Writes a folder a model (`model.onnx`, its external data, `config.json`) and `losses.json`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Callable

import numpy
import onnx
import onnxruntime
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "tiny-llama/tokenizer.json"
VOCAB_SIZE = 128
CONTEXT = 64
LENGTHS = (2, 3, 17, 40, 64)
# Weights on a grid that bfloat16 holds exactly below 2, so that a narrow export has the very same weights.
GRID = 64

COMMON = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": CONTEXT}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def llama(**changes: object) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**COMMON, **HEADS, **SPECIAL, "tie_word_embeddings": False, **changes})
    )


def gpt2() -> nn.Module:
    """Positions learned, head tied."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=2, n_positions=CONTEXT, **SPECIAL)
    )


def phi() -> nn.Module:
    """A bias after the head."""
    return transformers.PhiForCausalLM(
        transformers.PhiConfig(**COMMON, **SPECIAL, intermediate_size=48, num_attention_heads=2)
    )


def gemma2() -> nn.Module:
    """Head tied, logits capped softly. Only eager attention caps its scores, as the model was made to."""
    config = transformers.Gemma2Config(
        **COMMON, **HEADS, **SPECIAL, final_logit_softcapping=4.0, sliding_window=CONTEXT, query_pre_attn_scalar=16
    )
    return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")


def cohere() -> nn.Module:
    """Head tied, a scale after it."""
    return transformers.CohereForCausalLM(
        transformers.CohereConfig(
            **COMMON, **SPECIAL, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, logit_scale=0.5
        )
    )


def gemma2_windows() -> nn.Module:
    """Two layers: the first sees a window of 8 tokens, the second all; both cap their scores."""
    config = transformers.Gemma2Config(
        **{**COMMON, "num_hidden_layers": 2}, **HEADS, **SPECIAL, sliding_window=8, query_pre_attn_scalar=16
    )
    return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")


def mistral() -> nn.Module:
    """A window of 8 tokens in its one layer."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON, **HEADS, **SPECIAL, sliding_window=8))


def bloom() -> nn.Module:
    """ALiBi: a bias that falls with the distance."""
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=1, n_head=2, **SPECIAL)
    )


def gpt_neox() -> nn.Module:
    """Queries, keys and values out of one product, and a rotation of a part of each head."""
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**COMMON, **SPECIAL, intermediate_size=48, num_attention_heads=2, rotary_pct=0.5)
    )


def qwen3() -> nn.Module:
    """Queries and keys are normed in each head, and there are as many of these as of queries."""
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**{**COMMON, **HEADS, "num_key_value_heads": 2}, **SPECIAL)
    )


def phi3_longrope() -> nn.Module:
    """Up to 32 tokens are rotated by one table, longer documents by another."""
    scaling = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]}
    scaling["long_factor"] = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    heads = {key: value for key, value in HEADS.items() if key != "head_dim"}
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **COMMON, **heads, **SPECIAL, original_max_position_embeddings=CONTEXT // 2, rope_scaling=scaling
        )
    )


class Logits(nn.Module):
    """What `torch.onnx.export` is given: the inputs that most people name, and the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # The whole mask is made here, because what transformers makes it with (vmap) is not exportable.
        positions = torch.arange(input_ids.shape[1])
        allowed = (positions[None, :] <= positions[:, None])[None, None] & (attention_mask[:, None, None, :] > 0)
        dtype = self.model.dtype
        mask = torch.where(allowed, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype))
        return self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


def torch_onnx(dynamo: bool, dtype: torch.dtype = torch.float32, **options: object) -> Callable[[nn.Module, Path], None]:
    def export(model: nn.Module, folder: Path) -> None:
        names = ["input_ids", "attention_mask"]
        ids = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
        axes = {0: "batch", 1: "sequence"}
        if dynamo:
            shapes = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")} for name in names}
            varying = {"dynamic_shapes": shapes}
        else:
            varying = {"dynamic_axes": {name: axes for name in [*names, "logits"]}}
        torch.onnx.export(
            Logits(model.to(dtype)).eval(),
            (ids, torch.ones_like(ids)),
            str(folder / "model.onnx"),
            input_names=names,
            output_names=["logits"],
            dynamo=dynamo,
            **varying,
            **options,
        )

    return export


def optimum(task: str, **options: object) -> Callable[[nn.Module, Path], None]:
    def export(model: nn.Module, folder: Path) -> None:
        from optimum.exporters.onnx import onnx_export_from_model

        with tempfile.TemporaryDirectory() as out:
            onnx_export_from_model(model.float().eval(), out, task=task, do_validation=False, **options)
            for file in Path(out).glob("model.onnx*"):
                shutil.copy(file, folder)

    return export


def genai_builder(precision: str, provider: str) -> Callable[[nn.Module, Path], None]:
    def export(model: nn.Module, folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            source, out = Path(scratch, "source"), Path(scratch, "out")
            model.float().save_pretrained(source)
            shutil.copy(TOKENIZER, source)
            (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
            subprocess.run(
                [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out]
                + ["-p", precision, "-e", provider, "-c", scratch],
                check=True,
                stdout=sys.stderr,
            )
            for file in out.glob("model.onnx*"):
                shutil.copy(file, folder)

    return export


EXPORTS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], None]]] = {
    "torch-legacy-llama": (llama, torch_onnx(dynamo=False, opset_version=17)),
    "torch-legacy-llama-half": (llama, torch_onnx(dynamo=False, dtype=torch.float16, opset_version=17)),
    "torch-dynamo-llama": (llama, torch_onnx(dynamo=True, external_data=False)),
    "torch-dynamo-llama-tied": (lambda: llama(tie_word_embeddings=True), torch_onnx(dynamo=True, external_data=False)),
    "torch-dynamo-llama-brain": (llama, torch_onnx(dynamo=True, dtype=torch.bfloat16, external_data=False)),
    "torch-dynamo-phi": (phi, torch_onnx(dynamo=True, external_data=True)),
    "optimum-llama": (llama, optimum("text-generation")),
    "optimum-llama-past": (llama, optimum("text-generation-with-past")),
    "optimum-gpt2-past": (gpt2, optimum("text-generation-with-past")),
    "optimum-gemma2": (gemma2, optimum("text-generation")),
    "optimum-cohere-past": (cohere, optimum("text-generation-with-past")),
    "genai-llama-fp32": (llama, genai_builder("fp32", "cpu")),
    "genai-llama-fp16": (llama, genai_builder("fp16", "cuda")),
    "genai-llama-bf16": (llama, genai_builder("bf16", "cuda")),
    "genai-gemma2-fp32": (gemma2, genai_builder("fp32", "cpu")),
    "optimum-gemma2-windows": (gemma2_windows, optimum("text-generation")),
    "optimum-mistral": (mistral, optimum("text-generation")),
    "optimum-bloom": (bloom, optimum("text-generation")),
    "optimum-gpt-neox": (gpt_neox, optimum("text-generation")),
    "optimum-qwen3": (qwen3, optimum("text-generation")),
    "genai-phi3-longrope": (phi3_longrope, genai_builder("fp32", "cpu")),
}


# The builder's Gemma 2 is itself 5e-3 nats away from Hugging Face's, so it is held against its own whole logits.
HELD_AGAINST_ITSELF = {"genai-gemma2-fp32"}


def fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            values = 1.0 + 0.1 * noise if "bias" not in name else 0.3 * noise
        elif "embed" in name or "wte" in name:
            values = 0.5 * noise
        else:
            values = noise * parameter.shape[-1] ** -0.5
        values = ((values * GRID).round() / GRID).clamp(-1.984375, 1.984375)
        parameter.data = values.to(parameter.dtype)


def losses(model: nn.Module, tokens: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.double(), torch.tensor(tokens[1:]), reduction="none").tolist()


def losses_of_the_export(folder: Path, tokens: list[int]) -> list[float]:
    """From the whole logits of the model as it was exported, in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = numpy.array([tokens])
    offered = {"input_ids": ids, "attention_mask": numpy.ones_like(ids)}
    for given in session.get_inputs():
        if given.name.startswith("past_key_values"):
            _, heads, _, width = given.shape
            offered[given.name] = numpy.zeros((1, heads, 0, width), dtype=numpy.float32)
    (logits,) = session.run(["logits"], offered)
    scores = torch.tensor(logits[0, :-1]).double()
    return functional.cross_entropy(scores, torch.tensor(tokens[1:]), reduction="none").tolist()


def strip(path: Path) -> None:
    """Takes out what exporters say of the machine they ran on: source lines and stack traces."""
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for part in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            part.doc_string = ""
            del part.metadata_props[:]
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    path.write_bytes(model.SerializeToString(deterministic=True))


def main() -> None:
    warnings.simplefilter("ignore")  # exporters warn at length of each other
    generator = torch.Generator().manual_seed(7)
    documents = [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    golden: dict[str, object] = {"documents": documents, "losses": {}}
    parser = argparse.ArgumentParser()
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the results; this one")
    parser.add_argument("only", nargs="*", metavar="NAME", help="make these alone")
    arguments = parser.parse_args()
    only, into = arguments.only, arguments.into
    if only and (into / "losses.json").exists():
        golden = json.loads((into / "losses.json").read_text())
    for seed, (name, (build, export)) in enumerate(EXPORTS.items()):
        if only and name not in only:
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        model = build().eval()
        fill(model, seed)
        folder = into / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        exact = [losses(model.double(), document) for document in documents]
        export(model.float(), folder)
        strip(folder / "model.onnx")
        if name in HELD_AGAINST_ITSELF:
            exact = [losses_of_the_export(folder, document) for document in documents]
        golden["losses"][name] = exact
        keys = ["model_type", "vocab_size", "max_position_embeddings", "n_positions", "final_logit_softcapping"]
        kept = {key: value for key, value in model.config.to_dict().items() if key in keys}
        (folder / "config.json").write_text(json.dumps({**kept, "bos_token_id": 0}, indent=2) + "\n")
        (into / "losses.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
