"""One step of Selective Language Modeling, written down as plainly as can be: per-token loss, mask, mean, AdamW."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from llama import Config, Llama, fill

CONFIG = Config(vocab_size=50, hidden_size=16, intermediate_size=32, layers=2, heads=2, kv_heads=1)
KEEP = 0.6
CLIP_NORM = 1.0
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY = 0.1
# Lengths of the documents packed into each row of 12; what is left is padding.
ROWS = [[5, 7], [4, 3, 3]]
LENGTH = 12
# Two rankings that differ in the last bit would test nothing but rounding.
MARGIN_NATS = 1e-3


def batch(generator: torch.Generator) -> dict[str, Tensor]:
    shape = (len(ROWS), LENGTH)
    tokens = torch.zeros(shape, dtype=torch.int64)
    segments, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    targets = torch.full(shape, -1)
    for row, lengths in enumerate(ROWS):
        start = 0
        for segment, length in enumerate(lengths, start=1):
            end = start + length
            document = torch.randint(1, CONFIG.vocab_size, (length,), generator=generator)
            tokens[row, start:end] = document
            segments[row, start:end] = segment
            positions[row, start:end] = torch.arange(length)
            targets[row, start : end - 1] = document[1:]
            start = end
    return {"tokens": tokens, "segments": segments, "positions": positions, "targets": targets}


def token_losses(model: Llama, given: dict[str, Tensor]) -> Tensor:
    """[rows * length], zero where there is no target."""
    segments = given["segments"]
    same_document = segments[:, :, None] == segments[:, None, :]
    logits = model(given["tokens"], given["positions"], same_document)
    return functional.cross_entropy(
        logits.flatten(0, 1), given["targets"].flatten(), ignore_index=-1, reduction="none"
    )


def select(excess: Tensor, valid: Tensor) -> list[int]:
    positions = [index for index in range(len(valid)) if valid[index]]
    count = math.floor(KEEP * len(positions) + 0.5)
    ranked = sorted(positions, key=lambda index: (-excess[index].item(), index))
    assert excess[ranked[count - 1]] - excess[ranked[count]] > MARGIN_NATS, "the last kept token is too close a call"
    return sorted(ranked[:count])


def step(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, object], Llama]:
    generator = torch.Generator().manual_seed(4)
    given = batch(generator)
    valid = given["targets"].flatten() >= 0
    # Sixty-fourths of a nat, which half precision holds exactly.
    reference = torch.randint(128, 384, valid.shape, generator=generator).to(dtype) / 64

    model = Llama(CONFIG).to(dtype)
    fill(model, seed=5, grid=1024)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    losses = token_losses(model, given)
    kept = select(losses.detach() - reference, valid)
    mask = torch.zeros_like(losses)
    mask[kept] = 1.0
    loss = (losses * mask).sum() / mask.sum()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}], **ADAMW
    )
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    assert norm > CLIP_NORM, "the clipping is not exercised"
    optimizer.step()

    rows = len(ROWS)

    def by_row(values: Tensor) -> list[list[object]]:
        flat = [value if present else None for value, present in zip(values.tolist(), valid.tolist())]
        return [flat[row * LENGTH : (row + 1) * LENGTH] for row in range(rows)]

    record = {
        **{name: values.tolist() for name, values in given.items()},
        "reference": by_row(reference),
        "losses": by_row(losses.detach()),
        "kept": kept,
        "loss": loss.item(),
        "gradient_norm": norm.item(),
        "weights": {name: as_json(values) for name, values in before.items()},
        "gradients": {name: as_json(values) for name, values in gradients.items()},
        "weights_after": {name: as_json(parameter.detach()) for name, parameter in model.named_parameters()},
    }
    return before, record, model


def as_json(values: Tensor) -> dict[str, object]:
    """Row-major, to ten digits: three more than single precision holds."""
    return {"shape": list(values.shape), "values": [float(f"{value:.10g}") for value in values.flatten().tolist()]}


def write(path: Path) -> None:
    _, record, exact = step(torch.float64)
    header = {
        "about": (
            "One step in float64. Attention is causal and within a document. targets: the next token of the same"
            " document, or -1. kept: flat indices of the share `keep` (rounded half up) of all targets with the highest"
            " losses - reference, of equals the first. loss: the mean of the kept losses, whose gradients are given as"
            " they are before clipping. weights_after: after clipping the global norm and one step of AdamW, with"
            " weight decay on tensors of two dimensions alone."
        ),
        "config": {
            "vocab_size": CONFIG.vocab_size,
            "hidden_size": CONFIG.hidden_size,
            "intermediate_size": CONFIG.intermediate_size,
            "num_hidden_layers": CONFIG.layers,
            "num_attention_heads": CONFIG.heads,
            "num_key_value_heads": CONFIG.kv_heads,
            "head_dim": CONFIG.head_dim,
            "rope_theta": CONFIG.rope_theta,
            "rms_norm_eps": CONFIG.rms_norm_eps,
            "tie_word_embeddings": CONFIG.tied,
        },
        "keep": KEEP,
        "clip_norm": CLIP_NORM,
        "adamw": {**ADAMW, "weight_decay": WEIGHT_DECAY},
    }
    path.write_text(json.dumps({**header, **record}) + "\n")

    # How far single precision alone strays: the least that a test in it has to allow.
    _, single_record, single = step(torch.float32)
    assert single_record["kept"] == record["kept"]
    parameters = zip(exact.parameters(), single.parameters())
    strayed = max((wide.detach() - narrow.detach().double()).abs().max().item() for wide, narrow in parameters)
    print(f"slm_step: {len(record['kept'])} tokens kept, gradient norm {record['gradient_norm']:.3f}")
    print(f"slm_step: single precision strays from the stepped weights by at most {strayed:.1e}")
