"""The gradient that flows through kept tokens alone: in every layer the hidden states, keys and values of dropped tokens are
detached, and that is all. Checked against finite differences of the function whose gradient it is.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from llama import Config, Llama, fill

GRID = 1024
# The step of a central difference, in units of the weights' length in a random direction.
DIFFERENCE = 2e-6


@dataclass(frozen=True)
class Case:
    name: str
    # Share of the tokens with a target that are kept, drawn at random.
    keep: float
    # Lengths of the documents packed into each row; what is left is padding.
    rows: tuple[tuple[int, ...], ...]
    length: int
    heads: int = 2
    kv_heads: int = 2
    tied: bool = False
    layers: int = 2
    # Tokens at the beginning of each document that are read and predict nothing.
    context: int = 0

    def config(self) -> Config:
        return Config(
            vocab_size=24,
            hidden_size=4 * self.heads,
            intermediate_size=12,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            tied=self.tied,
        )


PACKED = ((7, 5), (4, 3, 3))
CASES = [
    Case("a tenth, packed", 0.1, PACKED, 12),
    Case("a third, one document a row, tied", 0.3, ((12,), (12,)), 12, tied=True),
    Case("half, packed, keys shared by all queries", 0.5, PACKED, 12, heads=4, kv_heads=1),
    Case("three fifths, packed, grouped queries, tied, three layers", 0.6, PACKED, 12, 4, 2, tied=True, layers=3),
    Case("four fifths, one layer", 0.8, PACKED, 12, layers=1),
    Case("all that predict something", 1.0, PACKED, 12, heads=4, kv_heads=2),
    Case("three fifths, behind context", 0.6, ((12,), (9, 3)), 12, context=2),
    Case("three fifths, documents of many blocks", 0.6, ((150, 66), (100, 90)), 216, kv_heads=1),
    Case("a tenth, documents of many blocks, tied", 0.1, ((150, 66), (216,)), 216, kv_heads=1, tied=True),
]


def batch(case: Case, generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
    shape = (len(case.rows), case.length)
    tokens = torch.zeros(shape, dtype=torch.int64)
    segments, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    targets = torch.full(shape, -1)
    for row, lengths in enumerate(case.rows):
        start = 0
        for segment, length in enumerate(lengths, start=1):
            end = start + length
            document = torch.randint(1, case.config().vocab_size, (length,), generator=generator)
            tokens[row, start:end] = document
            segments[row, start:end] = segment
            positions[row, start:end] = torch.arange(length)
            targets[row, start + case.context : end - 1] = document[1 + case.context :]
            start = end
    given = {"tokens": tokens, "segments": segments, "positions": positions, "targets": targets}
    candidates = (targets.flatten() >= 0).nonzero().flatten()
    count = max(1, int(case.keep * len(candidates) + 0.5))
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    return given, sorted(drawn.tolist())


class DroppedAreConstant:
    """Makes the hidden states, keys and values of dropped tokens constants in every layer of a model: those that they are
    when it runs, or, after `hold`, those that they were when it ran last.
    """

    def __init__(self, model: Llama, is_kept: Tensor) -> None:
        self.is_kept = is_kept[..., None]
        self.seen: dict[str, Tensor] = {}
        self.held = False
        for name, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(self.of_input(f"{name}"))
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.register_forward_hook(self.of_output(f"{name} {id(projection)}"))

    def hold(self) -> None:
        self.held = True

    def constant(self, name: str, x: Tensor) -> Tensor:
        if not self.held:
            self.seen[name] = x.detach().clone()
        return torch.where(self.is_kept, x, self.seen[name])

    def of_input(self, name: str):  # noqa: ANN201
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self.constant(name, given[0]), *given[1:])

        return hook

    def of_output(self, name: str):  # noqa: ANN201
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self.constant(name, output)

        return hook


def kept_loss(model: Llama, given: dict[str, Tensor], kept: list[int]) -> Tensor:
    """Mean loss of the kept tokens."""
    segments = given["segments"]
    logits = model(given["tokens"], given["positions"], segments[:, :, None] == segments[:, None, :])
    return functional.cross_entropy(logits.flatten(0, 1)[kept], given["targets"].flatten()[kept])


def gradients(model: Llama, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    # The norms and queries of a layer that no kept token reads, say.
    filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found))
    return dict(zip(names, filled))


def check_slope(model: Llama, given: dict[str, Tensor], kept: list[int], found: dict[str, Tensor], seed: int) -> float:
    """How far the gradient's slope in a random direction is from a central difference, of the slope."""
    generator = torch.Generator().manual_seed(seed)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    direction = {name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in start.items()}

    def moved(by: float) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + by * direction[name])
            return kept_loss(model, given, kept).item()

    difference = (moved(DIFFERENCE) - moved(-DIFFERENCE)) / (2 * DIFFERENCE)
    moved(0.0)
    slope = sum((found[name] * direction[name]).sum().item() for name in found)
    return abs(difference / slope - 1.0)


def run(case: Case, seed: int) -> dict[str, object]:
    given, kept = batch(case, torch.Generator().manual_seed(seed))
    model = Llama(case.config()).to(torch.float64)
    fill(model, seed=100 + seed, grid=GRID)
    exact = gradients(model, kept_loss(model, given, kept))
    is_kept = torch.zeros(given["tokens"].numel(), dtype=torch.bool)
    is_kept[kept] = True
    constant = DroppedAreConstant(model, is_kept.view(given["tokens"].shape))
    loss = kept_loss(model, given, kept)
    found = gradients(model, loss)
    constant.hold()
    off = max(check_slope(model, given, kept, found, 200 + direction) for direction in range(3))
    assert off < 1e-6, f"{case.name}: a finite difference is {off:.1e} off"

    length = sum(g.square().sum() for g in exact.values()).sqrt()
    apart = sum((g - exact[name]).square().sum() for name, g in found.items()).sqrt() / length
    is_exact = case.keep == 1.0
    assert (apart < 1e-12) == is_exact, f"{case.name}: {apart:.1e} of the exact gradient apart from it"
    print(f"kept_backward: {case.name}: {len(kept)} kept, {apart:.3f} from the exact gradient, slope off by {off:.0e}")
    config = case.config()
    return {
        "name": case.name,
        "is_exact": is_exact,
        "config": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": case.length,
            "rope_theta": config.rope_theta,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tied,
        },
        **{name: values.tolist() for name, values in given.items()},
        "kept": kept,
        "loss": loss.item(),
        "weights": {
            name: {"shape": list(p.shape), "values": [round(x * GRID) for x in p.detach().flatten().tolist()]}
            for name, p in model.named_parameters()
        },
        "gradients": {
            name: [float(f"{x:.8g}") for x in gradient.flatten().tolist()] for name, gradient in found.items()
        },
    }


def write(path: Path) -> None:
    about = (
        "Gradients in float64 of the mean loss of the kept tokens, where in every layer the hidden states, keys and values of"
        " all other tokens are constants. Attention is causal and within a document; targets: the next token, or -1. kept:"
        f" flat indices. weights are in units of 1/{GRID}. is_exact: it is the whole gradient of that loss too."
    )
    cases = [run(case, seed) for seed, case in enumerate(CASES, start=1)]
    path.write_text(json.dumps({"about": about, "grid": GRID, "cases": cases}) + "\n")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent / "kept_backward.json")
