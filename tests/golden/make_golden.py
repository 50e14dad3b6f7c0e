"""Writes the golden models (ONNX) and their per-token losses (PyTorch, float64). Run by tests/golden/remake."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy
import onnxruntime
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

import kept_backward
import slm_step
from llama import Config, Llama, fill

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 512
WINDOW = 64
STRIDE = 32
DOCUMENT_TOKENS = (2, 3, 17, 64, 65, 96, 150)
RULE = (
    "Windows of `window` tokens start at 0, stride, 2 stride, ... while start + window < n, and the last starts at"
    " max(0, n - window). Each is fed alone, at positions from 0. A token's loss (nats) comes from the first window"
    " that holds it at an in-window position of 1 or more; the first token of a document has none (null)."
)


@dataclass(frozen=True)
class Flavour:
    name: str
    config: Config
    seed: int
    mask_inputs: bool = False
    half: bool = False
    # Unfolded, a tied head keeps its Transpose of the embedding in the graph.
    fold_constants: bool = True


SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 4, "kv_heads": 2}
FLAVOURS = [
    Flavour("tiny-llama", Config(**SHAPE), seed=1),
    Flavour(
        "tiny-llama-mask", Config(**SHAPE, tied=True, logit_scale=0.5), seed=2, mask_inputs=True, fold_constants=False
    ),
    Flavour("tiny-llama-half", Config(**SHAPE), seed=3, half=True),
]


class WithMask(nn.Module):
    """The inputs that exporters commonly give a decoder."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(input_ids, position_ids, attention_mask[:, None, :] > 0)


def train_tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def window_starts(length: int) -> list[int]:
    starts = []
    start = 0
    while start + WINDOW < length:
        starts.append(start)
        start += STRIDE
    return [*starts, max(0, length - WINDOW)]


def document_losses(model: Llama, tokens: list[int]) -> list[Optional[float]]:
    losses: list[Optional[float]] = [None] * len(tokens)
    for start in window_starts(len(tokens)):
        window = torch.tensor([tokens[start : start + WINDOW]])
        with torch.no_grad():
            logits = model(window)
        scored = functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="none")
        for position, loss in enumerate(scored.tolist(), start=start + 1):
            if losses[position] is None:
                losses[position] = loss
    return losses


def export(flavour: Flavour, model: Llama, path: Path) -> None:
    example = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
    names = ["input_ids"]
    inputs: tuple[Tensor, ...] = (example,)
    exported: nn.Module = model
    if flavour.mask_inputs:
        names += ["attention_mask", "position_ids"]
        inputs = (example, torch.ones_like(example), torch.arange(8)[None, :].repeat(2, 1))
        exported = WithMask(model)
    dynamic = {name: {0: "batch", 1: "sequence"} for name in [*names, "logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter says at length that it is one
        torch.onnx.export(
            exported.eval(),
            inputs,
            str(path),
            input_names=names,
            output_names=["logits"],
            dynamic_axes=dynamic,
            opset_version=17,
            do_constant_folding=flavour.fold_constants,
            dynamo=False,
        )


def largest_error(path: Path, model: Llama, tokens: list[int]) -> float:
    """Of the losses of one window: the exported model in ONNX Runtime against PyTorch in float64."""
    window = numpy.array([tokens[:WINDOW]], dtype=numpy.int64)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    offered = {
        "input_ids": window,
        "attention_mask": numpy.ones_like(window),
        "position_ids": numpy.arange(window.shape[1])[None, :],
    }
    (logits,) = session.run(["logits"], {given.name: offered[given.name] for given in session.get_inputs()})
    measured = functional.cross_entropy(
        torch.tensor(logits[0, :-1]).double(), torch.tensor(window[0, 1:]), reduction="none"
    )
    expected = torch.tensor(document_losses(model, tokens[:WINDOW])[1:], dtype=torch.float64)
    return (measured - expected).abs().max().item()


def config_json(flavour: Flavour) -> dict[str, object]:
    config = flavour.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": WINDOW,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "logit_scale": config.logit_scale,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float16" if flavour.half else "float32",
    }


def main() -> None:
    passage = (HERE / "passage.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(passage)
    tokens = tokenizer.encode(passage).ids
    documents = []
    taken = 0
    for length in DOCUMENT_TOKENS:
        documents.append(tokens[taken : taken + length])
        taken += length

    golden = {"window": WINDOW, "stride": STRIDE, "rule": RULE, "models": {}}
    for flavour in FLAVOURS:
        model = Llama(flavour.config)
        fill(model, flavour.seed, grid=1024)
        folder = HERE / flavour.name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config_json(flavour), indent=2) + "\n")
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        export(flavour, model.half() if flavour.half else model.float(), folder / "model.onnx")

        exact = model.double()
        golden["models"][flavour.name] = [
            {"tokens": document, "losses": document_losses(exact, document)} for document in documents
        ]
        error = largest_error(folder / "model.onnx", exact, documents[-1])
        print(f"{flavour.name}: ONNX Runtime against float64, largest error of a loss: {error:.1e} nats")
    (HERE / "losses.json").write_text(json.dumps(golden) + "\n")

    slm_step.write(HERE / "slm_step.json")
    kept_backward.write(HERE / "kept_backward.json")


if __name__ == "__main__":
    main()
